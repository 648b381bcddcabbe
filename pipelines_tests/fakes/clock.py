"""Time that passes only when somebody waits for it, so that no test has to sleep."""

from datetime import UTC, datetime, timedelta
from threading import Condition, Lock

from pipelines.delivery.clock import Clock

_PATIENCE = 30.0
_A_MOMENT = 0.001


class FakeClock(Clock):
    """A wait for some seconds lets them pass at once; they are kept in `naps`. Thread-safe."""

    def __init__(self, *, start: datetime = datetime(2025, 1, 1, tzinfo=UTC), monotonic: float = 1000.0) -> None:
        self._start = start
        self._origin = self._monotonic = monotonic
        self._naps: list[float] = []
        self._lock = Lock()

    @property
    def naps(self) -> tuple[float, ...]:
        """The seconds of every wait that had an end, in the order in which they were begun."""
        with self._lock:
            return tuple(self._naps)

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass."""
        with self._lock:
            self._monotonic += seconds

    def monotonic(self) -> float:
        with self._lock:
            return self._monotonic

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.monotonic() - self._origin)

    def wait(self, condition: Condition, seconds: float | None) -> None:
        if seconds is None:
            # Only another thread can end this one; if none does, the test is to fail and not to hang.
            if not condition.wait(_PATIENCE):
                raise TimeoutError(f"nobody notified a waiting thread within {_PATIENCE:g} real seconds")
            return
        with self._lock:
            self._naps.append(seconds)
            self._monotonic += seconds
        condition.wait(_A_MOMENT)  # others may have something to say meanwhile
