"""The port to the dead letters: what targets refused, and the two ways out, redrive and discard."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from pipelines.delivery.config import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which open dead letters are meant; what is empty or None does not narrow it."""

    targets: Sequence[str] = ()
    streams: Sequence[str] = ()
    keys: Sequence[str] = ()
    change_ids: Sequence[int] = ()
    reason: str = ""
    """A part of the reason, in whatever case."""
    since: datetime | None = None
    until: datetime | None = None
    """Refused before this, and not before `since`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Open dead letters of one target and stream, refused for one reason."""

    target: str
    stream: str
    reason: str
    count: int
    oldest: datetime
    newest: datetime
    example_keys: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Redrive:
    """How one route's dead letters are sent again."""

    target: str
    stream: str
    mode: Mode
    """`state`: what the source holds of their keys now. `event`: the changes themselves."""
    whole_keys: bool
    """With a key's selected dead letters all that are open of it: where a key is blocked they go in order, or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redriven:
    """What one step of a redrive did, all in one transaction."""

    closed: int
    """Dead letters that are `redriven` now."""
    appended: int
    """Records that were appended to the log, addressed to the target."""


class CannotRedrive(Exception):
    """A sentence that says why and what to do. What was done before it stands."""


class DeadLetters(ABC):
    """All targets' dead letters."""

    @abstractmethod
    def groups(self, selection: Selection) -> Sequence[Group]:
        """Return the open dead letters that *selection* means, by target, stream and reason."""

    @abstractmethod
    def redrive(self, selection: Selection, how: Redrive, *, run_id: str) -> Iterator[Redriven]:
        """Append what is to be sent again, and close the letters, step by step; raises CannotRedrive.

        Whatever interrupts it, each letter is either open, or closed with its record in the log.
        """

    @abstractmethod
    def discard(self, selection: Selection, *, note: str, run_id: str) -> int:
        """Close the letters without sending anything; return how many. They keep *note*."""
