"""A record that a target always answers with a 500 must not look like an outage: the others go on, and it is kept."""

import json
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import pytest

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.report import DrainReport
from pipelines.delivery.sending import RetryPolicy
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, change, no_answer, routes_of
from resources.system_clock import SystemClock

pytestmark = pytest.mark.usefixtures("both_ways")

QUICK = RetryPolicy(initial_backoff=0.001, max_backoff=0.004, max_elapsed=0.05)
BATCHES = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 2}}})
EVENTS = routes_of(customers={"mode": "event", "upsert": {"path": "/rows"}})


def members(request: SentRequest) -> list[dict[str, Any]]:
    document = json.loads(request.body)
    return document if isinstance(document, list) else [document]


def poisoned(*keys: str, with_: Step = 500) -> Callable[[SentRequest], Step]:
    """Answer with a fault whenever one of *keys* is in the request."""
    return lambda request: with_ if any(row["id"] in keys for row in members(request)) else 200


def run(
    ledger: FakeLedger, target: ScriptedTarget, *, routes: Any = BATCHES, lanes: int = 1, **policy: Any
) -> DrainReport:
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        return drain(
            policy=DrainPolicy(target="api", max_in_flight=lanes, **policy),
            routes=routes,
            ledger=target_ledger,
            connect=target.connect,
            clock=ledger._clock,
            limits=DrainLimits(),
        )


def a_ledger(*changes: ChangeRecord, clock: Any = None) -> FakeLedger:
    return FakeLedger(targets={"api": "beginning"}, changes=changes, clock=clock or FakeClock())


def keys_sent(target: ScriptedTarget) -> list[str]:
    return [row["id"] for request in target.sent for row in members(request)]


def accepted_by(target: ScriptedTarget, poison: Collection[str]) -> list[str]:
    return [
        row["id"]
        for request in target.sent
        if not any(row["id"] in poison for row in members(request))
        for row in members(request)
    ]


@pytest.mark.parametrize("fault", [500, 502, 504, no_answer("no answer within 15 s")], ids=str)
@pytest.mark.parametrize("lanes", [1, 4])
def test_what_fails_for_ever_while_others_succeed_is_set_aside_and_they_are_delivered(fault: Step, lanes: int) -> None:
    """With one lane too, where nothing else is sent while the record is tried."""
    clock = FakeClock() if lanes == 1 else SystemClock()
    ledger = a_ledger(*[change(i) for i in range(1, 20)], clock=clock)  # so many that some go by the same lane after it
    target = ScriptedTarget(poisoned("3", with_=fault))

    report = run(ledger, target, lanes=lanes, retry=QUICK, error_timeout=30.0, failure_threshold=1000)

    state, conservation = ledger.states["api"], ledger.conservation("api")
    assert conservation.holds
    assert conservation.dead == 0
    assert 1 <= conservation.claimed <= 2  # the batch of two that it is in
    assert conservation.accepted == 19 - conservation.claimed
    assert (report.end, state.status, state.failed_runs) == ("deferred", "active", 0)
    assert report.reason is not None
    assert "set aside while others are accepted" in report.reason
    assert "drop_on" in report.reason
    # It was always the same bytes under the same key: a 500 may have been applied.
    about_it = [request for request in target.sent if "3" in [row["id"] for row in members(request)]]
    assert len(about_it) > 1
    assert len({(request.key, request.body) for request in about_it}) == 1


def test_the_next_run_tries_it_once_and_delivers_what_is_new() -> None:
    ledger = a_ledger(*[change(i) for i in range(1, 6)])
    target = ScriptedTarget(poisoned("1"))
    run(ledger, target, retry=QUICK)
    ledger.seed([change(i) for i in range(11, 15)])
    before = len(target.sent)

    report = run(ledger, target, retry=QUICK)

    assert keys_sent(target)[-6:] == ["1", "2", "11", "12", "13", "14"]
    assert len(target.sent) == before + 3
    assert report.end == "deferred"
    assert ledger.conservation("api").accepted == 7


def test_it_waits_longer_each_time_and_what_is_new_does_not_wait() -> None:
    clock = FakeClock()
    ledger = a_ledger(change(1, "a"), change(2, "b"), clock=clock)
    target = ScriptedTarget(poisoned("a"))
    waits = []
    for _ in range(6):
        run(ledger, target, routes=EVENTS, retry=QUICK, error_timeout=30.0)
        retry_at = ledger.states["api"].retry_at
        assert retry_at is not None
        waits.append((retry_at - clock.now()) / timedelta(seconds=1))
        [owed] = ledger.owed({"api": ["customers"]})
        assert (owed.has_work, owed.waiting) == (True, True)

    ledger.append("customers", "c")

    assert waits == [30, 60, 120, 240, 300, 300]
    [owed] = ledger.owed({"api": ["customers"]})
    assert (owed.has_work, owed.waiting) == (True, False)


