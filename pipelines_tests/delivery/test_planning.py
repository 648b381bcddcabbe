"""A window becomes batches: nothing is lost or sent twice, and no key is ever out of order."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from operator import itemgetter
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.changes.record import ChangeColumns, ChangeRecord, Operation
from pipelines.changes.texts import SEPARATOR, JoinedTexts
from pipelines.delivery.batching import Batch, Lanes
from pipelines.delivery.idempotency import idempotency_key
from pipelines.delivery.ledger import Leftover, PendingWindow
from pipelines.delivery.planning import LeftoverPlan, Plan, plan_leftover, plan_window
from pipelines.delivery.routing import Route
from pipelines_tests.fakes.ledger import LOG_ID
from pipelines_tests.fakes.target import change, routes_of

UPSERT: Any = {"path": "/rows", "batch": {"max_records": 3}}
DELETE: Any = {"method": "POST", "path": "/rows/delete", "batch": {"max_records": 2, "body": {"ids": "$keys"}}}
RESULTS: Any = {"items": "$.results", "status": "status"}
INSERT: Any = {"path": "/rows", "batch": {"max_records": 3}}
UPDATE: Any = {"path": "/rows/${_key}"}
UPSERTS = routes_of(customers={"upsert": UPSERT})


def planned(
    records: Iterable[ChangeRecord],
    routes: Mapping[str, Route],
    *,
    lanes: int | Lanes = 1,
    at_most: int | None = None,
    decided_up_to: int | None = None,
) -> Plan:
    return plan_window(
        PendingWindow(
            records=records if isinstance(records, ChangeColumns) else list(records),
            complete=True,
            decided_up_to=decided_up_to,
        ),
        log_id=LOG_ID,
        target="api",
        routes=routes,
        lanes=lanes if isinstance(lanes, Lanes) else Lanes(records=[0] * lanes),
        max_records_of=lambda _, operation: min(operation.max_records, at_most or operation.max_records),
    )


def in_columns(records: Sequence[ChangeRecord], *, at_once: int = 100) -> ChangeColumns:
    """Return *records* as they are read: column by column, so many payloads in one piece."""
    starts = range(0, len(records), at_once)
    parts = [records[start : start + at_once] for start in starts]
    texts = JoinedTexts([SEPARATOR.join(one.payload for one in part) for part in parts], [len(part) for part in parts])
    columns = [list(map(itemgetter(place), records)) for place in range(len(ChangeRecord._fields))]
    return ChangeColumns([*columns[:4], texts, *columns[5:]])


def sent(plan: Plan) -> list[tuple[str, list[int]]]:
    return [(batch.operation.kind, [one.change_id for one in batch.changes]) for batch in plan.batches]


def ids(records: Iterable[ChangeRecord]) -> list[int]:
    return [one.change_id for one in records]


# State ----------------------------------------------------------------------------------------------------------------


def test_only_the_latest_state_of_a_key_is_sent_and_the_earlier_are_superseded() -> None:
    plan = planned([change(1, "a"), change(2, "b"), change(3, "a"), change(4, "a")], UPSERTS)

    assert sent(plan) == [("upsert", [2, 4])]
    assert ids(plan.window.superseded) == [1, 3]


def test_the_same_key_in_two_streams_is_two_records() -> None:
    routes = routes_of(customers={"upsert": UPSERT}, orders={"upsert": UPSERT})
    plan = planned([change(1, "a"), change(2, "a", stream="orders")], routes)

    assert sorted(sent(plan)) == [("upsert", [1]), ("upsert", [2])]
    assert plan.window.superseded == []


def test_a_record_deleted_at_the_end_is_deleted_whatever_came_before() -> None:
    records = [change(1, "a", operation="insert"), change(2, "a"), change(3, "a", operation="delete")]
    plan = planned(records, routes_of(customers={"upsert": UPSERT, "delete": DELETE}))

    assert sent(plan) == [("delete", [3])]
    assert ids(plan.window.superseded) == [1, 2]


@pytest.mark.parametrize(
    ("operations", "kind"),
    [
        (["insert", "update"], "insert"),
        (["update", "update"], "update"),
        (["delete", "insert"], "update"),
        (["snapshot", "update"], "insert"),
        (["insert", "delete"], "delete"),
        (["update", "delete", "insert", "update"], "update"),
    ],
)
def test_what_is_sent_is_what_leads_from_the_targets_state_to_the_sources(
    operations: list[Operation], kind: str
) -> None:
    """An insert and an update in one window are one insert: the target has never seen the record."""
    routes = routes_of(customers={"insert": INSERT, "update": UPDATE, "delete": DELETE})
    plan = planned([change(i, "a", operation=op) for i, op in enumerate(operations, 1)], routes)

    assert sent(plan) == [(kind, [len(operations)])]


def test_where_nothing_updates_a_record_made_anew_is_deleted_first_and_then_inserted() -> None:
    """In this order, though the two go in requests of their own."""
    routes = routes_of(customers={"insert": INSERT, "delete": DELETE})
    records = [
        change(1, "b", operation="insert"),
        change(2, "a", operation="delete"),
        change(3, "a", operation="insert"),
    ]

    plan = planned(records, routes)

    assert sorted(sent(plan)[:2]) == [("delete", [2]), ("insert", [1])]
    assert sent(plan)[2:] == [("insert", [3])]


def test_a_record_deleted_and_made_anew_is_both_where_nothing_updates() -> None:
    """One insert in their place would conflict with the record that is still there."""
    plan = planned(
        [change(1, "a", operation="delete"), change(2, "a", operation="insert")],
        routes_of(customers={"insert": INSERT, "delete": DELETE}),
    )

    assert sent(plan) == [("delete", [1]), ("insert", [2])]


def test_a_delete_that_is_not_wanted_supersedes_nothing() -> None:
    """Had the insert come in a window of its own, it would have been sent: timing decides nothing."""
    plan = planned(
        [change(1, "a", operation="insert"), change(2, "a", operation="delete")],
        routes_of(customers={"insert": INSERT}),
    )

    assert sent(plan) == [("insert", [1])]
    assert ids(plan.window.filtered) == [2]


# What is not sent -----------------------------------------------------------------------------------------------------


def test_a_stream_without_a_route_and_an_operation_that_is_not_given_are_filtered() -> None:
    plan = planned([change(1, stream="unrouted"), change(2, operation="delete"), change(3)], UPSERTS)

    assert ids(plan.window.filtered) == [1, 2]
    assert sent(plan) == [("upsert", [3])]


def test_a_record_that_cannot_be_rendered_is_dead_and_harms_no_other() -> None:
    routes = routes_of(customers={"record": {"name": "$name"}, "upsert": UPSERT})
    plan = planned(
        [change(1, payload=b'{"name": "a"}'), change(2, payload=b'{"other": 1}'), change(3, payload=b'{"name": "c"}')],
        routes,
    )

    assert sent(plan) == [("upsert", [1, 3])]
    assert [(dead.change.change_id, dead.attempts) for dead in plan.window.dead] == [(2, 0)]
    assert "'name'" in plan.window.dead[0].reason


def test_a_record_that_is_filtered_makes_no_other_be_rendered_twice() -> None:
    rendered: list[int] = []

    def odd_ones(one: ChangeRecord) -> bytes | None:
        rendered.append(one.change_id)
        return b"{}" if one.change_id % 2 else None

    route = UPSERTS["customers"]
    upsert = replace(route.operations["upsert"], render_record=odd_ones)
    plan = planned([change(i) for i in range(1, 6)], {"customers": replace(route, operations={"upsert": upsert})})

    assert sent(plan) == [("upsert", [1, 3, 5])]
    assert ids(plan.window.filtered) == [2, 4]
    assert rendered == [1, 2, 3, 4, 5]


def test_an_empty_window_closes_gaps_all_the_same() -> None:
    plan = planned([], UPSERTS, decided_up_to=17)

    assert plan.window.decided_up_to == 17
    assert plan.window.claims == []


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_closes_at_max_records() -> None:
    plan = planned([change(i) for i in range(1, 8)], UPSERTS)

    assert sent(plan) == [("upsert", [1, 2, 3]), ("upsert", [4, 5, 6]), ("upsert", [7])]


def test_a_learned_batch_size_is_kept_to() -> None:
    plan = planned([change(i) for i in range(1, 6)], UPSERTS, at_most=2)

    assert [len(members) for _, members in sent(plan)] == [2, 2, 1]


def test_a_batch_closes_before_max_bytes_and_a_larger_record_travels_alone() -> None:
    batch = {"max_records": 100, "max_bytes": 60, "body": {"inputs": "$records"}}
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": batch}})
    payloads = [b'"%b"' % (b"x" * size) for size in (10, 10, 10, 200, 10)]
    plan = planned([change(i, payload=payload) for i, payload in enumerate(payloads, 1)], routes)

    assert sent(plan) == [("upsert", [1, 2, 3]), ("upsert", [4]), ("upsert", [5])]


def test_a_claim_is_what_its_batch_is() -> None:
    plan = planned([change(i) for i in range(1, 9)], UPSERTS, lanes=3)

    for claim, batch in zip(plan.window.claims, plan.batches, strict=True):
        assert (claim.lane, claim.stream, claim.operation) == (batch.lane, "customers", "upsert")
        assert claim.changes == batch.changes
        assert claim.idempotency_key == idempotency_key(LOG_ID, "api", batch.operation.fingerprint, batch.changes)


# Events ---------------------------------------------------------------------------------------------------------------

EVENTS = routes_of(customers={"mode": "event", "upsert": UPSERT, "delete": DELETE})


def test_every_event_is_sent_in_order() -> None:
    plan = planned([change(1, "a"), change(2, "a"), change(3, "b"), change(4, "a")], EVENTS)

    assert sent(plan) == [("upsert", [1, 2, 3]), ("upsert", [4])]
    assert plan.window.superseded == []


def test_another_operation_on_a_key_closes_what_is_open_before_it() -> None:
    """The delete must not overtake the upsert, nor the second upsert the delete."""
    records = [change(1, "a"), change(2, "b"), change(3, "a", operation="delete"), change(4, "a", operation="insert")]

    assert sent(planned(records, EVENTS)) == [("upsert", [1, 2]), ("delete", [3]), ("upsert", [4])]


def test_operations_on_different_keys_share_their_batches() -> None:
    records = [
        change(1, "a"),
        change(2, "b", operation="delete"),
        change(3, "c"),
        change(4, "d", operation="delete"),
    ]

    assert sorted(sent(planned(records, EVENTS))) == [("delete", [2, 4]), ("upsert", [1, 3])]


def test_where_items_are_judged_one_by_one_a_key_is_in_a_batch_once() -> None:
    """Its first change could be sent again after its second was accepted."""
    routes = routes_of(customers={"mode": "event", "upsert": {**UPSERT, "results": RESULTS}})

    plan = planned([change(1, "a"), change(2, "a"), change(3, "b")], routes)

    assert sent(plan) == [("upsert", [1]), ("upsert", [2, 3])]


@pytest.mark.parametrize("operation", ["insert", "snapshot"])
def test_an_insert_between_updates_is_not_passed_over_where_nothing_updates(operation: Operation) -> None:
    """Deleted, which the route does not tell, and made anew: one by one the target would be given that insert."""
    routes = routes_of(customers={"insert": {"path": "/rows"}})
    records = [
        change(1, "a"),
        change(2, "a", operation="delete"),
        change(3, "a", operation=operation),
        change(4, "a"),
    ]

    assert sent(planned(records, routes)) == [("insert", [4])]


# Lanes ----------------------------------------------------------------------------------------------------------------


def lanes_of(plan: Plan) -> list[tuple[int, list[int]]]:
    return [(batch.lane, ids(batch.changes)) for batch in plan.batches]


def in_flight(lane: int, *keys: str) -> dict[str, Batch]:
    """Return keys in flight in one batch on *lane*."""
    (batch,) = planned([change(1)], UPSERTS).batches
    return dict.fromkeys(keys, msgspec.structs.replace(batch, lane=lane))


def flying(batches: Mapping[str, Mapping[str, Batch]]) -> Callable[[str, AbstractSet[str]], Mapping[str, Batch]]:
    """Return what a drain answers that has *batches* in flight."""
    return lambda stream, wanted: {} if wanted.isdisjoint(batches.get(stream, {})) else batches[stream]


def test_what_is_not_in_flight_goes_in_order_to_the_lane_with_the_least_before_it() -> None:
    lanes = Lanes(records=[5, 0, 4])
    plan = planned([change(i) for i in range(1, 15)], UPSERTS, lanes=lanes)

    assert sorted(lanes_of(plan), key=lambda batch: batch[1]) == [
        (1, [1, 2, 3]),
        (1, [4, 5, 6]),
        (2, [7, 8, 9]),
        (0, [10, 11, 12]),
        (1, [13, 14]),
    ]


def test_a_key_in_flight_keeps_its_lane_however_much_that_has_before_it() -> None:
    """On another it could overtake the change before it."""
    lanes = Lanes(in_flight=flying({"customers": in_flight(1, "b", "d")}), records=[0, 1000, 0])
    plan = planned([change(i, key) for i, key in enumerate("abcdef", 1)], UPSERTS, lanes=lanes)

    assert sorted(lanes_of(plan)) == [(0, [1, 3, 5]), (1, [2, 4]), (2, [6])]


def test_a_key_of_another_stream_is_another_key() -> None:
    lanes = Lanes(in_flight=flying({"orders": in_flight(1, "a")}), records=[0, 0])

    assert lanes_of(planned([change(1, "a")], UPSERTS, lanes=lanes)) == [(0, [1])]


def test_a_leftover_of_more_lanes_than_there_are_now_has_one_of_these() -> None:
    lanes = Lanes(in_flight=flying({"customers": in_flight(7, "a")}), records=[0, 0, 0])

    assert lanes_of(planned([change(1, "a")], UPSERTS, lanes=lanes)) == [(7 % 3, [1])]


def test_the_events_of_a_key_are_on_one_lane_and_leave_the_others_to_the_rest() -> None:
    records = [change(i, "hot" if i % 2 else str(i)) for i in range(1, 13)]
    plan = planned(records, EVENTS, lanes=2)

    of_key = {one.key: {b.lane for b in plan.batches if one in b.changes} for one in records}
    assert len({b.lane for b in plan.batches if any(one.key == "hot" for one in b.changes)}) == 1
    assert all(len(lanes) == 1 for lanes in of_key.values())
    assert {batch.lane for batch in plan.batches} == {0, 1}


# Against a naive reference --------------------------------------------------------------------------------------------

_SHAPES: dict[str, Any] = {
    "upserts": {"upsert": UPSERT, "delete": DELETE},
    "no deletes": {"upsert": UPSERT},
    "inserts and updates": {"insert": INSERT, "update": UPDATE, "delete": DELETE},
    "with results": {"upsert": {**UPSERT, "results": RESULTS}, "delete": {**DELETE, "results": RESULTS}},
    "inserts alone": {"insert": INSERT},
    "inserts and deletes": {"insert": INSERT, "delete": DELETE},
    "small bodies": {"upsert": {"path": "/rows", "batch": {"max_records": 50, "max_bytes": 90}}, "delete": DELETE},
}
_COMPILED = [
    pytest.param(routes_of(customers={"mode": mode, **spec}, orders={"mode": mode, **spec}), id=f"{shape}, {mode}")
    for shape, spec in _SHAPES.items()
    for mode in ("state", "event")
]

_histories = st.lists(
    st.tuples(
        st.sampled_from(["customers", "customers", "orders", "unrouted"]),
        st.sampled_from("abcde"),
        st.sampled_from(["insert", "update", "update", "delete", "snapshot"]),
        st.integers(1, 4),  # ids have gaps
    ),
    max_size=40,
)


def _records(history: Sequence[tuple[str, str, Any, int]]) -> list[ChangeRecord]:
    records, change_id = [], 0
    for stream, key, operation, step in history:
        change_id += step
        records.append(change(change_id, key, stream=stream, operation=operation))
    return records


def _lives(mine: Sequence[ChangeRecord]) -> list[list[ChangeRecord]]:
    """Split a key's changes after each delete: where nothing updates, each life of a record is told for itself."""
    lives: list[list[ChangeRecord]] = [[]]
    for one in mine:
        lives[-1].append(one)
        if one.operation == "delete":
            lives.append([])
    return [life for life in lives if life]


