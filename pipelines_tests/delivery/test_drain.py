"""One target's drain: what the target was sent, and what the ledger holds after, for every way a run can go."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.clock import Clock
from pipelines.delivery.drain import DrainLimits, DrainPolicy, RateLimit, drain, window_for
from pipelines.delivery.ledger import Leftover, PendingWindow, Settlement
from pipelines.delivery.report import DrainReport, Recorder
from pipelines.delivery.routing import Route
from pipelines.delivery.sending import RetryPolicy
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger, FakeLockLost, FakeTargetLedger
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, change, no_answer, routes_of
from resources.system_clock import SystemClock

pytestmark = pytest.mark.usefixtures("both_ways")

UPSERT: Any = {"path": "/rows", "batch": {"max_records": 3}}
RESULTS: Any = {"items": "$.results", "id": "id", "status": "status"}
ROUTES = routes_of(customers={"upsert": UPSERT, "delete": {"path": "/rows/${_key}"}})
SINGLY = routes_of(customers={"mode": "event", "upsert": {"path": "/rows"}})
QUICK = RetryPolicy(initial_backoff=0.001, max_backoff=0.004, max_elapsed=0.1)


def a_ledger(changes: int | Sequence[ChangeRecord] = 0, *, clock: Clock | None = None) -> FakeLedger:
    if isinstance(changes, int):
        changes = [change(i) for i in range(1, changes + 1)]
    return FakeLedger(targets={"api": "beginning"}, changes=changes, clock=clock or FakeClock())


def run(
    ledger: FakeLedger,
    target: ScriptedTarget,
    *,
    routes: Mapping[str, Route] = ROUTES,
    clock: Clock | None = None,
    limits: DrainLimits | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[Recorder], None] | None = None,
    **policy: Any,
) -> DrainReport:
    """Drain once. One lane, unless asked for more: an instant clock is sound only with one."""
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        return drain(
            policy=DrainPolicy(target="api", **{"max_in_flight": 1, **policy}),
            routes=routes,
            ledger=target_ledger,
            connect=target.connect,
            clock=clock or ledger._clock,
            limits=limits or DrainLimits(),
            stop=stop,
            on_progress=on_progress,
        )


def members(request: SentRequest) -> list[int]:
    """Return the change ids in a request's body."""
    if not request.body:
        return []
    document = json.loads(request.body)
    return [row["change"] for row in (document if isinstance(document, list) else [document])]


def all_members(target: ScriptedTarget) -> list[int]:
    return [one for request in target.sent for one in members(request)]


def dead_ids(ledger: FakeLedger) -> list[int]:
    return [dead.change.change_id for _, dead in ledger.dead_letters]


def assert_conserved(ledger: FakeLedger, **counts: int) -> None:
    """Every captured change is somewhere, and those named by *counts* are where they should be."""
    conservation = ledger.conservation("api")
    assert conservation.holds, conservation
    assert {name: getattr(conservation, name) for name in counts} == counts


# All is well ----------------------------------------------------------------------------------------------------------


def test_everything_that_is_owed_is_delivered_in_order_and_settled() -> None:
    ledger, target = a_ledger(7), ScriptedTarget()

    report = run(ledger, target)

    assert [members(request) for request in target.sent] == [[1, 2, 3], [4, 5, 6], [7]]
    assert_conserved(ledger, accepted=7, pending=0, claimed=0)
    assert [batch.state for batch in ledger.batches] == ["settled"] * 3
    assert (report.end, report.reason, report.total("accepted")) == ("caught_up", None, 7)
    assert (report.requests, report.retries) == (3, 0)
    assert report.latency_p50 == 0.01
    assert report.lag_p50 is not None


def test_a_request_goes_out_under_the_key_that_was_claimed() -> None:
    ledger, target = a_ledger(7), ScriptedTarget()

    run(ledger, target)

    assert target.keys == [batch.idempotency_key for batch in ledger.batches]


def test_a_target_that_is_owed_nothing_is_not_even_connected_to() -> None:
    ledger, target = a_ledger(), ScriptedTarget()

    report = run(ledger, target)

    assert report.end == "caught_up"
    assert (target.connected, target.sent) == (0, [])


def test_every_lanes_client_is_closed() -> None:
    ledger, target = a_ledger(20, clock=SystemClock()), ScriptedTarget()

    run(ledger, target, max_in_flight=4)

    assert (target.connected, target.closed) == (4, 4)
    assert sorted(all_members(target)) == list(range(1, 21))


def test_superseded_and_filtered_changes_are_settled_and_never_sent() -> None:
    ledger = a_ledger([change(1, "a"), change(2, "a"), change(3, "b", stream="unrouted"), change(4, "c")])
    target = ScriptedTarget()

    report = run(ledger, target)

    assert all_members(target) == [2, 4]
    assert_conserved(ledger, accepted=2, superseded=1, filtered=1, pending=0)
    assert (report.total("superseded"), report.total("filtered")) == (1, 1)


def test_gaps_that_nothing_can_fill_are_closed() -> None:
    ledger = a_ledger(clock=FakeClock())
    ledger.append("customers", "a", payload=b'{"change": 1}')
    lost = ledger.begin()
    lost.append("customers", "b")
    lost.rollback()
    ledger.append("customers", "c", payload=b'{"change": 3}')

    run(ledger, ScriptedTarget())

    assert ledger.settled["api"] >= {1, 2, 3}