def test_once_it_is_taken_all_is_well() -> None:
    ledger = a_ledger(*[change(i) for i in range(1, 6)])
    run(ledger, ScriptedTarget(poisoned("1")), retry=QUICK)
    target = ScriptedTarget()

    report = run(ledger, target)

    state = ledger.states["api"]
    assert report.end == "caught_up"
    assert keys_sent(target) == ["1", "2"]
    assert (state.retry_at, state.reason) == (None, None)
    assert ledger.conservation("api").accepted == 5


def test_later_changes_of_its_key_wait_with_it_in_this_run_and_in_the_next() -> None:
    """Nothing newer of the key may go first, whether claimed before or after, by this drain or another."""
    ledger = a_ledger(change(1, "a"), change(2, "b"), change(3, "a"), change(4, "c"))
    poison = ScriptedTarget(poisoned("a"))
    run(ledger, poison, routes=EVENTS, retry=QUICK)
    ledger.seed([change(5, "a"), change(6, "b")])
    run(ledger, poison, routes=EVENTS, retry=QUICK, lanes=1)
    well = ScriptedTarget()

    run(ledger, well, routes=EVENTS)

    assert {row["change"] for request in poison.sent for row in members(request) if row["id"] == "a"} == {1}
    assert accepted_by(poison, ["a"]) == ["b", "c", "b"]
    assert [row["change"] for request in well.sent for row in members(request)] == [1, 3, 5]


def test_in_a_batch_only_the_waiting_keys_are_left_out() -> None:
    """What never was sent may go in another request; what was, may not."""
    ledger = a_ledger(*[change(i, key) for i, key in enumerate("axyz", start=1)])
    poison = ScriptedTarget(poisoned("a"))
    run(ledger, poison, retry=QUICK)
    ledger.seed([change(5, "a"), change(6, "b")])

    run(ledger, poison, retry=QUICK)

    assert [members(request) for request in poison.sent][-1] == [{"id": "b", "change": 6}]
    assert ledger.conservation("api").claimed == 3


def test_an_outage_is_told_from_it_by_one_more_request() -> None:
    """All fail: the second batch shows that it is the target, and it is left alone."""
    ledger = a_ledger(*[change(i) for i in range(1, 10)])
    target = ScriptedTarget(then=500)

    report = run(ledger, target, retry=QUICK)

    state = ledger.states["api"]
    assert (report.end, report.reason, state.failed_runs) == ("deferred", "answered 500", 1)
    assert {row["id"] for row in members(target.sent[-1])} == {"3", "4"}
    assert [request.key for request in target.sent].count(target.sent[-1].key) == 1


def test_alone_it_cannot_be_told_from_an_outage() -> None:
    ledger = a_ledger(change(1))

    report = run(ledger, ScriptedTarget(then=500), retry=QUICK)

    state = ledger.states["api"]
    assert (report.end, report.reason, state.failed_runs) == ("deferred", "answered 500", 1)


def test_after_an_outage_it_does_not_stand_for_the_target() -> None:
    """The target was down and is well again, but for one record: others are the probe, and then it is tried too."""
    ledger = a_ledger(*[change(i) for i in range(1, 8)])
    run(ledger, ScriptedTarget(then=500), retry=QUICK)
    assert ledger.states["api"].failed_runs == 1
    target = ScriptedTarget(poisoned("1"))

    report = run(ledger, target, retry=QUICK)

    assert report.end == "deferred"
    assert ledger.states["api"].failed_runs == 0
    assert keys_sent(target) == ["5", "6", "7", "1", "2", "3", "4"]
    assert ledger.conservation("api").accepted == 5


def test_after_an_outage_it_is_the_probe_if_there_is_nothing_else() -> None:
    ledger = a_ledger(change(1))
    run(ledger, ScriptedTarget(then=500), retry=QUICK)
    target = ScriptedTarget(then=500)
    run(ledger, target, retry=QUICK)
    assert len(target.sent) == 1
    assert ledger.states["api"].failed_runs == 2

    report = run(ledger, ScriptedTarget(), retry=QUICK)

    assert report.end == "caught_up"
    assert ledger.states["api"].failed_runs == 0


def test_two_of_them_do_not_keep_a_well_target_from_the_rest() -> None:
    """Also if the target had an outage and both are all that is left over from it."""
    ledger = a_ledger(change(1, "a"), change(2, "b"))
    run(ledger, ScriptedTarget(then=500), routes=EVENTS, retry=RetryPolicy(max_elapsed=0.0))
    run(ledger, ScriptedTarget(then=500), routes=EVENTS, retry=RetryPolicy(max_elapsed=0.0))
    ledger.seed([change(3, "c"), change(4, "d")])
    target = ScriptedTarget(poisoned("a", "b"))

    run(ledger, target, routes=EVENTS, retry=QUICK)
    run(ledger, target, routes=EVENTS, retry=QUICK)

    assert accepted_by(target, ["a", "b"]) == ["c", "d"]
    assert ledger.states["api"].failed_runs == 0


