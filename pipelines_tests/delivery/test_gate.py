"""What concerns the target as a whole holds every lane: its rate, its `Retry-After`, the breaker, a halt."""

import threading
from collections.abc import Callable

import pytest

from pipelines.delivery.breaker import Breaker
from pipelines.delivery.clock import Clock
from pipelines.delivery.gate import Halt, Permit, TargetGate
from pipelines.delivery.outcome import Pause
from pipelines.delivery.rate_limit import TokenBucket
from pipelines_tests.fakes.clock import FakeClock
from resources.system_clock import SystemClock


def a_gate(
    clock: Clock | None = None,
    *,
    failure_threshold: int = 3,
    bucket: TokenBucket | None = None,
    guard: float = 0.5,
    unwell: bool = False,
) -> TargetGate:
    clock = clock or FakeClock()
    return TargetGate(
        clock=clock,
        breaker=Breaker(
            failure_threshold=failure_threshold, error_timeout=30.0, open_until=clock.monotonic() if unwell else None
        ),
        bucket=bucket,
        dead_letter_guard=guard,
        one_probe=unwell,
    )


def entered(gate: TargetGate, **more: float) -> Permit:
    permit = gate.enter(**more)
    assert permit is not None
    return permit


def in_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Start *function* on another lane; the result waits for it."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()

    def result() -> object:
        thread.join(10)
        assert not thread.is_alive(), "the lane still waits"
        return found[0]

    return result


# The whole target waits -----------------------------------------------------------------------------------------------


def test_a_well_target_is_asked_at_once() -> None:
    clock = FakeClock()
    gate = a_gate(clock)

    assert entered(gate) == Permit(probe=False)
    assert clock.naps == ()


def test_a_retry_after_holds_every_lane() -> None:
    """Another lane's request, which nobody refused, waits as well."""
    clock = FakeClock()
    gate = a_gate(clock)
    gate.failed(entered(gate), "answered 429", retry_after=7.0)

    assert gate.held_for() == 7.0
    entered(gate)

    assert sum(clock.naps) == pytest.approx(7.0)
    assert gate.held_for() == 0.0


def test_the_longer_of_two_retry_afters_holds() -> None:
    clock = FakeClock()
    gate = a_gate(clock)
    first, second = entered(gate), entered(gate)
    gate.failed(first, "answered 429", retry_after=10.0)
    gate.failed(second, "answered 429", retry_after=2.0)

    assert gate.held_for() == 10.0


def test_a_success_on_another_lane_does_not_end_a_retry_after() -> None:
    clock = FakeClock()
    gate = a_gate(clock)
    first, _ = entered(gate), entered(gate)
    gate.failed(first, "answered 429", retry_after=10.0)
    gate.succeeded()

    entered(gate)

    assert sum(clock.naps) == pytest.approx(10.0)


def test_the_rate_limit_is_shared_by_all_lanes() -> None:
    clock = FakeClock()
    bucket = TokenBucket.full(requests_per_second=2, burst=1, now=clock.monotonic())
    gate = a_gate(clock, bucket=bucket)

    for _ in range(5):
        entered(gate)

    assert sum(clock.naps) == pytest.approx(2.0)


def test_a_probe_waits_for_the_rate_limit_too_and_is_still_the_only_one() -> None:
    clock = FakeClock()
    bucket = TokenBucket.full(requests_per_second=0.01, burst=1, now=clock.monotonic())
    gate = a_gate(clock, bucket=bucket, failure_threshold=1)
    gate.failed(entered(gate), "answered 503")

    assert entered(gate) == Permit(probe=True)
    assert sum(clock.naps) == pytest.approx(100.0)
    assert gate.enter(give_up_at=clock.monotonic() + 50) is None


def test_who_would_have_to_wait_too_long_is_told_at_once() -> None:
    """The budget is not slept away before it is found too small."""
    clock = FakeClock()
    gate = a_gate(clock)
    gate.failed(entered(gate), "answered 503", retry_after=20.0)

    assert gate.enter(give_up_at=clock.monotonic() + 19) is None
    assert clock.naps == ()
    assert gate.halt is None


# The breaker ----------------------------------------------------------------------------------------------------------


def test_after_enough_failures_in_a_row_the_next_request_waits_and_is_the_probe() -> None:
    clock = FakeClock()
    gate = a_gate(clock)
    for _ in range(3):
        gate.failed(entered(gate), "answered 503")

    assert not gate.healthy
    assert entered(gate) == Permit(probe=True)
    assert sum(clock.naps) == pytest.approx(30.0)


def test_while_a_probe_is_out_the_other_lanes_wait_for_its_answer() -> None:
    gate = a_gate(SystemClock(), unwell=True)
    probe = entered(gate)
    others = [in_thread(gate.enter) for _ in range(3)]

    assert probe.probe
    gate.succeeded()

    assert [other() for other in others] == [Permit(probe=False)] * 3