def test_a_late_commit_is_delivered_though_later_ids_are_settled() -> None:
    ledger, target = a_ledger(clock=FakeClock()), ScriptedTarget()
    late = ledger.begin()
    late.append("customers", "a", payload=b'{"change": 1}')
    ledger.append("customers", "b", payload=b'{"change": 2}')
    run(ledger, target)

    late.commit()
    run(ledger, target)

    assert all_members(target) == [2, 1]
    assert_conserved(ledger, accepted=2, pending=0)


def test_a_rate_limit_holds_all_requests_to_it() -> None:
    clock = FakeClock()
    ledger = a_ledger(12, clock=clock)

    run(ledger, ScriptedTarget(), rate_limit=RateLimit(requests_per_second=2, burst=1))

    assert sum(clock.naps) == pytest.approx(1.5)


def test_progress_is_told_with_every_commit() -> None:
    seen: list[int] = []

    run(a_ledger(7), ScriptedTarget(), on_progress=lambda recorder: seen.append(recorder.requests))

    assert seen[-1] == 3


# Whose fault: what the ledger holds after -----------------------------------------------------------------------------

FIVE = [change(i) for i in range(1, 6)]


@pytest.mark.parametrize(
    "fault",
    [
        no_answer("cannot connect", may_have_arrived=False),
        no_answer("no answer within 15 s"),
        *(408, 425, 429, 500, 502, 503, 504),
    ],
    ids=str,
)
def test_a_target_that_is_down_defers_with_its_claims_and_blames_no_record(fault: Step) -> None:
    clock = FakeClock()
    ledger, target = a_ledger(FIVE, clock=clock), ScriptedTarget(then=fault)

    report = run(ledger, target)

    state = ledger.states["api"]
    assert report.end == "deferred"
    assert report.reason
    assert (state.status, state.failed_runs) == ("active", 1)
    assert state.retry_at is not None
    assert state.retry_at - clock.now() == timedelta(seconds=30)
    assert_conserved(ledger, accepted=0, dead=0, claimed=5, pending=0)
    # At most one other batch was sent, to see whether it is the target or the first batch's records.
    assert len({(request.key, request.body) for request in target.sent}) <= 2
    assert len({request.key for request in target.sent}) == len({request.body for request in target.sent})


def test_a_retry_after_is_kept_to_across_runs() -> None:
    clock = FakeClock()
    ledger = a_ledger(FIVE, clock=clock)

    run(ledger, ScriptedTarget(then=answer(503, headers={"retry-after": "900"})))

    retry_at = ledger.states["api"].retry_at
    assert retry_at is not None
    assert retry_at - clock.now() == timedelta(seconds=900)


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_pause_the_target_and_blame_no_record(status: int) -> None:
    clock = FakeClock()
    ledger, target = a_ledger(FIVE, clock=clock), ScriptedTarget(then=status)

    report = run(ledger, target, probe_interval=200.0)

    state = ledger.states["api"]
    assert report.end == "paused"
    assert len(target.sent) == 1
    assert (state.status, state.reason) == ("paused", report.reason)
    assert "credentials" in (state.reason or "")
    assert state.retry_at == clock.now() + timedelta(seconds=200)
    assert_conserved(ledger, accepted=0, dead=0, claimed=5)


@pytest.mark.parametrize("status", [301, 302, 404, 405])
def test_a_wrong_configuration_pauses_the_target_and_blames_no_record(status: int) -> None:
    ledger, target = a_ledger(FIVE), ScriptedTarget(then=status)

    report = run(ledger, target)

    assert report.end == "paused"
    assert len(target.sent) == 1
    assert ledger.states["api"].status == "paused"
    assert ledger.states["api"].retry_at is not None
    assert_conserved(ledger, accepted=0, dead=0, claimed=5)


def test_a_collection_that_is_gone_disables_the_target() -> None:
    ledger = a_ledger(FIVE)

    report = run(ledger, ScriptedTarget(then=410))

    state = ledger.states["api"]
    assert (report.end, state.status, state.retry_at) == ("paused", "disabled", None)
    assert_conserved(ledger, accepted=0, dead=0, claimed=5)


@pytest.mark.parametrize("status", [400, 409, 422])
def test_a_record_that_is_refused_becomes_a_dead_letter_and_the_next_goes_on(status: int) -> None:
    ledger = a_ledger(FIVE)
    target = ScriptedTarget(lambda request: answer(status, b"bad e-mail") if members(request) == [3] else 200)

    report = run(ledger, target, routes=SINGLY)

    assert all_members(target) == [1, 2, 3, 4, 5]
    ((name, dead),) = ledger.dead_letters
    assert (name, dead.change.change_id, dead.status, dead.response) == ("api", 3, status, "bad e-mail")
    assert_conserved(ledger, accepted=4, dead=1, claimed=0, pending=0)
    assert report.end == "caught_up"
    assert report.refusals == {f"answered {status}": 1}
    assert ledger.states["api"].status == "active"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_batch_that_is_refused_loses_only_its_bad_record(status: int) -> None:
    ledger = a_ledger(9)
    target = ScriptedTarget(lambda request: status if 5 in members(request) else 200)

    report = run(ledger, target)

    assert dead_ids(ledger) == [5]
    assert_conserved(ledger, accepted=8, dead=1, claimed=0, pending=0)
    assert report.end == "caught_up"


def test_after_a_413_the_batches_are_smaller() -> None:
    """For the rest of the run: the target is not asked for what it will refuse."""
    ledger = a_ledger(60)
    target = ScriptedTarget(lambda request: 413 if len(members(request)) > 2 else 200)
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 10}}})

    run(ledger, target, routes=routes, limits=DrainLimits(window_records=20))

    assert_conserved(ledger, accepted=60, dead=0)
    assert max(len(members(request)) for request in target.sent if members(request)[0] > 40) <= 2


