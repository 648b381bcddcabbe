"""Keep to the requests per second that a target allows."""

from dataclasses import dataclass

# Who waited as told may come a rounding error too early; clocks do not tell such times apart.
_NO_TIME = 1e-6


@dataclass(slots=True, kw_only=True)
class TokenBucket:
    """A token bucket: `burst` requests at once, `requests_per_second` over time. Times are monotonic seconds.

    Not thread-safe: the gate guards it.
    """

    requests_per_second: float
    burst: int
    tokens: float
    updated_at: float

    @classmethod
    def full(cls, *, requests_per_second: float, burst: int, now: float) -> "TokenBucket":
        """Return a bucket that allows a whole burst at once."""
        return cls(requests_per_second=requests_per_second, burst=burst, tokens=burst, updated_at=now)

    def take(self, now: float) -> float:
        """Take a token and return 0, or take none and return the seconds until there is one."""
        grown = self.tokens + (now - self.updated_at) * self.requests_per_second
        self.tokens, self.updated_at = min(float(self.burst), grown), now
        short = (1 - self.tokens) / self.requests_per_second
        if short > _NO_TIME:
            return short
        self.tokens -= 1
        return 0.0
