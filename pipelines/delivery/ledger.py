"""The port to the ledger: what each target has, what it is owed, what may be in flight.

    pending --claim--> claimed --settle--> settled (accepted, dead-lettered or filtered)
       |                  ^ |
       |                  | +-- a crash: still claimed, and sent again as written before anything new
       +--claim (superseded, filtered, unrenderable)--> settled

Whoever holds a `TargetLedger` holds the target's lock; nobody else can write for that target.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.outcome import DeadRecord, OperationKind

Start = Literal["now", "beginning", "snapshot"]
Status = Literal["active", "paused", "disabled"]


LONG_TAIL = 1000
"""So many changes in the gaps that are not for a target are work too: once passed over, they are not seen again."""


class LedgerConflict(Exception):
    """A settlement names a change that is not claimed, or one twice: two writers, or a defect. Nothing was written."""


class LedgerFailed(Exception):
    """The ledger cannot be reached, or cannot write: a sentence that says why. What was written down stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetState:
    """One target's row, without its sets."""

    target: str
    log_id: UUID
    """Which log this is: in another database the change ids begin anew, and mean other changes."""
    status: Status = "active"
    reason: str | None = None
    failed_runs: int = 0
    """Runs in a row that ended with the target unwell; more than none, and the breaker is open."""
    retry_at: datetime | None = None
    """When to try again: the target, or if it is well, the batches that were set aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conservation:
    """Where every captured change is: captured = accepted + superseded + filtered + dead + claimed + pending."""

    target: str
    captured: int
    accepted: int
    superseded: int
    filtered: int
    dead: int
    claimed: int
    pending: int

    @property
    def holds(self) -> bool:
        """Whether nothing is missing and nothing counted twice."""
        return self.captured == (
            self.accepted + self.superseded + self.filtered + self.dead + self.claimed + self.pending
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """What the sensor and the plan ask of one target, in one query for all."""

    target: str
    has_work: bool
    """Something is claimed or pending, a load is unfinished, or there is a long tail to pass over."""
    held: bool
    """A drain holds its lock now."""
    status: Status
    reason: str | None
    waiting: bool
    """`retry_at` has not come yet; if only batches that were set aside wait for it, anything pending is work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWindow:
    """The oldest pending changes, by change id."""

    records: Sequence[ChangeRecord]
    complete: bool
    """Nothing pending was left out when this was read."""
    decided_up_to: int | None
    """Every id up to this one is either in `records`, or settled or claimed, or will never be seen."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A batch about to be written down."""

    lane: int
    stream: str
    operation: OperationKind
    changes: Sequence[ChangeRecord]
    idempotency_key: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A batch that a drain before this one claimed and did not settle, with those of its members still claimed."""

    batch_id: int
    lane: int
    stream: str
    operation: OperationKind
    idempotency_key: UUID
    """That of all its members; of those that are left it may be another."""
    changes: Sequence[ChangeRecord]
    set_aside: int = 0
    """Runs that gave up on it while it might be its records' fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcoming:
    """What one target is to be sent next, as far as it was asked for."""

    log_id: UUID
    leftovers: Sequence[Leftover]
    pending: Sequence[ChangeRecord]
    blocked: Mapping[tuple[str, str], int]
    """Those of their keys that have an open dead letter, each with the first such change."""
    more: bool
    """There may be others behind them."""

    def changes(self) -> Sequence[ChangeRecord]:
        """Return all that is claimed or pending of it."""
        return [*(change for left in self.leftovers for change in left.changes), *self.pending]


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a claimed batch. Members named nowhere stay claimed, and the batch with them."""

    batch_id: int
    accepted: Sequence[ChangeRecord] = ()
    dead: Sequence[DeadRecord] = ()
    filtered: Sequence[ChangeRecord] = ()
    supersedes: bool = False
    """What was accepted closes the open dead letters of earlier changes of its keys."""
    set_aside: bool = False
    """It was given up on, and its records may be to blame."""
    attempts: int = 0
    status: int | None = None
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How everything in a `PendingWindow` is to be dealt with."""

    claims: Sequence[Claim] = ()
    superseded: Sequence[ChangeRecord] = ()
    filtered: Sequence[ChangeRecord] = ()
    dead: Sequence[DeadRecord] = ()
    decided_up_to: int | None = None