def test_results_per_item_settle_each_record_for_itself() -> None:
    """A 2xx with failures in it is not a success of the batch, and its failures are not the others'."""
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 5}, "results": RESULTS}})

    def script(request: SentRequest) -> Step:
        fate = {2: 422, 4: 503 if request.number == 0 else 201}
        results = [{"id": row["id"], "status": fate.get(row["change"], 200)} for row in json.loads(request.body)]
        return answer(207, json.dumps({"results": results}).encode())

    ledger, target = a_ledger(FIVE), ScriptedTarget(script)

    report = run(ledger, target, routes=routes)

    assert [members(request) for request in target.sent] == [[1, 2, 3, 4, 5], [4]]
    assert dead_ids(ledger) == [2]
    assert_conserved(ledger, accepted=4, dead=1, claimed=0)
    assert report.end == "caught_up"


def test_deleting_what_is_gone_already_is_accepted() -> None:
    ledger = a_ledger([change(1, operation="delete")])

    run(ledger, ScriptedTarget([404]))

    assert_conserved(ledger, accepted=1, dead=0)


@pytest.mark.parametrize(("operation", "refusal"), [("insert", 409), ("update", 404)])
def test_an_api_without_upserts_is_tried_the_other_way_round(operation: Any, refusal: int) -> None:
    routes = routes_of(
        customers={
            "insert": {"path": "/rows", "on_conflict": "update"},
            "update": {"path": "/rows/${_key}", "on_missing": "insert"},
        }
    )
    ledger, target = a_ledger([change(1, operation=operation)]), ScriptedTarget([refusal, 200])

    run(ledger, target, routes=routes)

    assert len(target.sent) == 2
    assert_conserved(ledger, accepted=1, dead=0)


# The dead-letter guard ------------------------------------------------------------------------------------------------


def test_a_mapping_that_the_target_refuses_stops_before_it_buries_everything() -> None:
    ledger, target = a_ledger(500), ScriptedTarget(then=422)

    report = run(ledger, target, routes=SINGLY)

    assert report.end == "paused"
    assert "mapping" in (report.reason or "")
    assert (ledger.states["api"].status, ledger.states["api"].retry_at) == ("paused", None)
    assert len(target.sent) == 20
    assert_conserved(ledger, dead=20, accepted=0)


def test_a_mapping_that_no_row_fits_buries_nothing() -> None:
    routes = routes_of(customers={"record": {"name": "$nmae"}, "upsert": UPSERT})
    ledger, target = a_ledger(100), ScriptedTarget()

    report = run(ledger, target, routes=routes)

    assert report.end == "paused"
    assert "100 of 100 records cannot be rendered" in (report.reason or "")
    assert target.sent == []
    assert_conserved(ledger, dead=0, pending=100, claimed=0)


def test_some_rows_that_do_not_fit_are_buried_and_the_others_go() -> None:
    """Thirty in a window of a thousand are thirty bad rows, not a wrong mapping."""
    bad = set(range(10, 40))
    changes = [change(i, payload=b"{}" if i in bad else b'{"name": 1, "change": %d}' % i) for i in range(1, 1001)]
    routes = routes_of(customers={"record": {"name": "$name", "change": "$change"}, "upsert": UPSERT})
    ledger = a_ledger(changes)

    report = run(ledger, ScriptedTarget(), routes=routes)

    assert report.end == "caught_up"
    assert set(dead_ids(ledger)) == bad
    assert_conserved(ledger, accepted=970, dead=30)


def test_a_new_mapping_that_no_leftover_fits_buries_nothing() -> None:
    ledger = a_ledger(60)
    run(ledger, ScriptedTarget(then=503))
    routes = routes_of(customers={"record": {"name": "$nmae"}, "upsert": UPSERT})

    report = run(ledger, ScriptedTarget(), routes=routes)

    assert report.end == "paused"
    assert_conserved(ledger, dead=0, claimed=60)


# The breaker across runs ----------------------------------------------------------------------------------------------


def test_an_unwell_target_gets_one_request_whatever_the_lanes() -> None:
    """Many leftovers on many lanes, and still one probe: the run is over if it fails."""
    clock = SystemClock()
    ledger, target = a_ledger(30, clock=clock), ScriptedTarget(then=503)
    run(ledger, target, max_in_flight=4, retry=QUICK, failure_threshold=2, error_timeout=0.01)
    before = len(target.sent)

    report = run(ledger, target, max_in_flight=4, retry=QUICK, failure_threshold=2, error_timeout=0.01)

    assert len(target.sent) == before + 1
    assert report.end == "deferred"
    assert ledger.states["api"].failed_runs == 2
    assert_conserved(ledger, accepted=0, dead=0)


def test_the_longer_a_target_is_down_the_rarer_it_is_tried() -> None:
    clock = FakeClock()
    ledger, target = a_ledger(3, clock=clock), ScriptedTarget(then=503)
    holds = []
    for _ in range(6):
        run(ledger, target, error_timeout=30.0)
        retry_at = ledger.states["api"].retry_at
        assert retry_at is not None
        holds.append((retry_at - clock.now()).total_seconds())

    assert holds == [30, 60, 120, 240, 300, 300]


def test_a_probe_that_succeeds_makes_the_target_well_and_all_is_delivered() -> None:
    ledger, target = a_ledger(9), ScriptedTarget(then=503)
    run(ledger, target)
    target = ScriptedTarget()

    report = run(ledger, target)

    state = ledger.states["api"]
    assert report.end == "caught_up"
    assert (state.status, state.failed_runs, state.retry_at, state.reason) == ("active", 0, None, None)
    assert_conserved(ledger, accepted=9, claimed=0, pending=0)


