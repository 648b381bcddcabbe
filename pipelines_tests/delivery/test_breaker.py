"""A target that is down is left alone, and one request at a time finds out when it is back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.delivery.breaker import Breaker, Go, Wait


def breaker(*, failure_threshold: int = 3, error_timeout: float = 30.0, open_until: float | None = None) -> Breaker:
    return Breaker(failure_threshold=failure_threshold, error_timeout=error_timeout, open_until=open_until)


def opened(*, at: float = 0.0) -> Breaker:
    one = breaker()
    for _ in range(3):
        one.failed(at, probe=False)
    return one


def test_requests_flow_while_failures_stay_below_the_threshold() -> None:
    one = breaker()

    one.failed(0, probe=False)
    one.failed(0, probe=False)

    assert one.admit(0) == Go()
    assert one.closed


def test_it_opens_at_the_threshold_for_the_error_timeout() -> None:
    one = opened(at=100)

    assert not one.closed
    assert one.admit(100) == Wait(30)
    assert one.admit(129.5) == Wait(0.5)


def test_a_success_in_between_starts_the_count_anew() -> None:
    """Only failures in a row count: a target that fails now and then is not down."""
    one = breaker()

    for _ in range(10):
        one.failed(0, probe=False)
        one.failed(0, probe=False)
        one.succeeded()

    assert one.closed


def test_after_the_timeout_exactly_one_request_goes_as_the_probe() -> None:
    one = opened()

    assert one.admit(30) == Go(probe=True)
    assert one.admit(30) == Wait(None)
    assert one.admit(1000) == Wait(None)


def test_a_probe_that_succeeds_closes_it() -> None:
    one = opened()
    one.admit(30)

    one.succeeded()

    assert one.admit(30) == Go()
    assert one.failures == 0


def test_a_probe_that_fails_opens_it_for_another_timeout() -> None:
    one = opened()
    one.admit(30)

    one.failed(31, probe=True)

    assert one.admit(31) == Wait(30)
    assert one.admit(61) == Go(probe=True)


def test_a_permission_given_back_lets_another_request_probe() -> None:
    one = opened()
    one.admit(30)

    one.withdrew(probe=True)

    assert one.admit(30) == Go(probe=True)


def test_late_failures_of_requests_that_left_before_do_not_prolong_the_wait() -> None:
    one = opened(at=0)

    one.failed(29, probe=False)

    assert one.admit(30) == Go(probe=True)


def test_late_failures_do_not_take_the_probe_from_its_request() -> None:
    one = opened(at=0)
    one.admit(30)

    one.failed(31, probe=False)

    assert one.admit(31) == Wait(None)


def test_one_left_open_by_an_earlier_run_probes_first() -> None:
    one = breaker(open_until=5.0)

    assert one.admit(5.0) == Go(probe=True)
    assert one.admit(5.0) == Wait(None)


def test_a_threshold_of_one_opens_at_the_first_failure() -> None:
    one = breaker(failure_threshold=1)

    one.failed(0, probe=False)

    assert one.admit(0) == Wait(30)


@pytest.mark.parametrize("threshold", [1, 2, 5])
@given(events=st.lists(st.sampled_from(["go", "fail", "succeed", "withdraw", "tick"]), max_size=40))
def test_never_two_probes_at_once_and_never_stuck(threshold: int, events: list[str]) -> None:
    """Whatever the order of events, one probe is out at most, and time brings the next one."""
    one = breaker(failure_threshold=threshold)
    now = 0.0
    out: list[Go] = []
    for event in events:
        if event == "tick":
            now += 10.0
        elif event == "go":
            decision = one.admit(now)
            if isinstance(decision, Go):
                assert not (decision.probe and any(go.probe for go in out) and not one.closed)
                out.append(decision)
        elif out:
            go = out.pop(0)
            if event == "fail":
                one.failed(now, probe=go.probe)
            elif event == "succeed":
                one.succeeded()
            else:
                one.withdrew(probe=go.probe)
    for go in out:
        one.withdrew(probe=go.probe)

    assert isinstance(one.admit(now + 30.0), Go)
