"""Turn a window of pending changes into batches, lane by lane, so that no key is ever out of order.

Pure: the same window gives the same plan.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import merge
from itertools import count
from types import MappingProxyType
from typing import cast
from uuid import UUID

from pipelines.changes.record import ChangeRecord, Operation, change_ids, keys, operations, picked, streams
from pipelines.delivery.batching import Batch, Burden, KeyedBatcher, Lanes, cut
from pipelines.delivery.holding import Key, key_of
from pipelines.delivery.idempotency import idempotency_key
from pipelines.delivery.ledger import Claim, Leftover, PendingWindow, Window
from pipelines.delivery.outcome import DeadRecord, OperationKind, blocked
from pipelines.delivery.routing import Route, RouteOperation
from pipelines.delivery.template import RecordUnrenderable


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
    planning = _Planning(lanes=lanes, max_records_of=max_records_of, blocks=dict(blocked_keys))
    planned: list[list[Batch]] = []
    for stream, records in _by_stream(pending.records):
        route = routes.get(stream)
        if route is None:
            planning.filtered += records
        else:
            planned.append(planning.batches(route, records))
    # In the order of their first changes, but those of one stream as they are: a lane's are to go in that order.
    batches = list(merge(*planned, key=_first_id))
    window = Window(
        claims=[claim_of(batch, log_id=log_id, target=target) for batch in batches],
        superseded=planning.superseded,
        filtered=planning.filtered,
        dead=planning.dead,
        decided_up_to=pending.decided_up_to,
    )
    return Plan(window=window, batches=batches)


def _first_id(batch: Batch) -> int:
    return change_ids(batch.changes)[0]


def _by_stream(records: Sequence[ChangeRecord]) -> Iterable[tuple[str, Sequence[ChangeRecord]]]:
    of_all = streams(records)
    if len(set(of_all)) == 1:
        return [(of_all[0], records)]
    places_of: dict[str, list[int]] = defaultdict(list)
    for place, stream in enumerate(of_all):
        places_of[stream].append(place)
    return [(stream, picked(records, places)) for stream, places in places_of.items()]


@dataclass(slots=True, kw_only=True)
class _Planning:
    """One window's plan while it is made, stream by stream."""

    lanes: Lanes
    max_records_of: Callable[[Route, RouteOperation], int]
    blocks: dict[Key, int]
    """The keys that have a dead change, and its id."""
    burden: Burden = field(init=False)
    superseded: list[ChangeRecord] = field(default_factory=list)
    filtered: list[ChangeRecord] = field(default_factory=list)
    dead: list[DeadRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.burden = Burden(self.lanes.records)

    def batches(self, route: Route, records: Sequence[ChangeRecord]) -> list[Batch]:
        """Return the batches of one stream's *records*, which are in the order of their ids."""
        if "delete" not in route.operations and "delete" in set(operations(records)):
            # Not wanted, so it overtakes nothing: whether the state before it is sent must not depend on when it came.
            self.filtered += picked(records, [i for i, one in enumerate(operations(records)) if one == "delete"])
            records = picked(records, [i for i, one in enumerate(operations(records)) if one != "delete"])
        of_all = keys(records)
        named = set(of_all)
        in_flight = self.lanes.in_flight(route.stream, named)
        if len(named) == len(records):
            return self._of_single(route, records, {}, in_flight)
        if route.mode == "event" or not route.updates:
            return self._of_repeated(route, records, in_flight)
        latest = dict(zip(of_all, count()))  # the place of each key's last change
        last = sorted(latest.values())
        self.superseded += picked(records, sorted(set(range(len(records))).difference(last)))
        firsts = dict(zip(reversed(of_all), reversed(operations(records)), strict=True))
        return self._of_single(route, picked(records, last), firsts, in_flight)

    def _of_single(
        self,
        route: Route,
        changes: Sequence[ChangeRecord],
        firsts: Mapping[str, Operation],
        in_flight: Mapping[str, Batch],
    ) -> list[Batch]:
        """Return the batches of *changes* that have a key each; of a key in *firsts*, that was the first operation."""
        batches: list[Batch] = []
        for operation, owed in _by_operation(route, changes, firsts):
            if operation is None:
                self.filtered += owed
                continue
            sendable, fragments = self._render_all(route, operation, owed)
            batches += cut(
                route,
                operation,
                sendable,
                fragments,
                max_records=self.max_records_of(route, operation),
                in_flight=in_flight,
                burden=self.burden,
            )
        # No key is in two of them, so they may go in the order of the ids.
        return sorted(batches, key=_first_id)

    def _render_all(
        self, route: Route, operation: RouteOperation, changes: Sequence[ChangeRecord]
    ) -> tuple[Sequence[ChangeRecord], Sequence[bytes]]:
        """Return what of *changes* is to be sent, and what was rendered of it."""
        if not self.blocks:
            with suppress(RecordUnrenderable):  # one by one it will be seen which
                fragments = operation.render_records(changes)
                if None not in fragments:
                    return changes, cast("Sequence[bytes]", fragments)
                self.filtered += picked(changes, [place for place, one in enumerate(fragments) if one is None])
                going = picked(changes, [place for place, one in enumerate(fragments) if one is not None])
                return going, [one for one in fragments if one is not None]
        rendered = [
            (change, fragment)
            for change in changes
            if (fragment := _render(route, operation, change, self.filtered, self.dead, self.blocks)) is not None
        ]
        return [change for change, _ in rendered], [fragment for _, fragment in rendered]

    def _of_repeated(
        self, route: Route, records: Sequence[ChangeRecord], in_flight: Mapping[str, Batch]
    ) -> list[Batch]:
        """Return the batches of *records* of which those of one key are to go one after another."""
        batcher = KeyedBatcher(
            route,
            max_records_of=self.max_records_of,
            in_flight=in_flight,
            burden=self.burden,
        )
        owed = [(change.operation, change) for change in records]
        for first, change in owed if route.mode == "event" else _coalesce_lives(records, self.superseded):
            operation = route.operation_for(first, change.operation)
            fragment = _render(route, operation, change, self.filtered, self.dead, self.blocks)
            if operation is not None and fragment is not None:
                batcher.add(operation, change, fragment)
        return list(batcher.close())


def _by_operation(
    route: Route, changes: Sequence[ChangeRecord], firsts: Mapping[str, Operation]
) -> Iterable[tuple[RouteOperation | None, Sequence[ChangeRecord]]]:
    """Return *changes* by what is owed of them: of a key that is not in *firsts* it is the only change."""
    lasts = set(operations(changes))
    if "upsert" in route.operations and ("delete" not in lasts or len(lasts) == 1):  # as it nearly always is
        return [(route.operation_for(last, last), changes) for last in list(lasts)[:1]]
    found: dict[OperationKind | None, tuple[RouteOperation | None, list[int]]] = {}
    for place, (key, last) in enumerate(zip(keys(changes), operations(changes), strict=True)):
        operation = route.operation_for(firsts.get(key, last), last)
        found.setdefault(None if operation is None else operation.kind, (operation, []))[1].append(place)
    return [(operation, picked(changes, places)) for operation, places in found.values()]


def _coalesce_lives(
    records: Sequence[ChangeRecord], superseded: list[ChangeRecord]
) -> Sequence[tuple[Operation, ChangeRecord]]:
    """Return the changes to send where nothing updates, each with the first operation of its key that it stands for.

    Deleted and made anew: then the target must be told both, or the insert conflicts.
    """
    latest: dict[object, tuple[Operation, ChangeRecord]] = {}
    for change in records:
        earlier = latest.pop(change.key, None)
        if earlier is not None and earlier[1].operation == "delete":
            latest[earlier[1].change_id] = earlier
            earlier = None
        if earlier is None:
            latest[change.key] = (change.operation, change)
        else:
            superseded.append(earlier[1])
            # Made anew, or addressed to it, in between: where nothing updates, that is what the target wants.
            anew = change.operation in ("insert", "snapshot")
            latest[change.key] = ("insert" if anew else earlier[0], change)
    return list(latest.values())


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
