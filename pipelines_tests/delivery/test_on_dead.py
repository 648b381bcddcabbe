"""What a dead letter means for the later changes of its key: `on_dead: continue`, `block` or `supersede`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.batching import Lanes
from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines.delivery.ledger import Settlement
from pipelines.delivery.outcome import DeadRecord
from pipelines.delivery.planning import plan_window
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import Route
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import LOG_ID, FakeLedger
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, change, routes_of

pytestmark = pytest.mark.usefixtures("both_ways")

RESULTS: Any = {"items": "$.results", "id": "id", "status": "status"}
SHAPES: Mapping[str, Any] = {
    "single": {"path": "/rows"},
    "batch": {"path": "/rows", "batch": {"max_records": 3}},
    "results": {"path": "/rows", "batch": {"max_records": 3}, "results": RESULTS},
}


def routes(on_dead: str, *, mode: str = "event", shape: str = "single") -> Mapping[str, Route]:
    return routes_of(customers={"mode": mode, "on_dead": on_dead, "upsert": SHAPES[shape]})


def members(request: SentRequest) -> list[dict[str, Any]]:
    document = json.loads(request.body)
    return document if isinstance(document, list) else [document]


def refusing(*change_ids: int, shape: str = "single") -> ScriptedTarget:
    """Refuse these changes, whenever they come."""

    def script(request: SentRequest) -> Step:
        rows = members(request)
        if shape == "results":
            listed = [{"id": row["id"], "status": 422 if row["change"] in change_ids else 200} for row in rows]
            return answer(207, json.dumps({"results": listed}).encode())
        return 422 if any(row["change"] in change_ids for row in rows) else 200

    return ScriptedTarget(script)


def run(
    ledger: FakeLedger,
    target: ScriptedTarget,
    routes: Mapping[str, Route],
    *,
    on_progress: Callable[[Any], None] | None = None,
    **limits: Any,
) -> DrainReport:
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        return drain(
            policy=DrainPolicy(target="api", max_in_flight=1, dead_letter_guard=1.0),
            routes=routes,
            ledger=target_ledger,
            connect=target.connect,
            clock=FakeClock(),
            limits=DrainLimits(**limits),
            on_progress=on_progress,
        )


def a_ledger(changes: Sequence[ChangeRecord]) -> FakeLedger:
    return FakeLedger(targets={"api": "beginning"}, changes=changes)


def of_keys(keys: str, *, first: int = 1) -> list[ChangeRecord]:
    """Return a change for each letter, with ids that count up."""
    return [change(i, key) for i, key in enumerate(keys, start=first)]


def open_letters(ledger: FakeLedger) -> dict[int, int | None]:
    """Return the open dead letters, each with the change that it is blocked by."""
    return {record.change.change_id: record.blocked_by for _, record in ledger.open_dead_letters}


def accepted(target: ScriptedTarget, refused: Sequence[int]) -> list[int]:
    sent = [[row["change"] for row in members(request)] for request in target.sent]
    return [one for request in sent if not set(request) & set(refused) for one in request]


def test_continue_sends_the_later_changes_of_a_dead_ones_key() -> None:
    ledger, target = a_ledger(of_keys("abaa")), refusing(1)

    run(ledger, target, routes("continue"))

    assert accepted(target, [1]) == [2, 3, 4]
    assert open_letters(ledger) == {1: None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 100])
def test_block_makes_the_later_changes_of_the_key_wait_as_dead_letters(shape: str, window: int) -> None:
    """Whether they were claimed before the refusal was known or after; other keys go on."""
    ledger, target = a_ledger(of_keys("abaaba")), refusing(1, shape=shape)

    report = run(ledger, target, routes("block", shape=shape), window_records=window)

    assert report.end == "caught_up"
    assert open_letters(ledger) == {1: None, 3: 1, 4: 1, 6: 1}
    sent = [row["change"] for request in target.sent for row in members(request)]
    assert sent.count(2) >= 1
    assert sent.count(5) >= 1
    if shape != "batch":  # a batch that is refused as a whole had them in it, and nothing of it was applied
        assert not {3, 4, 6} & set(sent)
    conservation = ledger.conservation("api")
    assert conservation.holds
    assert (conservation.accepted, conservation.dead) == (2, 4)


def test_block_holds_in_a_later_run_too() -> None:
    ledger = a_ledger(of_keys("ab"))
    run(ledger, refusing(1), routes("block"))
    ledger.seed(of_keys("ab", first=3))
    target = refusing()

    run(ledger, target, routes("block"))

    assert accepted(target, []) == [4]
    assert open_letters(ledger) == {1: None, 3: 1}


def test_a_state_is_blocked_as_an_event_is() -> None:
    ledger = a_ledger(of_keys("ab"))
    run(ledger, refusing(1), routes("block", mode="state"))
    ledger.seed(of_keys("aab", first=3))
    target = refusing()

    run(ledger, target, routes("block", mode="state"))

    assert accepted(target, []) == [5]
    assert open_letters(ledger) == {1: None, 4: 1}


def test_once_its_dead_letters_are_closed_a_key_goes_on() -> None:
    ledger = a_ledger(of_keys("aab"))
    run(ledger, refusing(1), routes("block"))
    for change_id in (1, 2):
        ledger.close_dead_letter("api", change_id)
    ledger.seed(of_keys("a", first=4))
    target = refusing()

    run(ledger, target, routes("block"))

    assert accepted(target, []) == [4]
    assert open_letters(ledger) == {}


def test_a_block_that_is_lifted_while_the_drain_lingers_is_lifted_there() -> None:
    """The lanes remember a refusal only for what was claimed before it was written down."""
    ledger, target = a_ledger(of_keys("ab")), refusing(1)
    redriven = False

    def redrive(_: Any) -> None:
        nonlocal redriven
        if not redriven and open_letters(ledger) == {1: None}:
            redriven = True
            ledger.close_dead_letter("api", 1)
            ledger.seed(of_keys("a", first=3))

    run(ledger, target, routes("block"), on_progress=redrive)

    assert redriven
    assert accepted(target, [1]) == [2, 3]
    assert open_letters(ledger) == {}


def test_leftovers_of_a_blocked_key_are_blocked_too() -> None:
    """The drain died when it had written the refusal down and the later change was still claimed."""
    ledger = a_ledger(of_keys("aa"))
    dying = ScriptedTarget([422, RuntimeError("died")])
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        window = target_ledger.pending(max_records=10, max_bytes=1000)
        plan = plan_window(
            window, log_id=LOG_ID, target="api", routes=routes("block"), lanes=Lanes(), max_records_of=lambda *_: 1
        )
        first, _ = target_ledger.claim(plan.window)
        dead = DeadRecord(change=window.records[0], reason="answered 422")
        target_ledger.settle([Settlement(batch_id=first, dead=[dead])])

    run(ledger, dying, routes("block"))

    assert dying.sent == []
    assert open_letters(ledger) == {1: None, 2: 1}


def test_what_cannot_be_rendered_blocks_its_key_too() -> None:
    strict = routes_of(
        customers={"mode": "event", "on_dead": "block", "record": {"n": "$n"}, "upsert": {"path": "/rows"}}
    )
    broken, sound = change(1, "a", payload=b'{"id": "a"}'), change(2, "a", payload=b'{"id": "a", "n": 1}')
    other = change(3, "b", payload=b'{"id": "b", "n": 2}')
    ledger, target = a_ledger([broken, sound, other]), ScriptedTarget()

    run(ledger, target, strict)

    assert [request.body for request in target.sent] == [b'{"n":2}']
    assert open_letters(ledger) == {1: None, 2: 1}


def test_the_guard_counts_no_record_that_was_only_blocked() -> None:
    """Forty changes wait behind one that was refused: that is no wrong mapping."""
    ledger, target = a_ledger(of_keys("a" * 41)), refusing(1)
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        report = drain(
            policy=DrainPolicy(target="api", max_in_flight=1, dead_letter_guard=0.5),
            routes=routes("block"),
            ledger=target_ledger,
            connect=target.connect,
            clock=FakeClock(),
            limits=DrainLimits(window_records=5),
        )

    assert report.end == "caught_up"
    assert len(target.sent) == 1
    assert len(open_letters(ledger)) == 41


@pytest.mark.parametrize("shape", SHAPES)
def test_supersede_closes_a_dead_letter_with_a_newer_accepted_state(shape: str) -> None:
    ledger = a_ledger(of_keys("ab"))
    run(ledger, refusing(1, 2, shape=shape), routes("supersede", mode="state", shape=shape))
    assert open_letters(ledger) == {1: None, 2: None}
    ledger.seed(of_keys("ac", first=3))

    run(ledger, refusing(shape=shape), routes("supersede", mode="state", shape=shape))

    assert open_letters(ledger) == {2: None}
    assert ledger.conservation("api").holds


def test_a_newer_state_that_is_refused_as_well_closes_nothing() -> None:
    ledger = a_ledger(of_keys("a"))
    run(ledger, refusing(1), routes("supersede", mode="state"))
    ledger.seed(of_keys("a", first=2))

    run(ledger, refusing(2), routes("supersede", mode="state"))

    assert open_letters(ledger) == {1: None, 2: None}


def test_without_supersede_a_newer_state_closes_nothing() -> None:
    ledger = a_ledger(of_keys("a"))
    run(ledger, refusing(1), routes("continue", mode="state"))
    ledger.seed(of_keys("a", first=2))

    run(ledger, refusing(), routes("continue", mode="state"))

    assert open_letters(ledger) == {1: None}
