"""Stop asking a target that is down; let one real request find out when it is back.

closed --failure_threshold failures in a row--> open --error_timeout--> half-open --the probe succeeds--> closed
                                                  ^----------------------------------- the probe fails
(Nygard, Release It!, "Circuit Breaker".) Times are seconds of one monotonic clock.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Go:
    """Send; *probe* means that everything waits for this one answer."""

    probe: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Do not send before *seconds* have passed; None: until somebody else's probe is answered."""

    seconds: float | None


@dataclass(slots=True, kw_only=True)
class Breaker:
    """One target's breaker. Not thread-safe: the gate guards it."""

    failure_threshold: int
    error_timeout: float
    failures: int = 0
    open_until: float | None = None
    probing: bool = False

    @property
    def closed(self) -> bool:
        """Whether requests flow freely."""
        return self.open_until is None

    def admit(self, now: float) -> Go | Wait:
        """Say whether a request may go now; a `Go(probe=True)` must be followed by its result or by `withdrew`."""
        if self.open_until is None:
            return Go()
        if self.probing:
            return Wait(None)
        if now < self.open_until:
            return Wait(self.open_until - now)
        self.probing = True
        return Go(probe=True)

    def succeeded(self) -> None:
        """Close: the target answered for itself."""
        self.failures, self.open_until, self.probing = 0, None, False

    def failed(self, now: float, *, probe: bool) -> None:
        """Count a failure; open at the threshold, and again if the probe failed.

        The late answers of requests that left before it opened neither prolong nor shorten the wait.
        """
        self.failures += 1
        if probe:
            self.probing = False
        if probe or (self.open_until is None and self.failures >= self.failure_threshold):
            self.open_until = now + self.error_timeout

    def half_open(self, now: float) -> None:
        """Let the next request be the probe, whatever the time."""
        self.open_until, self.probing = now, False

    def withdrew(self, *, probe: bool) -> None:
        """Give the permission back unused."""
        if probe:
            self.probing = False
