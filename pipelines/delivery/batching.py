"""Cut a window's changes into batches, each on a lane, so that no key is ever out of order.

Pure: the same changes and lanes give the same batches.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from pipelines.changes.record import ChangeRecord, keys, payloads, picked
from pipelines.changes.texts import total_bytes
from pipelines.delivery.outcome import OperationKind
from pipelines.delivery.routing import Route, RouteOperation

_MaxRecordsOf = Callable[[Route, RouteOperation], int]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Changes that go out in one request, with what was rendered of each."""

    lane: int
    route: Route
    operation: RouteOperation
    changes: Sequence[ChangeRecord]
    fragments: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """What a target's lanes are at, as far as the plan for more must know."""

    in_flight: Callable[[str, AbstractSet[str]], Mapping[str, Batch]] = lambda _stream, _keys: {}
    """Of a stream and keys of it that are to be sent, returns the last batch with each that is in flight, if any is."""
    records: Sequence[int] = (0,)
    """For each lane, how many records it has before it."""


class Burden:
    """How many records each lane has before it, those of the plan at hand included."""

    def __init__(self, records: Sequence[int]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def least(self) -> int:
        """Return the lane with the least before it."""
        return self._records.index(min(self._records))

    def add(self, lane: int, records: int) -> None:
        """Take into account what is put on *lane*."""
        self._records[lane] += records


def cut(
    route: Route,
    operation: RouteOperation,
    changes: Sequence[ChangeRecord],
    fragments: Sequence[bytes],
    *,
    max_records: int,
    in_flight: Mapping[str, Batch],
    burden: Burden,
) -> Iterator[Batch]:
    """Yield batches of *changes* in which no key is named twice, so that they may go in any order.

    What is in flight keeps its lane. The rest goes, in order, to the lane with the least before it.
    """
    if in_flight:
        apart, free = _by_lane_in_flight(changes, in_flight, lanes=len(burden))
        parts = [(lane, picked(changes, places), picked(fragments, places)) for lane, places in apart.items()]
        yield from (
            _batch(lane, route, operation, *piece, burden)
            for lane, some, theirs in parts
            for piece in _pieces(operation, some, theirs, max_records)
        )
        changes, fragments = picked(changes, free), picked(fragments, free)
    for piece in _pieces(operation, changes, fragments, max_records):
        yield _batch(burden.least(), route, operation, *piece, burden)


def _batch(
    lane: int,
    route: Route,
    operation: RouteOperation,
    changes: Sequence[ChangeRecord],
    fragments: Sequence[bytes],
    burden: Burden,
) -> Batch:
    burden.add(lane, len(changes))
    return Batch(lane=lane, route=route, operation=operation, changes=changes, fragments=fragments)


def _by_lane_in_flight(
    changes: Sequence[ChangeRecord], in_flight: Mapping[str, Batch], *, lanes: int
) -> tuple[Mapping[int, Sequence[int]], Sequence[int]]:
    """Return, for each lane, the places in *changes* of those whose key is on it; and the places of all others."""
    apart: dict[int, list[int]] = defaultdict(list)
    free: list[int] = []
    for place, before in enumerate(map(in_flight.get, keys(changes))):
        # Of a leftover, there may have been more lanes once.
        (free if before is None else apart[before.lane % lanes]).append(place)
    return apart, free


def _pieces(
    operation: RouteOperation, changes: Sequence[ChangeRecord], fragments: Sequence[bytes], max_records: int
) -> Iterator[tuple[Sequence[ChangeRecord], Sequence[bytes]]]:
    """Yield the parts that fit into a request each. A record that is too large for any is a part of its own."""
    room = operation.max_bytes - operation.overhead_bytes + 1  # a separator is between two: one less than fragments
    as_they_are = fragments is payloads(changes)
    start = 0
    while start < len(fragments):
        some = changes[start : start + max_records]
        theirs = payloads(some) if as_they_are else fragments[start : start + max_records]
        if total_bytes(theirs) + len(theirs) > room:
            number = max(1, bisect_right(list(accumulate(len(one) + 1 for one in theirs)), room))
            some, theirs = some[:number], theirs[:number]
        yield some, theirs
        start += len(theirs)


@dataclass(slots=True)
class _Open:
    """A batch that still takes records."""

    lane: int
    operation: RouteOperation
    changes: list[ChangeRecord] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)
    size: int = 0
    closed: bool = False


class KeyedBatcher:
    """Fills batches, lane by lane, with the changes of one stream in which a key comes more than once.

    Batches of one lane leave in the order in which they were closed. So a change may join an open batch only if no
    earlier change of its key waits in another open one: else all open ones of the lane are closed first.
    """

    def __init__(
        self, route: Route, *, max_records_of: _MaxRecordsOf, in_flight: Mapping[str, Batch], burden: Burden
    ) -> None:
        self._route, self._max_records_of = route, max_records_of
        self._in_flight, self._burden = in_flight, burden
        self._open: list[dict[OperationKind, _Open]] = [{} for _ in range(len(burden))]
        self._filling: dict[OperationKind, int] = {}  # the lane whose open batch takes what may go anywhere
        self._closed: list[Batch] = []
        self._batch_of_key: dict[str, _Open] = {}

    def add(self, operation: RouteOperation, change: ChangeRecord, fragment: bytes) -> None:
        """Put *change* behind all that was added of its key."""
        earlier = self._batch_of_key.get(change.key)
        lane = self._lane_of(operation.kind, change.key) if earlier is None else earlier.lane
        batch = self._open[lane].get(operation.kind)
        if earlier is not None and not earlier.closed and (earlier is not batch or operation.results is not None):
            # Where items are judged one by one, a second change of the key could be accepted and the first not.
            self._close_lane(lane)
            batch = None
        if batch is not None and batch.size + len(fragment) > operation.max_bytes:
            self._close_batch(batch)
            batch = None
        if batch is None:
            batch = self._open[lane][operation.kind] = _Open(lane, operation, size=operation.overhead_bytes)
        batch.changes.append(change)
        batch.fragments.append(fragment)
        batch.size += len(fragment) + 1
        self._batch_of_key[change.key] = batch
        if len(batch.changes) >= self._max_records_of(self._route, operation):
            self._close_batch(batch)

    def _lane_of(self, kind: OperationKind, key: str) -> int:
        before = self._in_flight.get(key)
        if before is not None:
            return before.lane % len(self._burden)  # of a leftover, there may have been more lanes once
        lane = self._filling.get(kind)
        if lane is None:
            lane = self._filling[kind] = self._burden.least()
        return lane

    def close(self) -> Sequence[Batch]:
        """Return all batches, in the order in which those of a lane are to go."""
        for lane in range(len(self._open)):
            self._close_lane(lane)
        return self._closed

    def _close_lane(self, lane: int) -> None:
        for batch in list(self._open[lane].values()):
            self._close_batch(batch)

    def _close_batch(self, batch: _Open) -> None:
        batch.closed = True
        kind = batch.operation.kind
        del self._open[batch.lane][kind]
        if self._filling.get(kind) == batch.lane:
            del self._filling[kind]
        self._closed.append(
            _batch(batch.lane, self._route, batch.operation, batch.changes, batch.fragments, self._burden)
        )