def _naive_owed(records: Sequence[ChangeRecord], routes: Mapping[str, Route]) -> dict[int, str | None]:
    """Return, by change id, the operation that is to be sent; None for what is not. Slow and plain."""
    owed: dict[int, str | None] = {one.change_id: None for one in records}
    for one in records:
        route = routes.get(one.stream)
        if route is None:
            continue
        wanted = [o for o in records if o.operation != "delete" or "delete" in route.operations]
        mine = [other for other in wanted if (other.stream, other.key) == (one.stream, one.key)]
        if one not in mine:
            continue
        lives = _lives(mine) if not route.updates else [mine]
        if route.mode == "event":
            lives = [[each] for each in mine]
        mine = next(life for life in lives if one in life)
        if one is not mine[-1]:
            continue
        anew = not route.updates and any(other.operation in ("insert", "snapshot") for other in mine)
        operation = route.operation_for("insert" if anew else mine[0].operation, one.operation)
        owed[one.change_id] = operation.kind if operation else None
    return owed


@pytest.mark.parametrize("routes", _COMPILED)
@settings(max_examples=60)
@given(
    history=_histories,
    loads=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    lane_of_key=st.dictionaries(st.sampled_from("abcde"), st.integers(0, 3)),
    at_most=st.sampled_from([None, 1, 2]),
)
def test_a_plan_is_whole_ordered_and_within_its_bounds(
    routes: dict[str, Route], history: Any, loads: list[int], lane_of_key: dict[str, int], at_most: int | None
) -> None:
    records = _records(history)
    lanes = Lanes(
        in_flight=flying({"customers": {key: in_flight(lane, key)[key] for key, lane in lane_of_key.items()}}),
        records=loads,
    )
    plan = planned(records, routes, lanes=lanes, at_most=at_most)
    window = plan.window

    # Every record is somewhere, once.
    placed = [one for claim in window.claims for one in claim.changes] + [*window.superseded, *window.filtered]
    assert sorted(ids(placed)) == ids(records)
    assert window.dead == []

    # What is sent, and as what, is what the reference says.
    as_sent = {one.change_id: batch.operation.kind for batch in plan.batches for one in batch.changes}
    assert as_sent == {change_id: kind for change_id, kind in _naive_owed(records, routes).items() if kind}

    # Only an earlier state of a key that has a later one is superseded.
    for one in window.superseded:
        assert routes[one.stream].mode == "state"
        assert any((o.stream, o.key) == (one.stream, one.key) and o.change_id > one.change_id for o in records)

    last_sent: dict[tuple[str, str], tuple[int, int]] = {}
    for batch in plan.batches:
        assert 1 <= len(batch.changes) <= min(batch.operation.max_records, at_most or 100)
        body = batch.operation.request(batch.changes, batch.fragments).body
        assert len(batch.changes) == 1 or len(body or b"") <= batch.operation.max_bytes
        keys = [one.key for one in batch.changes]
        assert batch.operation.results is None or len(set(keys)) == len(keys)
        for one, fragment in zip(batch.changes, batch.fragments, strict=True):
            assert one.stream == batch.route.stream
            if one.stream == "customers" and one.key in lane_of_key:
                assert batch.lane == lane_of_key[one.key] % len(loads)
            assert fragment == batch.operation.render_record(one)
            # A lane sends its batches one after another: so a key's changes leave in the order of their ids.
            lane, change_id = last_sent.get((one.stream, one.key), (batch.lane, 0))
            assert lane == batch.lane
            assert change_id < one.change_id
            last_sent[(one.stream, one.key)] = (batch.lane, one.change_id)

    assert plan == planned(records, routes, lanes=lanes, at_most=at_most)
    assert plan == planned(in_columns(records), routes, lanes=lanes, at_most=at_most)