class TargetLedger(ABC):
    """One target's ledger, for as long as its lock is held."""

    @abstractmethod
    def state(self) -> TargetState:
        """Return the target's status and breaker as the last run left them."""

    @abstractmethod
    def leftovers(self, *, max_records: int, max_bytes: int) -> Iterator[Sequence[Leftover]]:
        """Yield what is claimed when the first is asked for, oldest first, a part of it at a time.

        It is to be sent again as written, before anything new. Each part is read when it is asked for: at most
        *max_records*, and payloads of *max_bytes* as stored; but one batch at least.
        """

    @abstractmethod
    def blocked(self, keys: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
        """Return those of *keys* (stream and key) that have an open dead letter, each with the first such change."""

    @abstractmethod
    def pending(self, *, max_records: int, max_bytes: int) -> PendingWindow:
        """Return the oldest changes that are neither settled nor claimed.

        At most *max_records*, and no more once their payloads as stored exceed *max_bytes*; but one at least.
        """

    @abstractmethod
    def claim(self, window: Window) -> Sequence[int]:
        """Write a window down, in one transaction, and return the claims' batch ids in their order.

        If the window is `decided_up_to` an id, the gaps up to it close.
        """

    @abstractmethod
    def split(self, batch_id: int, parts: Sequence[Claim]) -> Sequence[int]:
        """Write down that a claimed batch goes on as *parts*, before any of them is sent; return their batch ids.

        They take its place among the leftovers. Raises LedgerConflict unless they hold just what it still has claimed.
        """

    @abstractmethod
    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Write outcomes down, in one transaction; raises LedgerConflict."""

    @abstractmethod
    def check(self) -> None:
        """Raise if the connection, and with it the lock, is lost: then another drain may be at work."""

    @abstractmethod
    def hold(self, *, status: Status, reason: str, failed_runs: int, retry_in: float | None) -> None:
        """Open the breaker: do not try the target for *retry_in* seconds (None: until a person launches a run).

        Seconds, for it is the ledger's own clock that says when they are over: the machines of the runs may differ.
        With *failed_runs* of 0 the target is well, and only what is claimed waits.
        """

    @abstractmethod
    def resume(self) -> None:
        """Note that the target is well: active, the breaker closed."""


class Ledger(ABC):
    """All targets' ledgers."""

    @abstractmethod
    def register(self, targets: Mapping[str, Start], *, streams: Mapping[str, Sequence[str]] | None = None) -> None:
        """Make a row for each target that has none. 'now' leaves what is committed by now to others.

        So does 'snapshot', and has the rows of the target's *streams* loaded instead.
        """

    @abstractmethod
    def open_target(self, target: str, *, run_id: str) -> AbstractContextManager[TargetLedger | None]:
        """Take the lock of a registered target until the context ends; None if another drain has it.

        The context raises LedgerFailed in place of whatever the ledger's own trouble looks like.
        """

    @abstractmethod
    def owed(self, streams: Mapping[str, Sequence[str]]) -> Sequence[Owed]:
        """Say of each target, given the streams that it routes, whether it has work; one query, by target."""

    @abstractmethod
    def upcoming(self, target: str, *, max_records: int, max_bytes: int) -> Upcoming:
        """Look at what a registered target is owed: at most so much of what is claimed, and of what is pending.

        Takes no lock and writes nothing. Of a target that is not registered there is nothing.
        """

    @abstractmethod
    def conservation(self, target: str) -> Conservation:
        """Count where every captured change is. Reads the whole log: a check, not a thing for every tick."""
