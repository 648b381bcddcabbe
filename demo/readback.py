"""Read the targets back through their own APIs and compare them with the source, field by field.

Nothing here comes from the pipeline or from its configuration: what each target should hold is written down a second
time, by hand, so that a mistake in a mapping shows as well as a lost change does.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

import httpx
from psycopg import Connection
from psycopg.rows import dict_row, tuple_row

from demo import dataset
from demo.changes import RefusedPlane
from demo.target_apis import TargetApis, registry_client

Key = tuple[Any, ...]
Record = dict[str, Any]

NOWHERE = object()
"""Stands for a field that a record does not have; null is something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one target was found to hold."""

    compared: int
    """How many were compared …"""
    things: str
    """… of what."""
    repeats: int
    """Times that the target was sent again what it had already."""
    differences: tuple[str, ...]
    """One sentence for each; empty when source and target agree."""


# The flight board holds every table as it is.


def read_board(apis: TargetApis, source: Connection, refused: RefusedPlane | None) -> Finding:
    """Compare the flight board with the source."""
    differences: list[str] = []
    compared = 0
    base_url, token = apis.base_urls["flight_board"], apis.board_token
    with httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        for table, key in dataset.TABLES.items():
            expected = _source_rows(source, table, refused)
            held = {}
            for row in _board_rows(client, table):
                if "time_hour" in row:
                    row["time_hour"] = datetime.fromisoformat(row["time_hour"])
                held[tuple(row[name] for name in key)] = row
            compared += len(held)
            differences += compare(table, expected, held)
        rewrites = client.get("/board/rewrites.json", params={"_size": 0, "_extra": "count"}).raise_for_status()
    return Finding(
        compared=compared, things="records", repeats=rewrites.json()["count"], differences=tuple(differences)
    )


def _board_rows(client: httpx.Client, table: str) -> Iterator[Record]:
    parameters = {"_size": "1000"}
    while True:
        page = client.get(f"/board/{table}.json", params=parameters).raise_for_status().json()
        yield from page["rows"]
        if page["next"] is None:
            return
        parameters["_next"] = page["next"]


# The registry has no flights, and shapes of its own.


def _registry_airline(row: Record) -> Record:
    return {"name": row["name"]}


def _registry_airport(row: Record) -> Record:
    return {
        "name": row["name"],
        "position": {"latitude": row["lat"], "longitude": row["lon"]},
        "elevation_ft": row["alt"],
        "time_zone": row["tzone"],
    }


def _registry_plane(row: Record) -> Record:
    return {
        "label": f"{row['manufacturer']} {row['model']}",
        "kind": row["type"],
        "model": row["model"],
        "built": row["year"],
        "seats": row["seats"],
        "cruising_speed": row["speed"],
        "engines": {"count": row["engines"], "type": row["engine"]},
    }


_REGISTRY_SHAPES: Mapping[str, Callable[[Record], Record]] = {
    "airlines": _registry_airline,
    "airports": _registry_airport,
    "planes": _registry_plane,
}


def read_registry(apis: TargetApis, source: Connection, refused: RefusedPlane | None) -> Finding:
    """Compare the registry with the source."""
    differences: list[str] = []
    compared = 0
    with registry_client(apis) as client:
        for collection, shape in _REGISTRY_SHAPES.items():
            expected = {key: shape(row) for key, row in _source_rows(source, collection, refused).items()}
            held = {}
            for record in _registry_pages(client, f"/buckets/fleet/collections/{collection}/records", "id"):
                # Kinto's own: a record's id, when it changed, and the version of the schema that it was held against.
                held[(record["id"],)] = {
                    name: value for name, value in record.items() if name not in ("id", "last_modified", "schema")
                }
            compared += len(held)
            differences += compare(collection, expected, held)
        repeats = _writes_that_changed_nothing(client)
    return Finding(compared=compared, things="records", repeats=repeats, differences=tuple(differences))


def _registry_pages(client: httpx.Client, path: str, sort: str) -> Iterator[Record]:
    answer = client.get(path, params={"_limit": 100, "_sort": sort}).raise_for_status()
    while True:
        yield from answer.json()["data"]
        following = answer.headers.get("Next-Page")
        if following is None:
            return
        answer = client.get(following).raise_for_status()


def _writes_that_changed_nothing(client: httpx.Client) -> int:
    count = 0
    last: dict[str, Record] = {}
    for entry in _registry_pages(client, "/buckets/fleet/history?resource_name=record", "last_modified"):
        content = {name: value for name, value in entry["target"]["data"].items() if name != "last_modified"}
        count += last.get(entry["uri"]) == content
        last[entry["uri"]] = content
    return count


# The event hook is owed every change of flights and planes, once each, and those of a row in their order.


def read_event_hook(apis: TargetApis, source: Connection) -> Finding:
    """Compare what the receiver was sent with the change log, and what it adds up to with the source."""
    with httpx.Client(base_url=apis.base_urls["event_hook"], timeout=60) as client:
        summary = client.get("/summary").raise_for_status().json()
        events = list(_events(client))
    with source.cursor(row_factory=tuple_row) as cursor:
        owed = cursor.execute(
            "select change_id, stream, operation, payload from distributary.change_log "
            "where stream in ('flights', 'planes') and target is null order by change_id"
        ).fetchall()

    differences = compare(
        "events",
        {(id_,): {"stream": stream, "operation": operation, "row": row} for id_, stream, operation, row in owed},
        {(event["event_id"],): {name: event[name] for name in ("stream", "operation", "row")} for event in events},
    )
    differences += [f"event {id_} came {times} times" for id_, times in repeated(events)]
    if summary["keys_with_another_body"]:
        differences.append(f"{summary['keys_with_another_body']} keys were used for more than one body")
    differences += out_of_order(events)
    for table in ("flights", "planes"):
        differences += compare(
            f"{table}, as the events tell it", _source_rows(source, table, None), folded(events, table)
        )
    return Finding(
        compared=len(events), things="events", repeats=summary["repeated_requests"], differences=tuple(differences)
    )


def _events(client: httpx.Client) -> Iterator[Record]:
    position: int | None = 0
    while position is not None:
        page = client.get("/events", params={"after": position}).raise_for_status().json()
        yield from page["events"]
        position = page["next"]


def repeated(events: Sequence[Record]) -> list[tuple[int, int]]:
    """Return the ids that came more than once, and how often."""
    return [(id_, times) for id_, times in Counter(event["event_id"] for event in events).items() if times > 1]


def out_of_order(events: Sequence[Record]) -> list[str]:
    """Return a sentence for every event that came after a later one of the same row; *events* is as they came."""
    latest: dict[tuple[str, Key], int] = {}
    found = []
    for event in events:
        row = (event["stream"], _key_of(event["stream"], event["row"]))
        if latest.get(row, 0) > event["event_id"]:
            found.append(f"event {event['event_id']} came after event {latest[row]}, both of {_name(*row)}")
        latest[row] = max(event["event_id"], latest.get(row, 0))
    return found


def folded(events: Sequence[Record], table: str) -> dict[Key, Record]:
    """Return the rows of *table* that *events*, in the order in which they came, add up to."""
    rows: dict[Key, Record] = {}
    for event in events:
        if event["stream"] != table:
            continue
        key = _key_of(table, event["row"])
        if event["operation"] == "delete":
            rows.pop(key, None)
        else:
            rows[key] = dict(event["row"])
    for row in rows.values():
        if "time_hour" in row:
            row["time_hour"] = datetime.fromisoformat(row["time_hour"])
    return rows


# Comparing.


def compare(what: str, expected: Mapping[Key, Record], held: Mapping[Key, Record]) -> list[str]:
    """Return a sentence for every record that is missing, too many, or different in a field."""
    differences = [f"{_name(what, key)} is missing" for key in expected.keys() - held.keys()]
    differences += [f"{_name(what, key)} should not be there" for key in held.keys() - expected.keys()]
    for key in expected.keys() & held.keys():
        should, does = expected[key], held[key]
        if same(should, does):
            continue
        for name in sorted(should.keys() | does.keys()):
            wanted, found = should.get(name, NOWHERE), does.get(name, NOWHERE)
            if not same(wanted, found):
                differences.append(f"{_name(what, key)}: {name} is {_show(found)}, should be {_show(wanted)}")
    return differences


def same(one: object, other: object) -> bool:
    """Tell whether two values are equal, floats up to their last bits.

    Kinto reads JSON with rapidjson, which rounds a number of 17 digits (-124.76833333333333) to its neighbour.
    """
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-15)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return one == other


def _name(what: str, key: Key) -> str:
    return f"{what} {','.join(map(str, key))}"


def _show(value: object) -> str:
    return "not there" if value is NOWHERE else repr(value)


def _key_of(table: str, row: Record) -> Key:
    return tuple(row[name] for name in dataset.TABLES[table])


def _source_rows(source: Connection, table: str, refused: RefusedPlane | None) -> dict[Key, Record]:
    """Return the rows of *table* by key, without what stays at home; the refused plane is as it was before."""
    query: LiteralString = "select * from "
    with source.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(query + table).fetchall()
    if refused is not None and table == "planes":
        rows = [refused.before if row["tailnum"] == refused.tailnum else row for row in rows]
    inside = dataset.INTERNAL_COLUMNS.get(table, ())
    return {_key_of(table, row): {name: value for name, value in row.items() if name not in inside} for row in rows}
