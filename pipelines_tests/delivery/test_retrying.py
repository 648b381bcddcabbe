"""When the same bytes go out again: full jitter within growing bounds, and what a target asks for itself."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from pipelines.delivery.retrying import backoff, retry_after_seconds

NOW = datetime(2025, 3, 1, 12, 0, 0, tzinfo=UTC)


def waits(*, attempt: int, initial_backoff: float = 0.5, max_backoff: float = 30.0, draws: int = 2000) -> list[float]:
    wait = backoff(initial_backoff=initial_backoff, max_backoff=max_backoff)
    state = tenacity.RetryCallState(tenacity.Retrying(), fn=None, args=(), kwargs={})
    state.attempt_number = attempt
    return [wait(state) for _ in range(draws)]


@pytest.fixture
def _seeded() -> None:
    random.seed(7)


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize(
    ("attempt", "bound"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (8, 30.0), (100, 30.0), (5000, 30.0)]
)
def test_the_nth_wait_is_drawn_evenly_from_zero_to_its_bound(attempt: int, bound: float) -> None:
    """min(max_backoff, initial_backoff * 2^(n-1)): jitter over the whole of it, also at the cap."""
    drawn = waits(attempt=attempt)

    assert 0 <= min(drawn) < 0.01 * bound
    assert 0.99 * bound < max(drawn) <= bound
    assert sum(drawn) / len(drawn) == pytest.approx(bound / 2, rel=0.05)


@pytest.mark.usefixtures("_seeded")
def test_lanes_that_failed_together_do_not_come_back_together() -> None:
    """At the cap too: no two of the draws are the same."""
    assert len(set(waits(attempt=50, draws=500))) == 500


def test_the_waits_between_real_attempts_grow_from_the_initial_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wait is drawn up to initial_backoff, not up to twice that."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    naps: list[float] = []
    retrying = tenacity.Retrying(
        wait=backoff(initial_backoff=0.5, max_backoff=3.0),
        retry=tenacity.retry_if_result(lambda _: True),
        stop=tenacity.stop_after_attempt(6),
        sleep=naps.append,
        retry_error_callback=lambda _: None,
    )

    retrying(lambda: None)

    assert naps == [0.5, 1.0, 2.0, 3.0, 3.0]


def seconds(value: str | None, *, longest: float = 3600.0) -> float | None:
    return retry_after_seconds(value, now=NOW, longest=longest)


def http_date(offset: float) -> str:
    return format_datetime(NOW + timedelta(seconds=offset), usegmt=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("120", 120),
        (" 120 ", 120),
        (http_date(90), 90),
        (http_date(-90), 0),
        ("Sat, 01 Mar 2025 13:00:00 +0100", 0),
        ("Sat, 01 Mar 2025 12:00:30 -0000", 30),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value: str, expected: float) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize("value", ["999999", "9" * 5000, http_date(999_999), "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_an_absurd_retry_after_is_believed_up_to_the_longest(value: str) -> None:
    assert seconds(value, longest=60) == 60


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "-5",
        "1.5",
        "soon",
        "٣",
        "Sat, 99 Foo 2025 12:00:00 GMT",
        "Sat, 01 Mar 99999999999999999999999 12:00:00 GMT",
        "Sat, 01 Mar 2025 12:00:00 +99999999999999999999",
    ],
)
def test_a_senseless_retry_after_leaves_the_ordinary_backoff(value: str | None) -> None:
    assert seconds(value) is None


_date_like: Callable[[], st.SearchStrategy[str]] = lambda: st.builds(  # noqa: E731
    "{}, {} {} {} {}:{}:{} {}".format,
    st.sampled_from(["Sat", "x", ""]),
    st.integers(-5, 10**20),
    st.sampled_from(["Mar", "Foo", "3"]),
    st.integers(-5, 10**12),
    st.integers(-1, 99),
    st.integers(-1, 99),
    st.integers(-1, 99),
    st.sampled_from(["GMT", "+0100", "-0000", "+999999999999", "EST", "", "-9999"]),
)


@given(value=st.one_of(st.text(max_size=60), _date_like()))
def test_no_header_whatever_breaks_the_reading(value: str) -> None:
    found = seconds(value)

    assert found is None or 0 <= found <= 3600
