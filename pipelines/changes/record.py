"""What happened to one key of one stream."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeVar, overload

from pipelines.changes.texts import JoinedTexts

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


class ChangeColumns(Sequence[ChangeRecord]):
    """Many changes, kept column by column: what is done with a window or a batch takes few steps for each change.

    A record is made where one is asked for; a slice is columns again.
    """

    __slots__ = ("_columns",)

    def __init__(self, columns: Sequence[Sequence[Any]]) -> None:
        """Keep *columns*, which are as long as each other and come in the order of a `ChangeRecord`'s fields."""
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, index: int) -> ChangeRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "ChangeColumns": ...
    def __getitem__(self, index: int | slice) -> "ChangeRecord | ChangeColumns":
        if isinstance(index, slice):
            return ChangeColumns([column[index] for column in self._columns])
        return ChangeRecord(*(column[index] for column in self._columns))

    def __iter__(self) -> Iterator[ChangeRecord]:
        return map(ChangeRecord._make, zip(*self._columns, strict=True))

    def __eq__(self, other: object) -> bool:
        """Say whether *other* is a sequence of the same changes, kept however."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of any sequence that is compared by what is in it

    def __repr__(self) -> str:
        return f"ChangeColumns({list(self)!r})"

    def column(self, place: int) -> Sequence[Any]:
        """Return the field at *place* of all."""
        return self._columns[place]

    def pick(self, places: Sequence[int]) -> "ChangeColumns":
        """Return those at *places*, in their order."""
        return ChangeColumns([picked(column, places) for column in self._columns])


_Item = TypeVar("_Item")


@overload
def picked(items: Sequence[ChangeRecord], places: Sequence[int]) -> Sequence[ChangeRecord]: ...
@overload
def picked(items: Sequence[_Item], places: Sequence[int]) -> Sequence[_Item]: ...
def picked(items: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    """Return those of *items* that are at *places*, in the order of these."""
    if isinstance(items, ChangeColumns):
        return items.pick(places)
    if isinstance(items, JoinedTexts):
        items = items.single()
    return list(map(items.__getitem__, places))


def _column(name: str) -> Callable[[Sequence[ChangeRecord]], Sequence[Any]]:
    place = ChangeRecord._fields.index(name)
    field_of = itemgetter(place)

    def column(changes: Sequence[ChangeRecord]) -> Sequence[Any]:
        return changes.column(place) if isinstance(changes, ChangeColumns) else list(map(field_of, changes))

    return column


# For whole windows and batches: none of these takes a step of Python's for each change.
change_ids: Callable[[Sequence[ChangeRecord]], Sequence[int]] = _column("change_id")
streams: Callable[[Sequence[ChangeRecord]], Sequence[str]] = _column("stream")
keys: Callable[[Sequence[ChangeRecord]], Sequence[str]] = _column("key")
operations: Callable[[Sequence[ChangeRecord]], Sequence[Operation]] = _column("operation")
payloads: Callable[[Sequence[ChangeRecord]], Sequence[bytes]] = _column("payload")
instants: Callable[[Sequence[ChangeRecord]], Sequence[int]] = _column("instant")
replays: Callable[[Sequence[ChangeRecord]], Sequence[int | None]] = _column("replays")


def original_ids(changes: Sequence[ChangeRecord]) -> Sequence[int]:
    """Return the original ids of many, in order: each is asked for with every request."""
    if any(replays(changes)):
        return [original_id(change) for change in changes]
    return change_ids(changes)
