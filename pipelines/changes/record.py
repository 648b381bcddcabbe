"""What happened to one key of one stream."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Literal, NamedTuple

Operation = Literal["insert", "update", "delete", "snapshot"]

_BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def instant_of(time: datetime) -> int:
    """Return *time* as a change has it: in microseconds since the beginning of the year 2000 in UTC."""
    return (time - _BEGINNING) // _MICROSECOND


def time_of(instant: int) -> datetime:
    """Return an *instant* as a time in UTC."""
    return _BEGINNING + instant * _MICROSECOND


class ChangeRecord(NamedTuple):
    """One row of `change_log`. A tuple, because a drain makes one for every change that it reads."""

    change_id: int
    stream: str
    key: str
    operation: Operation
    payload: bytes
    """The row as JSON text (UTF-8), byte for byte as Postgres wrote it; of a delete, the row as it was."""
    instant: int
    """When it was made, in microseconds since the beginning of the year 2000 in UTC.

    That is how Postgres sends it. Few are ever asked for the time itself: `changed_at`.
    """
    replays: int | None = None
    """The change that this one sends again, under the original's idempotency key."""

    @property
    def changed_at(self) -> datetime:
        """When it was made, in UTC."""
        return time_of(self.instant)


def original_id(change: ChangeRecord) -> int:
    """Return what a target knows the change by: a replay has its original's key, so it must have its id in its body."""
    return change.change_id if change.replays is None else change.replays


def original_ids(changes: Sequence[ChangeRecord]) -> list[int]:
    """Return the original ids of many, in order: each is asked for with every request."""
    if any(map(_REPLAYS, changes)):
        return [original_id(change) for change in changes]
    return list(map(CHANGE_ID, changes))


# For whole windows and batches: `map` over them takes no step of Python's for each change.
CHANGE_ID, STREAM, KEY, OPERATION, PAYLOAD, INSTANT, _REPLAYS = map(itemgetter, range(len(ChangeRecord._fields)))
