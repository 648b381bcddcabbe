"""What of the log nobody needs any more, and which targets may still need it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pipelines.delivery.config import TargetConfig
from pipelines.delivery.ledger import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A target that the ledger knows."""

    target: str
    status: Status
    last_active: datetime
    """When anything was last written down of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Who keeps changes in the log until it has settled them, and who no longer does."""

    holding: Sequence[str]
    dropped: Sequence[str]
    remarks: Sequence[str]
    """Sentences about targets that are not served and hold the log all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What one step removed, in one transaction."""

    changes: int = 0
    batches: int = 0
    missed: Mapping[str, int] | None = None
    """By target: changes that it never got, for it no longer holds the log."""


class Pruner(ABC):
    """The log and the trail of all targets."""

    @abstractmethod
    def holders(self) -> Sequence[Holder]:
        """Return every target that the ledger knows."""

    @abstractmethod
    def prune(self, *, before: datetime, holding: Sequence[str], dropped: Sequence[str]) -> Iterator[Pruned]:
        """Remove, step by step, what is older than *before* and settled by every target that is *holding*.

        Open dead letters keep their changes. What is removed is counted: captured stays what it was.
        """


def who_holds(
    holders: Sequence[Holder], configs: Mapping[str, TargetConfig], *, now: datetime, drop_after: timedelta | None
) -> Holding:
    """Say who holds the log: every target that is served, and for *drop_after* one that is disabled or removed."""
    holding: list[str] = []
    dropped: list[str] = []
    remarks: list[str] = []
    for holder in holders:
        config = configs.get(holder.target)
        if config is None:
            why = "it has no file any more"
        elif config.status == "disabled":
            why = "it is disabled in its file"
        elif holder.status == "disabled":
            why = "it is disabled"
        else:
            holding.append(holder.target)
            continue
        idle = now - holder.last_active
        if drop_after is not None and idle >= drop_after:
            dropped.append(holder.target)
            continue
        holding.append(holder.target)
        until = "for ever: set drop_after in source.yaml" if drop_after is None else f"for {drop_after.days} days"
        remarks.append(f"{holder.target}: {why}, and keeps what it has not settled in the log {until}")
    return Holding(holding=holding, dropped=dropped, remarks=remarks)
