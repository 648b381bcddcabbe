"""The port to backfills: what changed on some days, appended to the log once more, for one target.

A backfill that was interrupted goes on at its last committed step, whichever run takes it up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime

from pipelines.delivery.config import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """What is to be sent again."""

    target: str
    stream: str
    mode: Mode
    """`state`: what the source holds now of the keys that changed then. `event`: the changes themselves."""
    since: datetime
    until: datetime
    """Made before this, and not before `since`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillProgress:
    """A step more."""

    appended: int
    """Records so far, those of runs before this one included."""
    by_day: Mapping[date, int] = field(default_factory=dict)
    """The same by the day, in UTC, of the change; in mode `state`, of the key's last change of those days."""
    done: bool = False
    waiting: bool = False
    """For another run, which is sending days of the same target and stream again: one at a time does."""


class CannotBackfill(Exception):
    """A sentence that says why and what to do. What was appended before it stands."""


class Backfiller(ABC):
    """All targets' backfills."""

    @abstractmethod
    def run(self, backfill: Backfill, *, run_id: str) -> Iterator[BackfillProgress]:
        """Append step after step, each committed when it is yielded; at last one that is done. Raises CannotBackfill.

        While another run is at it, it yields again and again that it is waiting. One that was done before begins anew.
        """

    @abstractmethod
    def kept_since(self) -> datetime | None:
        """Return when the oldest change was made that is still in the log; None if none was ever removed."""