@pytest.mark.parametrize("body", [{}, {"format": "ndjson"}, {"compress": "gzip"}])
@pytest.mark.parametrize("max_bytes", [10**6, 3_000, 1_500])
@pytest.mark.parametrize("max_records", [1, 7, 40, 64, 100, 150, 250])
@pytest.mark.parametrize("missing", [(), (3,), (70, 71, 72, 180)])
def test_what_is_read_in_pieces_is_sent_in_the_same_bytes(
    body: Any, max_bytes: int, max_records: int, missing: Sequence[int]
) -> None:
    """Wherever the pieces end, and the requests: a repeat may have been read otherwise."""
    upsert = {"path": "/rows", "batch": {"max_records": max_records, "max_bytes": max_bytes}, **body}
    routes = routes_of(customers={"upsert": upsert})
    records = [change(i, f"k{i}", payload=b'{"id": %d}' % i * (i % 5 + 1)) for i in range(1, 300) if i not in missing]

    plan, kept = planned(records, routes, lanes=3), planned(in_columns(records), routes, lanes=3)

    assert kept == plan
    for one, other in zip(kept.batches, plan.batches, strict=True):
        assert one.operation.request(one.changes, one.fragments) == other.operation.request(
            other.changes, other.fragments
        )


def test_what_goes_as_it_is_stays_in_one_piece() -> None:
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 100}}})

    for batch in planned(in_columns([change(i, f"k{i}") for i in range(1, 300)]), routes).batches:
        assert isinstance(batch.fragments, JoinedTexts)


