"""Turn a window of pending changes into batches, lane by lane, so that no key is ever out of order.

Pure: the same window gives the same plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from uuid import UUID

from pipelines.changes.record import ChangeRecord, Operation
from pipelines.delivery.holding import Key, key_of
from pipelines.delivery.idempotency import idempotency_key
from pipelines.delivery.ledger import Claim, Leftover, PendingWindow, Window
from pipelines.delivery.outcome import DeadRecord, OperationKind, blocked
from pipelines.delivery.routing import Route, RouteOperation
from pipelines.delivery.template import RecordUnrenderable


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Changes that go out in one request, with what was rendered of each."""

    lane: int
    route: Route
    operation: RouteOperation
    changes: Sequence[ChangeRecord]
    fragments: Sequence[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to write down, and the batches of its claims in the same order."""

    window: Window
    batches: Sequence[Batch]

    @property
    def unrenderable(self) -> int:
        """Return how many are dead for their own sake."""
        return _unrenderable(self.window.dead)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverPlan:
    """The batches in which a claim is sent again, and what of it is not."""

    batches: Sequence[Batch]
    filtered: Sequence[ChangeRecord]
    dead: Sequence[DeadRecord]

    @property
    def unrenderable(self) -> int:
        """Return how many are dead for their own sake."""
        return _unrenderable(self.dead)


def _unrenderable(dead: Sequence[DeadRecord]) -> int:
    return sum(record.blocked_by is None for record in dead)


def claim_of(batch: Batch, *, log_id: UUID, target: str) -> Claim:
    """Return *batch* as it is written down before it is sent."""
    return Claim(
        lane=batch.lane,
        stream=batch.route.stream,
        operation=batch.operation.kind,
        changes=batch.changes,
        idempotency_key=idempotency_key(log_id, target, batch.operation.fingerprint, batch.changes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """What a target's lanes are at, as far as the plan for more must know."""

    in_flight: Mapping[str, Mapping[str, Batch]] = field(default_factory=dict)
    """For each stream and each key of it that is in flight, the last batch with it."""
    records: Sequence[int] = (0,)
    """For each lane, how many records it has before it."""


def plan_window(
    pending: PendingWindow,
    *,
    log_id: UUID,
    target: str,
    routes: Mapping[str, Route],
    lanes: Lanes,
    max_records_of: Callable[[Route, RouteOperation], int],
    blocked_keys: Mapping[Key, int] = MappingProxyType({}),
) -> Plan:
    """Coalesce, filter, render and batch *pending* for *target*.

    A key that is in flight keeps its lane, so that its changes go one after another. All else goes in the order of the
    ids, each batch to the lane with the least before it: what the ledger then has to note is a range, or a few.

    In mode `state` only the last change of a key is sent and the earlier ones are superseded (but for a deletion, on a
    route that cannot update, of a record that was made anew). A batch closes at `max_records_of` its operation or at
    the operation's `max_bytes`. *blocked_keys* have a dead change: later ones become dead letters too.
    """
    filtered: list[ChangeRecord] = []
    superseded: list[ChangeRecord] = []
    dead: list[DeadRecord] = []
    blocks = dict(blocked_keys)
    batcher = _Batcher(lanes, max_records_of=max_records_of)
    ways: dict[tuple[str, Operation, Operation], _Way] = {}
    for first, change in _coalesce(pending.records, routes, filtered, superseded):
        which = (change.stream, first, change.operation)
        way = ways.get(which)
        if way is None:
            way = ways[which] = batcher.way(routes[change.stream], first, change.operation)
        fragment = _render(way.route, way.operation, change, filtered, dead, blocks)
        if fragment is not None:
            batcher.add(way, change, fragment)
    batches = batcher.close()
    claims = [claim_of(batch, log_id=log_id, target=target) for batch in batches]
    window = Window(
        claims=claims, superseded=superseded, filtered=filtered, dead=dead, decided_up_to=pending.decided_up_to
    )
    return Plan(window=window, batches=batches)


def _render(
    route: Route | None,
    operation: RouteOperation | None,
    change: ChangeRecord,
    filtered: list[ChangeRecord],
    dead: list[DeadRecord],
    blocks: dict[Key, int],
) -> bytes | None:
    """Return *change*'s part of a body; None if it is not to be sent, and then it is noted why."""
    if route is None or operation is None:
        filtered.append(change)
        return None
    if blocks and (blocked_by := blocks.get(key_of(change), change.change_id)) < change.change_id:
        dead.append(blocked(change, blocked_by))
        return None
    try:
        fragment = operation.render_record(change)
    except RecordUnrenderable as error:
        dead.append(DeadRecord(change=change, reason=str(error), attempts=0))
        if route.on_dead == "block":
            blocks[key_of(change)] = change.change_id
        return None
    if fragment is None:
        filtered.append(change)
    return fragment


def plan_leftover(
    leftover: Leftover, *, routes: Mapping[str, Route], blocks: dict[Key, int] | None = None
) -> LeftoverPlan:
    """Render a claim again: the same members in one batch, so under the same mapping the same bytes and key.

    If its route has lost the operation since, each change goes by the one that now serves it. Keys in *blocks* have a
    dead change; those whose change cannot be rendered, and is to block later ones, are added.
    """
    filtered: list[ChangeRecord] = []
    dead: list[DeadRecord] = []
    rendered: list[_Rendered] = []
    blocks = {} if blocks is None else blocks
    route = routes.get(leftover.stream)
    written = route.operations.get(leftover.operation) if route else None
    for change in leftover.changes:
        operation = written or (route.operation_for(change.operation, change.operation) if route else None)
        fragment = _render(route, operation, change, filtered, dead, blocks)
        if operation is not None and fragment is not None:
            rendered.append((operation, change, fragment))
    pieces = _pieces_of(rendered, written)
    batches = [
        Batch(
            lane=leftover.lane,
            route=route,
            operation=piece[0][0],
            changes=[change for _, change, _ in piece],
            fragments=[fragment for _, _, fragment in piece],
        )
        for piece in pieces
        if route and piece
    ]
    return LeftoverPlan(batches=batches, filtered=filtered, dead=dead)


_Rendered = tuple[RouteOperation, ChangeRecord, bytes]


def _pieces_of(rendered: Sequence[_Rendered], written: RouteOperation | None) -> list[list[_Rendered]]:
    """Cut a claim into requests: one, unless its operation is another now, or takes one record, or no key twice.

    The last is so if the route has been given `results` since. They are no part of the fingerprint, but the pieces
    have other members, and so keys of their own.
    """
    if written is None or not written.batched:
        return [[one] for one in rendered]
    if written.results is None:
        return [list(rendered)]
    pieces: list[list[_Rendered]] = [[]]
    keys: set[str] = set()
    for one in rendered:
        if one[1].key in keys:
            pieces.append([])
            keys.clear()
        keys.add(one[1].key)
        pieces[-1].append(one)
    return pieces


def _coalesce(
    records: Sequence[ChangeRecord],
    routes: Mapping[str, Route],
    filtered: list[ChangeRecord],
    superseded: list[ChangeRecord],
) -> list[tuple[Operation, ChangeRecord]]:
    """Return the changes to send, each with the first operation of its key that it stands for."""
    latest: dict[object, tuple[Operation, ChangeRecord]] = {}
    for change in records:
        route = routes.get(change.stream)
        if route is None:
            filtered.append(change)
        elif change.operation == "delete" and "delete" not in route.operations:
            # Not wanted, so it overtakes nothing: whether the state before it is sent must not depend on when it came.
            filtered.append(change)
        elif route.mode == "event":
            latest[change.change_id] = (change.operation, change)
        else:
            identity = (change.stream, change.key)
            earlier = latest.pop(identity, None)
            if earlier is not None and earlier[1].operation == "delete" and not route.updates:
                # Deleted and made anew: where nothing updates, the target must be told both, or the insert conflicts.
                latest[earlier[1].change_id] = earlier
                earlier = None
            if earlier is None:
                latest[identity] = (change.operation, change)
            else:
                superseded.append(earlier[1])
                # Made anew, or addressed to it, in between: where nothing updates, that is what the target wants.
                anew = change.operation in ("insert", "snapshot") and not route.updates
                latest[identity] = ("insert" if anew else earlier[0], change)
    return list(latest.values())


_Kind = tuple[str, OperationKind | None]


@dataclass(frozen=True, slots=True)
class _Way:
    """How changes of one stream and kind go, looked up once for all of a window."""

    route: Route
    operation: RouteOperation | None
    kind: _Kind
    keyed: bool
    """A key may be in the window more than once."""
    judged_alone: bool
    """Items are judged one by one."""
    max_records: int
    max_bytes: int
    in_flight: Mapping[str, Batch]


@dataclass(slots=True)
class _Open:
    """A batch that still takes records."""

    lane: int
    way: _Way
    changes: list[ChangeRecord] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)
    size: int = 0
    closed: bool = False


