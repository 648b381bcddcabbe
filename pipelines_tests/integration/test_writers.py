"""Six writers who commit late, roll back and leave a transaction open, against real drains: what arrives?"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines.delivery.routing import compile_routes
from pipelines_tests.fakes.http_server import HttpApi
from resources.capture import install_capture
from resources.http_target import HttpTargetClient, endpoint
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock

_WRITERS = 6
_KEYS = 25
_KEY_OF_THE_LONG_TRANSACTION = 1000
_SECONDS_OPEN = 3.0
_PATIENCE = 30.0


class Event(NamedTuple):
    """One version of one key, or its end. Those of a key sort in the order in which they happened."""

    version: int
    deleted: bool


@dataclass(slots=True)
class World:
    """The source, and what its writers know to have committed."""

    url: str
    done: threading.Event = field(default_factory=threading.Event)
    committed: dict[int, list[Event]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, events: Sequence[tuple[int, Event]]) -> None:
        with self.lock:
            for key, event in events:
                self.committed[key].append(event)


@pytest.fixture
def world(database: str) -> World:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table items (id int primary key, version int not null)")
        # Counts every attempt at a key, under a lock on the key: an order that owes nothing to what is tested.
        connection.execute("create table attempts (id int primary key, n int not null default 0)")
        connection.execute("insert into attempts (id) select generate_series(1, %s)", [_KEYS])
        connection.execute("insert into attempts (id) values (%s)", [_KEY_OF_THE_LONG_TRANSACTION])
        install_capture(connection, SourceConfig.model_validate({"tables": {"items": {"key": "id"}}}))
    return World(database)


# --- the writers ------------------------------------------------------------------------------------------------------


def change(connection: psycopg.Connection, key: int, *, delete: bool) -> list[tuple[int, Event]]:
    """Write one key; return what happened to it, should it commit."""
    counted = connection.execute("update attempts set n = n + 1 where id = %s returning n", [key]).fetchone()
    assert counted is not None
    version = counted[0]
    if not delete:
        connection.execute(
            "insert into items values (%s, %s) on conflict (id) do update set version = excluded.version",
            [key, version],
        )
        return [(key, Event(version, deleted=False))]
    gone = connection.execute("delete from items where id = %s returning version", [key]).fetchone()
    return [] if gone is None else [(key, Event(gone[0], deleted=True))]


def write(world: World, random: Random) -> None:
    """Write random keys in random transactions until the long one is over."""
    with psycopg.connect(world.url) as connection:
        while not world.done.is_set():
            events: list[tuple[int, Event]] = []
            # In one order, or the writers would lock each other out.
            for key in sorted(random.sample(range(1, _KEYS + 1), random.randint(1, 3))):
                connection.execute("savepoint here")
                found = change(connection, key, delete=random.random() < 0.2)
                if random.random() < 0.15:
                    connection.execute("rollback to here")
                else:
                    events += found
            if random.random() < 0.3:
                world.done.wait(random.uniform(0.0, 0.06))
            if random.random() < 0.25:
                connection.rollback()
            else:
                connection.commit()
                world.note(events)
            world.done.wait(random.uniform(0.0, 0.01))


def stay_open(world: World) -> None:
    """Draw ids at the very beginning, and commit them when all others are through."""
    with psycopg.connect(world.url) as connection:
        try:
            events = change(connection, _KEY_OF_THE_LONG_TRANSACTION, delete=False)
            events += change(connection, _KEY_OF_THE_LONG_TRANSACTION, delete=False)
            world.done.wait(_SECONDS_OPEN)
            connection.commit()
            world.note(events)
        finally:
            world.done.set()


# --- the drains -------------------------------------------------------------------------------------------------------


def target(mode: str, api: HttpApi) -> TargetConfig:
    record = {"id": "$id", "version": "$version", "deleted": False, "change_id": "$_change_id"}
    batch = {"method": "POST", "path": "/items", "batch": {"max_records": 20}}
    return TargetConfig.model_validate(
        {
            "name": mode,
            "base_url": api.url,
            "routes": {
                "items": {
                    "mode": mode,
                    "record": record,
                    "upsert": batch,
                    "delete": {**batch, "record": {**record, "deleted": True}},
                }
            },
        }
    )


def settled_ranges(url: str, name: str) -> list[Any]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "select r from distributary.target_state, unnest(settled) r where target = %s", [name]
        ).fetchall()


def deliver(world: World, config: TargetConfig) -> None:
    """Drain again and again, each for less than a second, until the writers are done and nothing is open."""
    ledger = PostgresLedger(world.url)
    at = endpoint(config, lambda name: name)
    give_up_at = time.monotonic() + _PATIENCE
    while True:
        last = world.done.is_set()
        with ledger.open_target(config.name, run_id="run") as opened:
            assert opened is not None
            report = drain(
                policy=DrainPolicy(target=config.name, max_in_flight=4),
                routes=compile_routes(config),
                ledger=opened,
                connect=lambda: HttpTargetClient(at),
                clock=SystemClock(),
                limits=DrainLimits(linger_seconds=0.2, poll_seconds=0.02, max_seconds=0.7, window_records=200),
            )
        assert report.end in ("caught_up", "stopped"), report
        if last and report.end == "caught_up" and len(settled_ranges(world.url, config.name)) == 1:
            return
        assert time.monotonic() < give_up_at, (report, settled_ranges(world.url, config.name))


# --- what arrived -----------------------------------------------------------------------------------------------------


class Arrivals:
    """What one target was sent, in the order in which it came."""

    def __init__(self, api: HttpApi) -> None:
        self.change_ids: list[int] = []
        self.by_key: dict[int, list[Event]] = defaultdict(list)
        self.requests = api.requests
        for request in self.requests:
            for record in request.records:
                self.change_ids.append(record["change_id"])
                self.by_key[record["id"]].append(Event(record["version"], record["deleted"]))

    def assert_in_order_and_once(self) -> None:
        assert len(set(self.change_ids)) == len(self.change_ids), "a change was sent twice"
        assert len({request.key for request in self.requests}) == len(self.requests), "a request was sent twice"
        for key, events in self.by_key.items():
            assert events == sorted(events), f"key {key} arrived out of order"


@pytest.fixture
def apis() -> Iterator[dict[str, HttpApi]]:
    with HttpApi() as event, HttpApi() as state:
        yield {"event": event, "state": state}


@pytest.mark.integration
def test_nothing_is_lost_out_of_order_or_sent_twice(world: World, apis: dict[str, HttpApi]) -> None:
    """One target wants every event, the other the latest state; both are drained while six writers write."""
    ledger = PostgresLedger(world.url)
    ledger.register({"event": "beginning", "state": "beginning"})
    with ThreadPoolExecutor(_WRITERS + 3) as threads:
        running = [threads.submit(stay_open, world)]
        running += [threads.submit(write, world, Random(seed)) for seed in range(_WRITERS)]
        running += [threads.submit(deliver, world, target(mode, api)) for mode, api in apis.items()]
        try:
            for thread in running:
                thread.result()
        finally:
            world.done.set()
    committed = {key: sorted(events) for key, events in world.committed.items() if events}
    assert sum(map(len, committed.values())) > 100
    assert len(committed[_KEY_OF_THE_LONG_TRANSACTION]) == 2

    every_event = Arrivals(apis["event"])
    every_event.assert_in_order_and_once()
    assert every_event.by_key == committed

    latest_states = Arrivals(apis["state"])
    latest_states.assert_in_order_and_once()
    assert {key: events[-1] for key, events in latest_states.by_key.items()} == {
        key: events[-1] for key, events in committed.items()
    }
    assert set(latest_states.change_ids) <= set(every_event.change_ids)

    captured = len(every_event.change_ids)
    for mode, arrivals in (("event", every_event), ("state", latest_states)):
        found = ledger.conservation(mode)
        assert found.holds
        assert (found.captured, found.accepted) == (captured, len(arrivals.change_ids))
        assert found.superseded == captured - found.accepted
        assert len(settled_ranges(world.url, mode)) == 1
