"""The machine's clock behind the port of `pipelines.delivery.clock`."""

import time
from datetime import UTC, datetime
from threading import Condition

from pipelines.delivery.clock import Clock


class SystemClock(Clock):
    """Real time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def wait(self, condition: Condition, seconds: float | None) -> None:
        condition.wait(seconds)