def test_a_refused_record_is_a_sign_of_life_for_a_probe() -> None:
    ledger = a_ledger(3)
    run(ledger, ScriptedTarget(then=503), routes=SINGLY)

    run(ledger, ScriptedTarget([422]), routes=SINGLY)

    assert ledger.states["api"].failed_runs == 0
    assert_conserved(ledger, accepted=2, dead=1)


@pytest.mark.parametrize("status", [401, 404, 410])
def test_a_paused_target_resumes_by_itself_once_it_is_well(status: int) -> None:
    """Disabled ones too, once a run names them: the plan chooses no others."""
    ledger = a_ledger(3)
    left = run(ledger, ScriptedTarget(then=status))
    assert left.end == "paused"

    report = run(ledger, ScriptedTarget())

    assert report.end == "caught_up"
    assert ledger.states["api"].status == "active"
    assert_conserved(ledger, accepted=3)


def test_a_paused_target_that_is_still_unwell_gets_one_request() -> None:
    ledger, target = a_ledger(9), ScriptedTarget(then=401)
    run(ledger, target)

    run(ledger, target)

    assert len(target.sent) == 2
    assert (ledger.states["api"].status, ledger.states["api"].failed_runs) == ("paused", 2)


def test_a_relapse_is_counted_from_the_recovery() -> None:
    """It was well in between: the hold starts small again."""
    clock = FakeClock()
    ledger = a_ledger(9, clock=clock)
    for _ in range(4):
        run(ledger, ScriptedTarget(then=503))

    run(ledger, ScriptedTarget([200, 200], then=503))

    state = ledger.states["api"]
    assert state.failed_runs == 1
    assert state.retry_at is not None
    assert state.retry_at - clock.now() == timedelta(seconds=30)


def test_an_unwell_target_that_is_owed_nothing_is_left_alone() -> None:
    ledger = a_ledger()
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        target_ledger.hold(status="paused", reason="answered 401", failed_runs=3, retry_in=None)
    target = ScriptedTarget()

    run(ledger, target)

    assert target.sent == []
    assert ledger.states["api"].status == "paused"


# Stopping -------------------------------------------------------------------------------------------------------------


def test_a_graceful_stop_finishes_what_is_in_flight_and_claims_nothing_new() -> None:
    stop = threading.Event()

    def script(request: SentRequest) -> Step:
        if request.number == 1:
            stop.set()
            time.sleep(0.12)  # long enough for the loop to see it while this request is out
        return 200

    ledger, target = a_ledger(100), ScriptedTarget(script)

    report = run(ledger, target, stop=stop, limits=DrainLimits(window_records=12))

    assert report.end == "stopped"
    assert all_members(target) == [1, 2, 3, 4, 5, 6]
    assert_conserved(ledger, accepted=6, dead=0)
    assert len(ledger.batches) <= 6
    assert ledger.states["api"].status == "active"
    assert ledger.states["api"].failed_runs == 0


def test_after_a_stop_the_next_run_sends_the_rest_and_nothing_twice() -> None:
    stop = threading.Event()

    def script(request: SentRequest) -> Step:
        if request.number == 2:
            stop.set()
        return 200

    ledger, target = a_ledger(50), ScriptedTarget(script)
    run(ledger, target, stop=stop)

    run(ledger, target)

    assert sorted(all_members(target)) == list(range(1, 51))
    assert_conserved(ledger, accepted=50)


def test_a_run_that_was_told_to_stop_before_it_began_ends_stopped() -> None:
    stop = threading.Event()
    stop.set()
    ledger, target = a_ledger(5), ScriptedTarget()

    report = run(ledger, target, stop=stop)

    assert (report.end, target.sent) == ("stopped", [])
    assert_conserved(ledger, pending=5)


def test_max_seconds_end_a_run_in_the_same_way() -> None:
    clock = FakeClock()

    def script(_: SentRequest) -> Step:
        clock.advance(4.0)
        return 200

    ledger = a_ledger(100, clock=clock)
    target = ScriptedTarget(script)

    report = run(ledger, target, limits=DrainLimits(max_seconds=10.0, window_records=6))

    assert report.end == "stopped"
    assert "max_seconds (10)" in (report.reason or "")
    assert len(target.sent) < 34
    assert_conserved(ledger, accepted=report.total("accepted"), dead=0)


def test_a_stop_wakes_a_lane_that_waits_for_its_target() -> None:
    """A Retry-After of minutes is not sat out by a run that was cancelled."""
    clock = SystemClock()
    stop = threading.Event()

    def script(_: SentRequest) -> Step:
        threading.Timer(0.05, stop.set).start()
        return answer(503, headers={"retry-after": "500"})

    ledger = a_ledger(5, clock=clock)
    started = time.monotonic()

    report = run(ledger, ScriptedTarget(script), stop=stop, retry=RetryPolicy(max_elapsed=1000.0))

    assert report.end == "stopped"
    assert time.monotonic() - started < 60
    assert_conserved(ledger, claimed=5)
    state = ledger.states["api"]
    assert state.retry_at is not None
    assert state.retry_at - clock.now() > timedelta(seconds=400), "the next run keeps to what is left of it"
    assert state.failed_runs == 1, "so that what is pending does not bring it back at once"


def test_a_drain_that_has_caught_up_lingers_for_more() -> None:
    clock = SystemClock()
    ledger, target = a_ledger(1, clock=clock), ScriptedTarget()

    def append() -> None:
        ledger.append("customers", "late", payload=b'{"change": 2}')

    threading.Timer(0.05, append).start()
    report = run(ledger, target, limits=DrainLimits(linger_seconds=0.3, poll_seconds=0.01))

    assert all_members(target) == [1, 2]
    assert report.end == "caught_up"
    assert report.seconds < 0.3