# Leftovers ------------------------------------------------------------------------------------------------------------


def left(changes: Sequence[ChangeRecord], *, operation: Any = "upsert", lane: int = 2) -> Leftover:
    return Leftover(
        batch_id=5,
        lane=lane,
        stream=changes[0].stream,
        operation=operation,
        idempotency_key=uuid4(),
        changes=changes,
    )


def again(plan: LeftoverPlan) -> list[tuple[str, int, list[int]]]:
    return [(batch.operation.kind, batch.lane, ids(batch.changes)) for batch in plan.batches]


def test_a_leftover_is_one_request_again_whatever_the_limits_are_now() -> None:
    """As written: the same members in the same order, in their lane, though batches have become smaller since."""
    changes = [change(i) for i in (4, 2, 7, 9, 11)]

    plan = plan_leftover(left(changes), routes=UPSERTS)

    assert again(plan) == [("upsert", 2, [4, 2, 7, 9, 11])]
    assert (plan.dead, plan.filtered) == ([], [])


def test_a_leftover_has_the_bytes_and_the_key_that_it_had() -> None:
    routes = UPSERTS
    first = planned([change(1), change(2)], routes)
    (batch,) = plan_leftover(left([change(1), change(2)]), routes=routes).batches

    assert batch.operation.request(batch.changes, batch.fragments) == first.batches[0].operation.request(
        first.batches[0].changes, first.batches[0].fragments
    )
    assert (
        idempotency_key(LOG_ID, "api", batch.operation.fingerprint, batch.changes)
        == first.window.claims[0].idempotency_key
    )


