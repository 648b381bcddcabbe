"""Time as an argument, so that tests own it."""

from abc import ABC, abstractmethod
from datetime import datetime
from threading import Condition


class Clock(ABC):
    """What a drain may know of time."""

    @abstractmethod
    def monotonic(self) -> float:
        """Return seconds that only go forward; for waits and budgets."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the time of day, in UTC; for what is written down."""

    @abstractmethod
    def wait(self, condition: Condition, seconds: float | None) -> None:
        """Wait on *condition*, which the caller holds, until it is notified or *seconds* have passed."""