# Leftovers ------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The lane's thread dies: as good as a killed process, for the ledger."""


def test_a_lanes_exception_surfaces_and_leaves_the_claims() -> None:
    ledger, target = a_ledger(9), ScriptedTarget([200, Crash("lane")])

    with pytest.raises(Crash, match="lane"):
        run(ledger, target)

    assert_conserved(ledger, accepted=3, claimed=6, dead=0)
    assert target.closed == target.connected


def test_leftovers_are_sent_first_as_they_were_written_under_their_old_keys() -> None:
    """Whatever became pending meanwhile, and of the same key too."""
    ledger, target = a_ledger(6), ScriptedTarget([Crash()])
    with pytest.raises(Crash):
        run(ledger, target)
    claimed = [(batch.change_ids, batch.idempotency_key) for batch in ledger.batches]
    ledger.append("customers", "2", payload=b'{"id": "2", "change": 7}')
    again = ScriptedTarget()

    run(ledger, again)

    assert (again.sent[0].key, again.sent[0].body) == (target.sent[0].key, target.sent[0].body)
    assert [(tuple(members(request)), request.key) for request in again.sent[:2]] == claimed
    assert [members(request) for request in again.sent] == [[1, 2, 3], [4, 5, 6], [7]]
    assert_conserved(ledger, accepted=7, claimed=0, superseded=0)


def test_nothing_new_goes_out_while_a_leftover_is_not_delivered() -> None:
    ledger = a_ledger(3)
    run(ledger, ScriptedTarget(then=503))
    ledger.append("customers", "9", payload=b'{"change": 4}')
    target = ScriptedTarget([200], then=503)
    ledger.append("customers", "8", payload=b'{"change": 5}')

    first = ScriptedTarget(then=503)
    run(ledger, first)
    assert all_members(first) == [1, 2, 3]

    run(ledger, target)
    assert members(target.sent[0]) == [1, 2, 3]
    assert_conserved(ledger, accepted=3, claimed=2)


def test_only_what_is_still_unsettled_of_a_batch_is_sent_again() -> None:
    """Half of it was known when the target went down."""
    ledger = a_ledger(4)
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 4}}})
    run(ledger, ScriptedTarget([400, 200], then=503), routes=routes)
    target = ScriptedTarget()

    run(ledger, target, routes=routes)

    assert [members(request) for request in target.sent] == [[3, 4]]
    assert [batch.state for batch in ledger.batches] == ["split", "settled", "settled"]
    assert_conserved(ledger, accepted=4)


def test_leftovers_of_a_route_that_is_gone_are_filtered() -> None:
    ledger = a_ledger(3)
    run(ledger, ScriptedTarget(then=503))
    target = ScriptedTarget()

    report = run(ledger, target, routes=routes_of(orders={"upsert": UPSERT}))

    assert (report.end, target.sent) == ("caught_up", [])
    assert [batch.state for batch in ledger.batches] == ["settled"]
    assert_conserved(ledger, filtered=3, claimed=0)


def test_leftovers_of_an_operation_that_is_gone_are_delivered_by_the_one_in_its_place() -> None:
    ledger = a_ledger([change(1, operation="insert"), change(2)])
    run(ledger, ScriptedTarget(then=503))
    target = ScriptedTarget()
    routes = routes_of(customers={"insert": {"path": "/rows"}, "update": {"path": "/rows/${_key}"}})

    run(ledger, target, routes=routes)

    assert [(request.request.method, request.path) for request in target.sent] == [
        ("POST", "/rows"),
        ("PATCH", "/rows/2"),
    ]
    assert [batch.state for batch in ledger.batches] == ["split", "settled", "settled"]
    assert_conserved(ledger, accepted=2, filtered=0, claimed=0)


@pytest.mark.parametrize("batch", [{}, {"batch": {"max_records": 2}}])
def test_a_refusal_is_written_down_before_a_later_change_of_its_key_goes_out(batch: dict[str, Any]) -> None:
    """Lost with the drain, it would be tried again after the later one, and might be accepted then."""
    ledger = a_ledger([change(1, "a"), change(2, "a"), change(3, "a")])
    routes = routes_of(customers={"mode": "event", "upsert": {"path": "/rows", **batch}})
    dead_before: list[list[int]] = []

    def script(request: SentRequest) -> Step:
        dead_before.append(dead_ids(ledger))
        return 400 if 1 in members(request) else 200

    run(ledger, ScriptedTarget(script), routes=routes, dead_letter_guard=1.0)

    alone = [[], [1], [1]]
    halved = [[], [], [1], [1]]
    assert dead_before == (halved if batch else alone)
    assert_conserved(ledger, accepted=2, dead=1)


def test_leftovers_of_a_batch_go_one_by_one_where_a_request_now_takes_one_record() -> None:
    ledger = a_ledger(3)
    run(ledger, ScriptedTarget(then=503))
    target = ScriptedTarget()

    run(ledger, target, routes=SINGLY)

    assert [members(request) for request in target.sent] == [[1], [2], [3]]
    assert [batch.state for batch in ledger.batches] == ["split", "settled", "settled", "settled"]
    assert_conserved(ledger, accepted=3, claimed=0)