def test_a_leftover_whose_route_is_gone_is_wanted_by_nobody() -> None:
    plan = plan_leftover(left([change(1), change(2)]), routes=routes_of(orders={"upsert": UPSERT}))

    assert again(plan) == []
    assert ids(plan.filtered) == [1, 2]


def test_a_leftover_whose_operation_is_gone_goes_by_the_one_that_serves_it_now() -> None:
    """A route that was rewritten from upsert to insert and update still wants its changes: none may be lost."""
    routes = routes_of(customers={"insert": INSERT, "update": UPDATE})
    changes = [change(1, operation="insert"), change(2), change(3, operation="snapshot")]

    plan = plan_leftover(left(changes), routes=routes)

    assert again(plan) == [("insert", 2, [1]), ("update", 2, [2]), ("insert", 2, [3])]


def test_a_leftover_that_holds_a_key_twice_is_cut_there_once_its_items_are_judged_one_by_one() -> None:
    """Two answers for one key cannot be told apart: the whole batch would be undecided in each run, for ever."""
    changes = [change(1, "a"), change(2, "b"), change(3, "a"), change(4, "a"), change(5, "b")]
    written = left(changes)
    by_id = {"items": "$.results", "id": "id", "status": "status"}

    plan = plan_leftover(written, routes=routes_of(customers={"mode": "event", "upsert": {**UPSERT, "results": by_id}}))

    assert [ids(batch.changes) for batch in plan.batches] == [[1, 2], [3], [4, 5]]


def test_a_leftover_delete_that_is_no_longer_wanted_is_filtered() -> None:
    plan = plan_leftover(left([change(1, operation="delete")], operation="delete"), routes=UPSERTS)

    assert ids(plan.filtered) == [1]


def test_members_that_the_mapping_of_today_cannot_render_are_dead_and_the_others_go() -> None:
    routes = routes_of(customers={"record": {"name": "$name"}, "upsert": UPSERT})
    plan = plan_leftover(left([change(1), change(2, payload=b'{"name": "b"}')]), routes=routes)

    assert again(plan) == [("upsert", 2, [2])]
    assert [dead.change.change_id for dead in plan.dead] == [1]