def test_a_record_that_is_put_off_for_ever_within_its_batch_holds_back_no_other() -> None:
    """The batch is answered 207 and one item in it always 503."""
    results: Any = {"items": "$.results", "id": "id", "status": "status"}
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 3}, "results": results}})
    ledger = a_ledger(*[change(i) for i in range(1, 8)])

    def each(request: SentRequest) -> Step:
        listed = [{"id": row["id"], "status": 503 if row["id"] == "2" else 200} for row in members(request)]
        return answer(207, json.dumps({"results": listed}).encode())

    report = run(ledger, ScriptedTarget(each), routes=routes, retry=QUICK)

    conservation = ledger.conservation("api")
    assert (conservation.accepted, conservation.claimed, conservation.dead) == (6, 1, 0)
    assert report.end == "deferred"


def test_drop_on_is_the_way_out() -> None:
    """Who knows that this target says 500 for a record it refuses says so: the batch is halved, the record dead."""
    ledger = a_ledger(*[change(i) for i in range(1, 6)])
    target = ScriptedTarget(poisoned("1"))
    run(ledger, target, retry=QUICK)

    report = run(ledger, target, retry=QUICK, rules=JudgingRules(drop_on=frozenset({500})))

    assert report.end == "caught_up"
    assert [dead.change.key for _, dead in ledger.dead_letters] == ["1"]
    assert ledger.conservation("api").accepted == 4


def test_a_keys_leftovers_of_different_lanes_are_not_sent_side_by_side() -> None:
    """The first was set aside on one lane, and so in flight no more when the second was claimed behind it."""
    ledger = a_ledger(change(1, "a"), *[change(i, f"x{i}") for i in range(2, 20)], clock=SystemClock())
    sick = ScriptedTarget(poisoned("a"))
    run(ledger, sick, routes=EVENTS, lanes=3, retry=QUICK, failure_threshold=1000)
    ledger.seed([change(20, "y20"), change(21, "a"), *[change(i, f"y{i}") for i in range(22, 40)]])
    run(ledger, sick, routes=EVENTS, lanes=3, retry=QUICK, failure_threshold=1000)
    left = [batch for batch in ledger.batches if batch.state == "claimed"]
    assert [batch.change_ids for batch in left] == [(1,), (21,)]
    assert len({batch.lane for batch in left}) == 2
    answered: list[int] = []

    def the_first_takes_long(request: SentRequest) -> Step:
        [row] = members(request)
        time.sleep(0.1 if row["change"] == 1 else 0)
        answered.append(row["change"])
        return 200

    run(ledger, ScriptedTarget(the_first_takes_long), routes=EVENTS, lanes=3)

    assert answered == [1, 21]


def test_one_record_that_fails_again_and_again_does_not_open_the_breaker() -> None:
    """However often it is tried it counts once: else its neighbours would wait for a target that is well."""
    ledger = a_ledger(*[change(i) for i in range(1, 4)])
    target = ScriptedTarget(poisoned("1"))

    report = run(
        ledger, target, routes=EVENTS, retry=RetryPolicy(max_elapsed=60), failure_threshold=3, error_timeout=1000
    )

    assert keys_sent(target).count("1") > 3
    assert accepted_by(target, ["1"]) == ["2", "3"]
    assert report.end == "deferred"
    assert sum(ledger._clock.naps) < 100  # type: ignore[attr-defined]


def test_a_run_that_always_finds_more_to_do_tries_again_what_it_set_aside() -> None:
    """The target was unwell for a minute; the run goes on for much longer."""
    clock = FakeClock()
    ledger = a_ledger(change(1, "a"), change(2, "b"), clock=clock)
    began = clock.monotonic()
    written = 2

    def well_after_a_minute(request: SentRequest) -> Step:
        nonlocal written
        [row] = members(request)
        clock.advance(1)
        if written < 120:
            written += 1
            ledger.seed([change(written, f"x{written}")])
        return 500 if row["id"] == "a" and clock.monotonic() - began < 60 else 200

    target = ScriptedTarget(well_after_a_minute)

    report = run(ledger, target, routes=EVENTS, retry=QUICK, error_timeout=30.0)

    assert report.end == "caught_up"
    assert ledger.conservation("api").accepted == 120
    about_it = [number for number, key in enumerate(keys_sent(target)) if key == "a"]
    assert max(about_it) < 110
    assert (ledger.states["api"].reason, ledger.states["api"].retry_at) == (None, None)
