"""The port to the place where a target's list and the source's rows are laid side by side.

What was listed is kept page by page, with the path of the next one, so that an interrupted listing goes on. Nothing is
held in memory but a chunk of rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

Kind = Literal["missing", "stale", "extra", "in_flight", "dead", "unrenderable"]
"""What is found of a record that is not as it should be. The first three are drift."""


class CannotReconcile(Exception):
    """A sentence that says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """How far the target's records are listed."""

    next: str
    """The path of the page to ask for next."""
    complete: bool
    listed: int
    """Records with a key, each counted once."""
    unkeyed: int
    pages: int
    total: int | None
    """What the last page said there are in all."""
    resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """A row, as a change record of it would say."""

    key: str
    match: str
    """By which it is found among what was listed."""
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A record that is not as it should be, before what is on its way is told apart."""

    match: str
    kind: Kind
    key: str | None = None
    """The source's, None of a record that it has not got."""
    fields: Sequence[str] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was found, counted in the workspace."""

    counts: Mapping[Kind, int]
    fields: Sequence[tuple[str, int]]
    """Fields of stale records that differ, the most frequent first."""
    samples: Mapping[Kind, Sequence[Finding]]
    moving: int
    """Changes of the stream that were not settled at the target when the listing began, or came since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """What a repair has appended so far."""

    snapshots: int = 0
    deletes: int = 0
    busy: int = 0
    """Records that are being changed, or whose table is: they are left to the next time."""
    impossible: int = 0
    """Extra records whose key is none that the table could have, or that of a missing one, written another way."""

    def __add__(self, other: "Appended") -> "Appended":
        return Appended(
            snapshots=self.snapshots + other.snapshots,
            deletes=self.deletes + other.deletes,
            busy=self.busy + other.busy,
            impossible=self.impossible + other.impossible,
        )


class Workspace(ABC):
    """One stream of one target, while nobody else reconciles it."""

    @abstractmethod
    def begin(self, *, first: str, fingerprint: str, resume_within: float) -> Listing:
        """Return where the listing is: one that was broken off no longer than *resume_within* seconds ago goes on.

        Only if *fingerprint*, which names how the target is read, is still the same. *first* is the first page's path.
        """

    @abstractmethod
    def add_page(self, records: Mapping[str, bytes], *, unkeyed: int, next: str | None, total: int | None) -> int:
        """Keep a page and where the next one is (None: this was the last), in one transaction.

        Return how many of its records had not been listed before; of one that had, what is said now holds.
        """

    @abstractmethod
    def list_again(self, *, first: str) -> None:
        """Begin with the first page again, keeping what is listed and what counts as on its way."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the listing and what was found."""

    @abstractmethod
    def rows(self, *, limit: int) -> Iterator[Sequence[SourceRow]]:
        """Yield the source's rows as they are when each chunk is read, forgetting what was found before."""

    @abstractmethod
    def listed(self, matches: Sequence[str]) -> Mapping[str, bytes]:
        """Return the records that were listed, of *matches*."""

    @abstractmethod
    def note(self, findings: Sequence[Finding]) -> None:
        """Keep what was found."""

    @abstractmethod
    def find_extra(self) -> None:
        """Note what was listed and has no row."""

    @abstractmethod
    def summarize(self, *, samples: int) -> Summary:
        """Tell apart what is on its way and what has an open dead letter, and count.

        An extra record whose key is that of a row which is not listed, but for case, blanks and Unicode's forms, has a
        `reason` that says so.
        """

    @abstractmethod
    def missing(self, *, limit: int, among: Sequence[str] | None = None) -> Sequence[SourceRow]:
        """Return the rows, as they are now, of some missing records, by lot; *among* names those to choose from."""

    @abstractmethod
    def loaded(self) -> bool:
        """Say whether an initial load has brought the target every row."""

    @abstractmethod
    def samples(self, matches: Sequence[str]) -> Mapping[str, tuple[SourceRow, bytes]]:
        """Return the row and the listed record of *matches* that have both, as they are now."""

    @abstractmethod
    def append(self, kind: Kind, *, limit: int) -> Iterator[Appended]:
        """Append, chunk by chunk, the state of the row now of each record of that *kind*, addressed to the target.

        Of extra records that is a deletion, if the source still has no such row. Those with a `reason` stay.
        """


class Workspaces(ABC):
    """The workspaces of every target's streams."""

    @abstractmethod
    def open(self, target: str, stream: str, *, run_id: str) -> AbstractContextManager[Workspace]:
        """Take the stream of a registered target until the context ends; raises CannotReconcile."""
