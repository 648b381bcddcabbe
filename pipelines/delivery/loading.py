"""The port to initial loads: a table's rows, appended to the log for one target, chunk by chunk.

A load that was interrupted goes on at its last committed chunk, whichever run takes it up. Rows that change meanwhile
are in the log as they changed, before their own record if they changed before it.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How far one stream's rows were appended for one target."""

    target: str
    stream: str
    rows: int
    """Appended so far."""
    done: bool
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """A chunk more."""

    rows: int
    """Appended so far."""
    of_about: int
    """How many the table has, by the planner's estimate."""
    done: bool
    chunk: int
    """Which chunk of this run it was, from 1."""


class CannotLoad(Exception):
    """A sentence that says why and what to do. What was appended before it stands."""


class Loader(ABC):
    """All targets' initial loads."""

    @abstractmethod
    def begin(self, target: str, streams: Collection[str], *, again: bool = False) -> Sequence[str]:
        """Have *streams* loaded for a registered target; return those that begin now.

        One that is running is left running. One that is done is done, unless it is to be loaded *again*.
        """

    @abstractmethod
    def loads(self, targets: Collection[str]) -> Sequence[Load]:
        """Return what was ever begun for *targets*."""

    @abstractmethod
    def run(self, target: str, stream: str, *, run_id: str) -> Iterator[LoadProgress]:
        """Append chunk after chunk, each committed when it is yielded; nothing if another run is at it.

        Raises CannotLoad.
        """