def test_leftovers_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """More may have been set aside than a window holds."""
    ledger = a_ledger(30)
    run(ledger, ScriptedTarget(then=503), limits=DrainLimits(window_records=30))
    parts: list[int] = []
    target = ScriptedTarget()
    read = FakeTargetLedger.leftovers

    def watched(self: FakeTargetLedger, **bounds: int) -> Iterator[Sequence[Leftover]]:
        for part in read(self, **bounds):
            assert len(all_members(target)) == sum(parts), "the part before is delivered first"
            parts.append(sum(len(left.changes) for left in part))
            yield part

    monkeypatch.setattr(FakeTargetLedger, "leftovers", watched)
    run(ledger, target, limits=DrainLimits(window_records=12))

    assert parts == [6, 6, 6, 6, 6]
    assert_conserved(ledger, accepted=30, claimed=0)


def test_fewer_lanes_than_before_take_over_the_leftovers_of_all() -> None:
    clock = SystemClock()
    ledger = a_ledger(30, clock=clock)
    with pytest.raises(Crash):
        run(ledger, ScriptedTarget(then=Crash()), max_in_flight=8)
    target = ScriptedTarget()

    run(ledger, target, max_in_flight=3)

    assert sorted(all_members(target)) == list(range(1, 31))
    assert_conserved(ledger, accepted=30)


def test_a_new_change_waits_for_the_leftovers_of_every_lane() -> None:
    """With another number of lanes a key's leftover may be in another lane than its next change."""
    clock = SystemClock()
    ledger = a_ledger(30, clock=clock)
    with pytest.raises(Crash):
        run(ledger, ScriptedTarget(then=Crash()), max_in_flight=8)
    for key in range(1, 31):
        ledger.append("customers", str(key), payload=b'{"change": %d}' % (30 + key))

    def script(request: SentRequest) -> Step:
        time.sleep(0.02 if request.lane == "lane-1" else 0)  # the others are done with theirs long before
        return 200

    target = ScriptedTarget(script)
    run(ledger, target, max_in_flight=3)

    assert sorted(all_members(target)[:30]) == list(range(1, 31))
    assert_conserved(ledger, accepted=60)


# Broken things --------------------------------------------------------------------------------------------------------


def test_a_lost_lock_surfaces_and_nothing_more_is_written() -> None:
    """Another drain may have the target by now."""
    ledger = a_ledger(9)

    def script(request: SentRequest) -> Step:
        if request.number == 0:
            ledger.break_lock("api")
        return 200

    with pytest.raises(FakeLockLost):
        run(ledger, ScriptedTarget(script))

    assert_conserved(ledger, accepted=0, claimed=9)


def test_after_a_ledgers_failure_the_lanes_send_nothing_more() -> None:
    ledger = a_ledger(300, clock=SystemClock())

    def script(request: SentRequest) -> Step:
        if request.number == 0:
            ledger.break_lock("api")
        time.sleep(0.002)
        return 200

    target = ScriptedTarget(script)
    with pytest.raises(FakeLockLost):
        run(ledger, target)

    assert len(target.sent) < 50
    assert target.closed == target.connected


def test_a_client_that_cannot_be_made_surfaces() -> None:
    class Broken(ScriptedTarget):
        def connect(self) -> Any:
            raise OSError("no certificates")

    ledger = a_ledger(3)

    with pytest.raises(OSError, match="no certificates"):
        run(ledger, Broken())

    assert_conserved(ledger, claimed=3)


def test_what_the_other_lanes_brought_is_settled_before_an_exception_surfaces() -> None:
    """An accepted batch that is known is not sent a second time for another lane's sake."""
    clock = SystemClock()
    ledger = a_ledger(40, clock=clock)
    crash_now, crashed = threading.Event(), threading.Event()
    of_a: list[int] = []

    def script(request: SentRequest) -> Step:
        if request.lane == "lane-1":
            crash_now.wait(10)
            crashed.set()
            return Crash()
        of_a.append(members(request)[0])
        if len(of_a) == 3:
            crash_now.wait(10)
        return 200

    def on_progress(_: Recorder) -> None:
        # The loop stands here while both lanes bring their results: it will find them together.
        crash_now.set()
        crashed.wait(10)
        while any(thread.name == "lane-1" for thread in threading.enumerate()):
            time.sleep(0.001)

    with pytest.raises(Crash):
        run(ledger, ScriptedTarget(script), routes=SINGLY, max_in_flight=2, on_progress=on_progress)

    assert ledger.conservation("api").accepted >= 2
    assert {of_a[0], of_a[1]} <= ledger.settled["api"]


def test_what_lanes_are_told_while_the_drain_ends_is_settled_too() -> None:
    """One lane breaks while another waits for its answer, which comes: it is known, and must not be asked for again."""
    ledger = a_ledger(40, clock=SystemClock())
    asked, crashed = threading.Event(), threading.Event()

    def script(request: SentRequest) -> Step:
        if request.lane == "lane-1":
            asked.wait(10)
            crashed.set()
            return Crash()
        asked.set()
        crashed.wait(10)
        time.sleep(0.2)
        return 200

    target = ScriptedTarget(script)
    with pytest.raises(Crash):
        run(ledger, target, routes=SINGLY, max_in_flight=2)

    answered = {one for request in target.sent if request.lane != "lane-1" for one in members(request)}
    assert answered
    assert answered <= ledger.settled["api"]


