"""A target's requests per second are kept to, and no more slowly than need be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.delivery.rate_limit import TokenBucket


def test_a_burst_goes_at_once_and_the_next_request_waits() -> None:
    bucket = TokenBucket.full(requests_per_second=10, burst=3, now=0)

    assert [bucket.take(0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(0) == pytest.approx(0.1)


def test_being_told_to_wait_costs_no_token() -> None:
    bucket = TokenBucket.full(requests_per_second=10, burst=1, now=0)
    bucket.take(0)

    assert [bucket.take(0.05) for _ in range(5)] == [pytest.approx(0.05)] * 5
    assert bucket.take(0.1) == 0


def test_an_idle_bucket_grows_to_its_burst_and_no_further() -> None:
    bucket = TokenBucket.full(requests_per_second=10, burst=2, now=0)

    assert bucket.take(1000) == 0
    assert bucket.take(1000) == 0
    assert bucket.take(1000) > 0


def test_less_than_one_request_a_second_is_a_rate_too() -> None:
    bucket = TokenBucket.full(requests_per_second=0.1, burst=1, now=0)

    assert bucket.take(0) == 0
    assert bucket.take(0) == pytest.approx(10)


@given(
    rate=st.floats(0.01, 10_000),
    burst=st.integers(1, 50),
    start=st.floats(0, 1e7),
    gaps=st.lists(st.floats(0, 1), min_size=1, max_size=60),
)
def test_never_more_than_burst_plus_rate_times_time(rate: float, burst: int, start: float, gaps: list[float]) -> None:
    """Whatever the callers' times, no stretch from the start holds more requests than allowed."""
    bucket = TokenBucket.full(requests_per_second=rate, burst=burst, now=start)
    now, taken = start, 0
    for gap in gaps:
        now += gap
        taken += bucket.take(now) == 0
        assert taken <= burst + rate * (now - start) + 1e-6


@given(rate=st.floats(0.01, 10_000), burst=st.integers(1, 5), start=st.floats(0, 1e7))
def test_who_waits_as_told_gets_a_token(rate: float, burst: int, start: float) -> None:
    """Rounding must not send a caller round and round for waits too small to be had."""
    bucket = TokenBucket.full(requests_per_second=rate, burst=burst, now=start)
    now = start
    for _ in range(burst + 10):
        if wait := bucket.take(now):
            now += wait
            assert bucket.take(now) == 0