def test_who_waits_for_anothers_probe_gives_up_in_time() -> None:
    clock = SystemClock()
    gate = a_gate(clock, unwell=True)
    entered(gate)

    assert gate.enter(give_up_at=clock.monotonic() + 0.02) is None


def test_a_refused_record_is_a_sign_of_life() -> None:
    """The target answered for itself: that closes the breaker, whatever it thought of the record."""
    gate = a_gate(FakeClock(), unwell=True)
    entered(gate)

    gate.succeeded()

    assert gate.healthy
    assert gate.failures == 0


def test_an_unwell_target_is_asked_once_and_not_again_in_this_run() -> None:
    """A failed probe after an unwell run ends the run: the waiting is the ledger's."""
    gate = a_gate(FakeClock(), unwell=True)

    gate.failed(entered(gate), "answered 503", retry_after=90.0)

    assert gate.enter() is None
    assert gate.halt is not None
    assert (gate.halt.cause, gate.halt.reason, gate.halt.retry_after) == ("deferred", "answered 503", 90.0)


def test_an_unwell_target_that_answers_is_treated_like_any_other_from_then_on() -> None:
    gate = a_gate(FakeClock(), unwell=True)
    entered(gate)
    gate.succeeded()

    for _ in range(3):
        gate.failed(entered(gate), "answered 503")
    probe = entered(gate)
    gate.failed(probe, "answered 503")

    assert probe.probe
    assert gate.halt is None


def test_a_permit_given_back_lets_another_lane_probe() -> None:
    gate = a_gate(SystemClock(), unwell=True)
    probe = entered(gate)
    other = in_thread(gate.enter)

    gate.withdrew(probe)

    assert other() == Permit(probe=True)


# Halts ----------------------------------------------------------------------------------------------------------------


def test_a_halt_lets_nothing_out_and_wakes_every_lane_that_waits() -> None:
    gate = a_gate(SystemClock())
    gate.failed(entered(gate), "answered 503", retry_after=3600.0)
    waiting = [in_thread(gate.enter), in_thread(lambda: gate.pause_lane(3600.0))]

    gate.stop("the run was asked to stop")

    assert [result() for result in waiting] == [None, None]
    assert gate.enter() is None


def test_refused_credentials_halt_the_target() -> None:
    gate = a_gate()

    gate.pause(Pause(cause="credentials", reason="answered 401", status=401), entered(gate))

    assert gate.halt is not None
    assert gate.halt.cause == "credentials"
    assert gate.enter() is None


def test_the_first_reason_is_the_one_that_is_reported() -> None:
    gate = a_gate()
    gate.defer("answered 503", retry_after=5.0)

    gate.stop("the run was asked to stop")
    gate.defer("another")

    assert gate.halt is not None
    assert gate.halt.reason == "answered 503"


def test_a_pause_outranks_a_stop() -> None:
    """A 401 that comes in while the run winds down must be written down all the same."""
    gate = a_gate()
    permit = entered(gate)
    gate.stop("the run was asked to stop")

    gate.pause(Pause(cause="credentials", reason="answered 401", status=401), permit)

    assert gate.halt is not None
    assert gate.halt.cause == "credentials"


def test_a_lane_sleeps_as_long_as_it_asked() -> None:
    clock = FakeClock()

    a_gate(clock).pause_lane(1.5)

    assert clock.naps == (1.5,)


# The dead-letter guard ------------------------------------------------------------------------------------------------


def test_the_guard_halts_when_most_of_the_first_records_are_refused() -> None:
    gate = a_gate()

    gate.judge_records(accepted=10, dead=0)
    gate.judge_records(accepted=0, dead=19)
    assert gate.halt is None
    gate.judge_records(accepted=0, dead=1)

    assert gate.halt is not None
    assert gate.halt.cause == "mapping"
    assert "20 of 30 records" in gate.halt.reason


def test_the_guard_bears_a_share_of_bad_records() -> None:
    gate = a_gate()
    for _ in range(100):
        gate.judge_records(accepted=1, dead=1)

    assert gate.halt is None


def test_a_few_bad_records_alone_are_no_wrong_mapping() -> None:
    gate = a_gate()

    gate.judge_records(accepted=0, dead=19)

    assert gate.halt is None


def test_the_guard_looks_at_the_last_records_however_many_were_accepted_before() -> None:
    """A drain may linger for hours; a target that refuses everything from now on must not bury all that comes."""
    gate = a_gate()
    for _ in range(100):
        gate.judge_records(accepted=100, dead=0)

    refused = 0
    while gate.halt is None and refused < 10_000:
        gate.judge_records(accepted=0, dead=1)
        refused += 1

    assert gate.halt is not None
    assert refused <= 250


def test_the_guard_bears_single_bad_records_for_ever() -> None:
    gate = a_gate()
    for _ in range(1000):
        gate.judge_records(accepted=9, dead=1)

    assert gate.halt is None