def test_outcomes_that_nobody_waits_for_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit for each of a slow target's answers costs more than all else; what is held for it stays bounded."""
    ledger = a_ledger(60)  # on a clock that stands still, so that it is never time for one
    commits: list[int] = []
    working = FakeTargetLedger.settle

    def counted(self: FakeTargetLedger, settlements: Sequence[Settlement]) -> None:
        commits.append(sum(len(one.accepted) for one in settlements))
        working(self, settlements)

    monkeypatch.setattr(FakeTargetLedger, "settle", counted)
    run(ledger, ScriptedTarget(), routes=SINGLY, limits=DrainLimits(window_records=40))

    assert_conserved(ledger, accepted=60)
    assert sum(commits) == 60
    assert max(commits) <= 40
    assert len(commits) <= 12


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many records each window was asked to hold, as they are asked for."""
    asked: list[int] = []
    working = FakeTargetLedger.pending

    def noted(self: FakeTargetLedger, *, max_records: int, max_bytes: int) -> PendingWindow:
        asked.append(max_records)
        return working(self, max_records=max_records, max_bytes=max_bytes)

    monkeypatch.setattr(FakeTargetLedger, "pending", noted)
    return asked


def test_the_lanes_are_given_a_little_before_windows_grow(asked: list[int]) -> None:
    """While the whole of a first window is read and planned, nothing would be sent."""
    ledger = a_ledger(9_000)
    run(ledger, ScriptedTarget(), limits=DrainLimits(window_records=3_000))

    assert_conserved(ledger, accepted=9_000)
    assert asked[:2] == [1_000, 2_000]
    assert max(asked) <= 3_000


def test_a_refusal_is_written_at_once() -> None:
    """Its lane waits for that."""
    ledger = a_ledger(30)
    settled_by_then: list[int] = []

    def script(request: SentRequest) -> Step:
        if members(request) == [5]:
            return 422
        if members(request) == [6]:
            settled_by_then.extend(ledger.settled["api"])
        return 200

    run(ledger, ScriptedTarget(script), routes=SINGLY)

    assert set(settled_by_then) >= {1, 2, 3, 4, 5}


def test_no_later_outcome_of_a_key_is_written_without_the_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit fails while the key's next change is on its way, and the one after that does not.

    Were only the later one settled, the next drain would send the earlier state again, after the later.
    """
    ledger = a_ledger([change(1, "a"), change(2, "a")], clock=SystemClock())
    sent, failed = threading.Event(), threading.Event()
    working = FakeTargetLedger.settle

    def fail_once(self: FakeTargetLedger, settlements: Sequence[Settlement]) -> None:
        if failed.is_set():
            working(self, settlements)
            return
        assert sent.wait(10)
        failed.set()
        raise OSError("No space left on device")

    monkeypatch.setattr(FakeTargetLedger, "settle", fail_once)

    def script(request: SentRequest) -> Step:
        if members(request) == [2]:
            sent.set()
            assert failed.wait(10)
        return 200

    with pytest.raises(OSError, match="No space left"):
        run(ledger, ScriptedTarget(script), routes=SINGLY)

    assert ledger.settled["api"] >= {1, 2}


def test_a_drain_whose_lanes_only_retry_notices_that_its_lock_is_lost() -> None:
    """Its connection was cut, so another drain may be at work: what this one sends could undo what that one sent."""
    clock = SystemClock()
    ledger = a_ledger(4, clock=clock)
    started = clock.monotonic()

    def script(request: SentRequest) -> Step:
        if request.number == 0:
            ledger.break_lock("api")
        return 503

    patient = RetryPolicy(initial_backoff=0.05, max_backoff=0.05, max_elapsed=60.0)
    with pytest.raises(FakeLockLost):
        run(
            ledger,
            ScriptedTarget(script),
            retry=patient,
            failure_threshold=10_000,
            limits=DrainLimits(window_records=3),
        )

    assert clock.monotonic() - started < 30  # not only once the budget of a minute was spent


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [DrainLimits(window_records=30), DrainLimits(window_bytes=30 * 1000)],
    ids=["by records", "by bytes"],
)
def test_what_is_held_is_bounded_by_the_window_whatever_the_backlog(limits: DrainLimits) -> None:
    clock = SystemClock()
    payload = b'{"pad": "%b"}' % (b"x" * 989)
    assert len(payload) == 1000
    ledger = a_ledger([change(i, payload=payload) for i in range(1, 501)], clock=clock)
    most = 0

    def script(request: SentRequest) -> Step:
        nonlocal most
        time.sleep(0.001 if request.number else 0.15)  # at first long enough for the loop to read all that it will
        most = max(most, len(ledger.claimed["api"]))
        return 200

    run(ledger, ScriptedTarget(script), max_in_flight=2, limits=limits)

    assert_conserved(ledger, accepted=500)
    assert 3 <= most <= 31


def test_without_a_bound_the_window_is_as_large_as_the_lanes_need(asked: list[int]) -> None:
    routes = routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 2_000}}})
    ledger = a_ledger(40_000)
    run(ledger, ScriptedTarget(), routes=routes, max_in_flight=3)

    assert_conserved(ledger, accepted=40_000)
    assert 10_000 < max(asked) <= 18_000


@pytest.mark.parametrize(("in_flight", "batch", "most"), [(4, 100, 10_000), (8, 1000, 24_000), (64, 10_000, 40_000)])
def test_the_window_is_as_large_as_the_lanes_need(in_flight: int, batch: int, most: int) -> None:
    """Two windows of 8,000 records in flight are more than a window of 10,000: half of the lanes would stand still."""
    assert window_for(max_in_flight=in_flight, max_records=batch) == most


def test_the_window_slides_so_that_no_lane_waits_for_the_slowest() -> None:
    """One lane is stuck with its request, and the other goes on through the backlog."""
    clock = SystemClock()
    ledger = a_ledger(400, clock=clock)
    release = threading.Event()

    def script(request: SentRequest) -> Step:
        if request.lane == "lane-1":
            assert release.wait(10)
        elif ledger.conservation("api").accepted > 60:
            release.set()
        return 200

    run(ledger, ScriptedTarget(script), routes=SINGLY, max_in_flight=2, limits=DrainLimits(window_records=300))

    assert_conserved(ledger, accepted=400)