class _Batcher:
    """Fills batches lane by lane.

    Batches of one lane leave in the order in which they were closed. So a change may join an open batch only if no
    earlier change of its key waits in another open one: else all open ones of the lane are closed first.
    """

    def __init__(self, lanes: Lanes, *, max_records_of: Callable[[Route, RouteOperation], int]) -> None:
        self._in_flight = lanes.in_flight
        self._records = list(lanes.records)
        self._max_records_of = max_records_of
        self._open: list[dict[_Kind, _Open]] = [{} for _ in lanes.records]
        self._filling: dict[_Kind, int] = {}  # the lane whose open batch takes what may go anywhere
        self._closed: list[Batch] = []
        self._batch_of_key: dict[Key, _Open] = {}

    def way(self, route: Route, first: Operation, last: Operation) -> _Way:
        operation = route.operation_for(first, last)
        return _Way(
            route=route,
            operation=operation,
            kind=(route.stream, None if operation is None else operation.kind),
            keyed=route.mode == "event" or not route.updates,
            judged_alone=operation is not None and operation.results is not None,
            max_records=0 if operation is None else self._max_records_of(route, operation),
            max_bytes=0 if operation is None else operation.max_bytes,
            in_flight=self._in_flight.get(route.stream, {}),
        )

    def add(self, way: _Way, change: ChangeRecord, fragment: bytes) -> None:
        earlier = self._batch_of_key.get((change.stream, change.key)) if way.keyed else None
        lane = self._lane_of(way, change.key) if earlier is None else earlier.lane
        batch = self._open[lane].get(way.kind)
        if earlier is not None and not earlier.closed and (earlier is not batch or way.judged_alone):
            # Where items are judged one by one, a second change of the key could be accepted and the first not.
            self._close_lane(lane)
            batch = None
        if batch is not None and batch.size + len(fragment) > way.max_bytes:
            self._close_batch(batch)
            batch = None
        if batch is None:
            assert way.operation is not None  # or nothing would have been rendered
            batch = self._open[lane][way.kind] = _Open(lane, way, size=way.operation.overhead_bytes)
        batch.changes.append(change)
        batch.fragments.append(fragment)
        batch.size += len(fragment) + 1
        if way.keyed:
            self._batch_of_key[(change.stream, change.key)] = batch
        if len(batch.changes) >= way.max_records:
            self._close_batch(batch)

    def _lane_of(self, way: _Way, key: str) -> int:
        before = way.in_flight.get(key)
        if before is not None:
            return before.lane % len(self._open)  # of a leftover, there may have been more lanes once
        lane = self._filling.get(way.kind)
        if lane is None:
            lane = self._filling[way.kind] = self._records.index(min(self._records))
        return lane

    def close(self) -> list[Batch]:
        for lane in range(len(self._open)):
            self._close_lane(lane)
        return self._closed

    def _close_lane(self, lane: int) -> None:
        for batch in list(self._open[lane].values()):
            self._close_batch(batch)

    def _close_batch(self, batch: _Open) -> None:
        batch.closed = True
        del self._open[batch.lane][batch.way.kind]
        if self._filling.get(batch.way.kind) == batch.lane:
            del self._filling[batch.way.kind]
        self._records[batch.lane] += len(batch.changes)
        assert batch.way.operation is not None
        self._closed.append(
            Batch(
                lane=batch.lane,
                route=batch.way.route,
                operation=batch.way.operation,
                changes=batch.changes,
                fragments=batch.fragments,
            )
        )
