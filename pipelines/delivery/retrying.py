"""When to send the same bytes again.

The n-th wait is drawn evenly from [0, min(max_backoff, initial_backoff * 2^(n-1))]: "full jitter", also at the cap,
so that lanes and processes that failed together do not come back together (Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015). A `Retry-After` is not a wait of one request: the gate holds the whole target. The budget
is time, not attempts: `max_elapsed` seconds after a request's first failure its drain defers.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import tenacity


def backoff(*, initial_backoff: float, max_backoff: float) -> tenacity.wait.wait_base:
    """Return the wait between attempts, in seconds."""
    return tenacity.wait_random_exponential(multiplier=initial_backoff, max=max_backoff)


def retry_after_seconds(value: str | None, *, now: datetime, longest: float) -> float | None:
    """Read a `Retry-After` header (RFC 9110 §10.2.3: seconds or a date) as seconds from *now*, within [0, longest].

    None if there is none or it makes no sense: then the ordinary backoff holds.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        # Thousands of digits are a number too, but not one that int() reads.
        return longest if len(text) > 9 else min(float(text), longest)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # numbers without end
        return None
    if date.tzinfo is None:  # '-0000': UTC, of unknown origin
        date = date.replace(tzinfo=UTC)
    return min(max((date - now).total_seconds(), 0.0), longest)