# Whatever happens: nothing lost, every key in order -------------------------------------------------------------------

_SPEC: dict[str, Any] = {
    "upserts": {"upsert": UPSERT, "delete": {"path": "/rows/${_key}", "record": {"id": "$id", "change": "$change"}}},
    "inserts and updates": {
        "insert": {"path": "/rows", "batch": {"max_records": 2}},
        "update": {"method": "PUT", "path": "/rows/${_key}"},
        "delete": {"method": "POST", "path": "/gone", "batch": {"max_records": 3}},
    },
    "results": {"upsert": {**UPSERT, "results": RESULTS}, "delete": {**UPSERT, "path": "/gone", "results": RESULTS}},
}
_WORLDS = {
    (name, mode): routes_of(customers={"mode": mode, **spec})
    for name, spec in _SPEC.items()
    for mode in ("event", "state")
}


class MoodyTarget:
    """A target that holds data and answers as its dice say: right, late, never, or with a crash of the lane."""

    def __init__(self, seed: int, bad: set[int], *, itemised: bool) -> None:
        self.dice = random.Random(seed)
        self.bad = bad
        self.itemised = itemised
        self.calm = False
        self.lock = threading.Lock()
        self.state: dict[str, int] = {}
        """The change that each key was last given."""
        self.bodies: dict[Any, set[bytes]] = {}

    def __call__(self, request: SentRequest) -> Step:
        with self.lock:
            document = json.loads(request.body)
            rows = document if isinstance(document, list) else [document]
            self.bodies.setdefault(request.key, set()).add(request.body)
            mood = 1.0 if self.calm else self.dice.random()
            if mood < 0.08:
                return 503
            if mood < 0.12:
                return no_answer(may_have_arrived=False)
            if mood < 0.15:
                return Crash()
            if self.itemised:
                return self._item_by_item(rows, mood)
            if any(row["change"] in self.bad for row in rows):
                return 422
            self._apply(rows)
            if mood < 0.22:
                return no_answer("no answer in time")
            return Crash() if mood < 0.24 else 200

    def _item_by_item(self, rows: list[Any], mood: float) -> Step:
        results = []
        for row in rows:
            status = 422 if row["change"] in self.bad else 200
            if mood < 0.5 and self.dice.random() < 0.3:
                status = 503
            if status == 200:
                self._apply([row])
            results.append({"id": row["id"], "status": status})
        if mood < 0.22:
            return no_answer("no answer in time")
        return answer(200, json.dumps({"results": results}).encode())

    def _apply(self, rows: list[Any]) -> None:
        given = {row["id"]: row["change"] for row in rows}  # a key's last row in a request is what counts
        for key, change_id in given.items():
            assert self.state.get(key, 0) <= change_id, f"{key}: {change_id} came after {self.state[key]}"
            self.state[key] = change_id


@pytest.mark.parametrize(("world", "mode"), _WORLDS, ids=str)
@given(
    history=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(["insert", "update", "update", "delete"])),
        min_size=1,
        max_size=40,
    ),
    lanes=st.integers(1, 4),
    window=st.sampled_from([4, 15, 1000]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nothing_is_lost_and_no_key_goes_backwards(
    world: str, mode: str, history: Any, lanes: int, window: int, seed: int, data: st.DataObject
) -> None:
    """Several lanes, several operations, faults, lost answers and crashes: at the end the target holds the latest."""
    changes = [change(i, key, operation=operation) for i, (key, operation) in enumerate(history, 1)]
    bad = data.draw(st.sets(st.sampled_from([one.change_id for one in changes]), max_size=3))
    clock = SystemClock()
    ledger = a_ledger(changes, clock=clock)
    moody = MoodyTarget(seed, bad, itemised=world == "results")

    for attempt in range(40):
        moody.calm = attempt > 20
        try:
            report = run(
                ledger,
                ScriptedTarget(moody),
                routes=_WORLDS[world, mode],
                max_in_flight=lanes,
                retry=RetryPolicy(initial_backoff=0.0005, max_backoff=0.001, max_elapsed=0.02),
                failure_threshold=3,
                error_timeout=0.002,
                dead_letter_guard=1.0,
                limits=DrainLimits(window_records=window),
            )
        except Crash:
            continue
        finally:
            assert ledger.conservation("api").holds
        if report.end == "caught_up":
            break

    counts = ledger.conservation("api")
    assert (counts.pending, counts.claimed, counts.filtered) == (0, 0, 0)
    assert set(dead_ids(ledger)) <= bad
    # One key of ours never stands for two bodies.
    assert all(len(bodies) == 1 for bodies in moody.bodies.values())
    for key in {one.key for one in changes}:
        mine = [one.change_id for one in changes if one.key == key]
        if mode == "event":
            owed = [change_id for change_id in mine if change_id not in bad]
            assert moody.state.get(key) == (owed[-1] if owed else None)
        elif mine[-1] not in bad:
            assert moody.state[key] == mine[-1]
    if mode == "event":
        assert counts.superseded == 0
        assert set(dead_ids(ledger)) == bad


def test_a_change_cannot_have_been_delivered_before_it_was_made() -> None:
    """Though the clock that stamped it may be ahead of ours."""
    late = ChangeRecord(
        1, "customers", "1", "update", b'{"id": "1", "change": 1}', instant_of(datetime(2030, 1, 1, tzinfo=UTC))
    )

    report = run(a_ledger([late]), ScriptedTarget())

    assert report.lag_p95 == 0