@pytest.mark.parametrize(("guard", "halts"), [(0.0, True), (0.99, True), (1.0, False)])
def test_a_guard_of_one_is_never_and_of_nought_is_at_once(guard: float, halts: bool) -> None:
    gate = a_gate(guard=guard)

    gate.judge_records(accepted=0, dead=150)

    assert (gate.halt is not None) == halts


def test_a_window_of_which_most_cannot_be_rendered_halts() -> None:
    gate = a_gate()

    gate.judge_rendering(rendered=100, unrenderable=900)

    assert gate.halt is not None
    assert gate.halt.cause == "mapping"
    assert "900 of 1000 records" in gate.halt.reason


def test_some_unrenderable_records_among_many_are_no_wrong_mapping() -> None:
    """They are weighed against their whole window, not against the few answers had by then."""
    gate = a_gate()

    gate.judge_rendering(rendered=19_970, unrenderable=30)
    gate.judge_records(accepted=1, dead=0)

    assert gate.halt is None


def test_unrenderable_records_are_weighed_at_the_beginning_of_a_run_only() -> None:
    gate = a_gate()
    gate.judge_rendering(rendered=1000, unrenderable=0)

    gate.judge_rendering(rendered=0, unrenderable=50)

    assert gate.halt is None


# Whose fault is it, the target's or the records'? ---------------------------------------------------------------------


def test_what_fails_again_counts_once_unless_it_is_the_probe() -> None:
    gate = a_gate(failure_threshold=2)
    for _ in range(5):
        gate.failed(entered(gate), "500", again=True)
    assert gate.healthy
    gate.failed(entered(gate), "500")
    gate.failed(entered(gate), "500")
    assert not gate.healthy


def test_after_others_have_succeeded_there_is_no_doubt() -> None:
    gate = a_gate()
    before = gate.successes
    entered(gate)
    gate.succeeded()

    gate.doubt(since=before)

    assert not gate.in_doubt
    assert gate.healthy


def test_a_doubt_makes_the_next_request_the_probe_and_it_decides() -> None:
    failing, succeeding = a_gate(), a_gate()
    for gate in (failing, succeeding):
        gate.doubt(since=gate.successes)
        assert gate.in_doubt
    failing.failed(entered(failing), "answered 500")
    entered(succeeding)
    succeeding.succeeded()

    assert failing.halt == Halt(cause="deferred", reason="answered 500")
    assert (succeeding.halt, succeeding.in_doubt) == (None, False)


def test_suspects_do_not_decide_until_there_are_too_many() -> None:
    gate = a_gate(failure_threshold=3, unwell=True)
    for _ in range(2):
        gate.failed(entered(gate), "answered 500", excused=True)
        assert gate.halt is None
    gate.failed(entered(gate), "answered 500", excused=True)

    assert gate.halt is not None


def test_one_operation_that_is_refused_does_not_hide_behind_others() -> None:
    """A wrong path for updates, while many more inserts are accepted."""
    gate = a_gate(guard=0.5)
    for _ in range(20):
        gate.judge_records(accepted=10, dead=0, of=("people", "insert"))
        gate.judge_records(accepted=0, dead=1, of=("people", "update"))

    assert gate.halt is not None
    assert "20 of 20 records were refused" in gate.halt.reason


# At once, or not ------------------------------------------------------------------------------------------------------


def test_whoever_cannot_wait_is_let_in_while_requests_flow_freely() -> None:
    gate = a_gate()
    assert gate.enter_at_once() == Permit(probe=False)
    gate.failed(entered(gate), "answered 503")  # one is not enough to open the breaker
    assert gate.enter_at_once() == Permit(probe=False)


def _halted(gate: TargetGate) -> None:
    gate.stop("enough")


def _held(gate: TargetGate) -> None:
    gate.failed(entered(gate), "answered 429", retry_after=5.0)


def _open(gate: TargetGate) -> None:
    for _ in range(3):
        gate.failed(entered(gate), "answered 503")


def _in_doubt(gate: TargetGate) -> None:
    gate.doubt(since=gate.successes)


@pytest.mark.parametrize("happens", [_halted, _held, _open, _in_doubt])
def test_whoever_cannot_wait_is_not_let_in_when_it_might_have_to(happens: Callable[[TargetGate], None]) -> None:
    gate = a_gate()
    happens(gate)

    assert gate.enter_at_once() is None


@pytest.mark.parametrize("unwell", [False, True], ids=["held to a rate", "left unwell"])
def test_whoever_cannot_wait_is_never_let_in_where_each_request_might_have_to(unwell: bool) -> None:
    bucket = None if unwell else TokenBucket.full(requests_per_second=100, burst=100, now=0.0)

    assert a_gate(bucket=bucket, unwell=unwell).enter_at_once() is None
