"""What a target would be sent next, worked out as a drain does it, and written down nowhere."""

import gzip
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.delivery.batching import Batch, Lanes
from pipelines.delivery.drain import DrainPolicy
from pipelines.delivery.ledger import PendingWindow, Upcoming
from pipelines.delivery.outcome import DeadRecord
from pipelines.delivery.planning import plan_leftover, plan_window
from pipelines.delivery.routing import Route
from pipelines.delivery.template import RecordUnrenderable
from pipelines.operating.masking import Masking

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
    masking: Masking,
) -> Preview:
    """Plan *upcoming* and render the first *show* requests, their changes masked.

    What was claimed comes first and under other routes than it was claimed by, as it would now.
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
        refused=_by_reason(dead, routes, masking),
        shown=[_shown(batch, masking) for batch in batches[:show]],
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
        some = ", ".join(dict.fromkeys(keys[:3])) + (", …" if len(keys) > 3 else "")
        yield f"  {stream}: {len(keys):,} would be dead letters: {reason} ({some})"
    for request in previewed.shown:
        yield f"  {request.method} {request.path}  ({request.records:,} of {request.stream})"
        if request.body:
            yield f"    {request.body}"


def _by_reason(
    dead: Sequence[DeadRecord], routes: Mapping[str, Route], masking: Masking
) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for record in dead:
        reason = record.reason
        if masking and record.blocked_by is None and reason not in _masked_reasons(record, routes, masking):
            reason = "for the sake of a value that is masked"
        found.setdefault((record.change.stream, reason), []).append(masking.key_of(record.change))
    return found


def _masked_reasons(record: DeadRecord, routes: Mapping[str, Route], masking: Masking) -> Iterator[str]:
    """Yield why the change could not be rendered if it were as it may be shown: so no masked value is in the reason."""
    for operation in routes[record.change.stream].operations.values():
        try:
            operation.render_record(masking.masked(record.change))
        except RecordUnrenderable as error:
            yield str(error)


def _shown(batch: Batch, masking: Masking) -> PreviewedRequest:
    operation = batch.operation
    body = ""
    try:
        changes, fragments = batch.changes, batch.fragments
        if masking:
            changes = [masking.masked(change) for change in changes]
            rendered = [operation.render_record(change) for change in changes]
            fragments = [fragment for fragment in rendered if fragment is not None]
            if len(fragments) < len(changes):
                raise RecordUnrenderable("the transform passes over some of its changes then")
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
