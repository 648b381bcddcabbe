"""What a target would be sent next, worked out as a drain does it, and written down nowhere."""

import gzip
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.drain import DrainPolicy
from pipelines.delivery.ledger import PendingWindow, Upcoming
from pipelines.delivery.outcome import DeadRecord
from pipelines.delivery.planning import Batch, Lanes, plan_leftover, plan_window
from pipelines.delivery.routing import Route
from pipelines.delivery.template import RecordUnrenderable

MASK = "***"
_LONGEST_BODY = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedRequest:
    """One request as it would be sent, its masked columns left out."""

    stream: str
    operation: str
    method: str
    path: str
    records: int
    body: str
    """Text, cut where it is long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What the next window of a target comes to."""

    looked_at: int
    """Changes: claimed and pending ones."""
    more: bool
    """There are others behind them."""
    records: Mapping[tuple[str, str], int]
    """To be sent, by stream and operation."""
    requests: Mapping[tuple[str, str], int]
    superseded: int
    filtered: int
    refused: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    """The keys of what would be a dead letter before anything is sent, by stream and reason."""
    shown: Sequence[PreviewedRequest] = ()


def preview(
    upcoming: Upcoming,
    *,
    policy: DrainPolicy,
    routes: Mapping[str, Route],
    show: int,
    mask: Collection[str],
) -> Preview:
    """Plan *upcoming* and render the first *show* requests, with *mask* in place of these columns' values.

    `_key` masks the key. What was claimed comes first and under other routes than it was claimed by, as it would now.
    """
    blocking = {stream for stream, route in routes.items() if route.on_dead == "block"}
    blocks = {key: dead for key, dead in upcoming.blocked.items() if key[0] in blocking}
    plans = [plan_leftover(left, routes=routes, blocks=blocks) for left in upcoming.leftovers]
    planned = plan_window(
        PendingWindow(records=upcoming.pending, complete=not upcoming.more, decided_up_to=None),
        log_id=upcoming.log_id,
        target=policy.target,
        routes=routes,
        lanes=Lanes(records=[0] * policy.max_in_flight),
        max_records_of=lambda _, operation: operation.max_records,
        blocked_keys=blocks,
    )
    batches = [*(batch for plan in plans for batch in plan.batches), *planned.batches]
    dead = [*(record for plan in plans for record in plan.dead), *planned.window.dead]
    records, requests = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for batch in batches:
        kind = (batch.route.stream, batch.operation.kind)
        records[kind] += len(batch.changes)
        requests[kind] += 1
    return Preview(
        looked_at=len(upcoming.pending) + sum(len(left.changes) for left in upcoming.leftovers),
        more=upcoming.more,
        records=records,
        requests=requests,
        superseded=len(planned.window.superseded),
        filtered=len(planned.window.filtered) + sum(len(plan.filtered) for plan in plans),
        refused=_by_reason(dead),
        shown=[_shown(batch, frozenset(mask)) for batch in batches[:show]],
    )


def lines_of(name: str, previewed: Preview) -> Iterator[str]:
    """Yield what a person is told of a target's preview."""
    first = "the first " if previewed.more else ""
    yield f"{name}: of {first}{previewed.looked_at:,} changes that are owed"
    for (stream, operation), count in sorted(previewed.records.items()):
        requests = previewed.requests[(stream, operation)]
        yield f"  {stream} {operation}: {count:,} in {requests:,} request{'s' if requests != 1 else ''}"
    for what in ("superseded", "filtered"):
        if number := getattr(previewed, what):
            yield f"  {what}: {number:,}"
    for (stream, reason), keys in sorted(previewed.refused.items()):
        some = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
        yield f"  {stream}: {len(keys):,} would be dead letters: {reason} ({some})"
    for request in previewed.shown:
        yield f"  {request.method} {request.path}  ({request.records:,} of {request.stream})"
        if request.body:
            yield f"    {request.body}"


def _by_reason(dead: Sequence[DeadRecord]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for record in dead:
        found.setdefault((record.change.stream, record.reason), []).append(record.change.key)
    return found


def _shown(batch: Batch, mask: frozenset[str]) -> PreviewedRequest:
    operation = batch.operation
    body = ""
    try:
        changes, fragments = batch.changes, batch.fragments
        if mask:
            changes = [_masked(change, mask) for change in changes]
            rendered = [operation.render_record(change) for change in changes]
            fragments = [fragment for fragment in rendered if fragment is not None]
        request = operation.request(changes, fragments)
        method, path = request.method, request.path
        if request.body:
            text = gzip.decompress(request.body) if request.compressed else request.body
            body = text[:_LONGEST_BODY].decode("utf-8", "replace") + (" …" if len(text) > _LONGEST_BODY else "")
    except RecordUnrenderable as error:
        method, path, body = "", "", f"cannot be shown with its columns masked: {error}"
    return PreviewedRequest(
        stream=batch.route.stream,
        operation=operation.kind,
        method=method,
        path=path,
        records=len(batch.changes),
        body=body,
    )


def _masked(change: ChangeRecord, mask: frozenset[str]) -> ChangeRecord:
    row: Any = msgspec.json.decode(change.payload)
    if isinstance(row, dict):
        row = {column: MASK if column in mask else value for column, value in row.items()}
    key = MASK if "_key" in mask else change.key
    return change._replace(payload=msgspec.json.encode(row), key=key)
