"""What an answer means, and for whom: the words of the fault table in docs/faults.md.

A verdict is about one request; only `Accepted` and `Rejected` settle records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.changes.record import ChangeRecord

OperationKind = Literal["upsert", "insert", "update", "delete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The target has every record of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The target refused the request's one record for the record's own sake."""

    reason: str
    status: int | None = None
    response: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The target refused a batch and did not say for which record: halve it."""

    reason: str
    status: int
    too_large: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """The target answered for each record; positions are those in the request."""

    accepted: Sequence[int] = ()
    rejected: Mapping[int, Rejected] = field(default_factory=dict)
    retry: Sequence[int] = ()
    fallback: Sequence[int] = ()
    retry_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """The record is there already, or is not there: send it as the route's other operation."""

    kind: OperationKind


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFault:
    """The target could not take the request now; no record is to blame."""

    reason: str
    status: int | None = None
    retry_after: float | None = None
    """Seconds that the target asked for."""
    outcome_unknown: bool = False
    """The request may have been applied: only the same key and bytes may follow it."""
    may_be_the_records: bool = False
    """A record might bring this about; it is told from an outage by what else succeeds meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Nothing more can succeed until credentials or configuration are put right."""

    cause: Literal["credentials", "configuration", "gone", "mapping"]
    reason: str
    status: int | None = None


Verdict = Accepted | Rejected | Split | Items | Fallback | TargetFault | Pause


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadRecord:
    """A change that a target refused, and why."""

    change: ChangeRecord
    reason: str
    status: int | None = None
    response: str | None = None
    attempts: int = 1
    blocked_by: int | None = None
    """The dead change of the same key because of which this one was not sent (`on_dead: block`)."""


def blocked(change: ChangeRecord, dead_change_id: int) -> DeadRecord:
    """Return *change* as the dead letter that it becomes behind another of its key."""
    reason = "an earlier change of its key is dead (on_dead: block)"
    return DeadRecord(change=change, reason=reason, attempts=0, blocked_by=dead_change_id)
