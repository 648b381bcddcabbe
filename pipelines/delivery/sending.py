"""Get one claimed batch to its target: retry, halve, fall back, until every record's fate is known or the run gives up.

Whatever is known when the run gives up is reported; the rest stays claimed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

import tenacity

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.clock import Clock
from pipelines.delivery.gate import Permit, TargetGate
from pipelines.delivery.idempotency import idempotency_key
from pipelines.delivery.judging import JudgingRules, judge
from pipelines.delivery.ledger import Settlement
from pipelines.delivery.outcome import (
    Accepted,
    DeadRecord,
    Fallback,
    Items,
    OperationKind,
    Pause,
    Rejected,
    Split,
    TargetFault,
    Verdict,
)
from pipelines.delivery.planning import Batch
from pipelines.delivery.retrying import backoff
from pipelines.delivery.routing import Route, RouteOperation
from pipelines.delivery.target import Answer, TargetClient
from pipelines.delivery.template import RecordUnrenderable


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long one request's faults are borne, in seconds."""

    initial_backoff: float = 0.5
    max_backoff: float = 30.0
    max_elapsed: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What sending a batch came to."""

    settlement: Settlement
    latencies: Sequence[float]
    """Seconds from request to answer, one for each answer."""
    retries: int
    too_large: int | None = None
    """The smallest number of records that the target called too large (413)."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of a batch's records, to be sent in one request."""

    operation: RouteOperation
    changes: Sequence[ChangeRecord]
    fragments: Sequence[bytes]
    fallen_back: bool = False
    fault: TargetFault | None = None
    """Why these records, sent with others before, are still undecided: so they wait like any retry."""

    def pick(self, positions: Sequence[int]) -> "_Part":
        return _Part(
            self.operation,
            [self.changes[i] for i in positions],
            [self.fragments[i] for i in positions],
            self.fallen_back,
        )


@dataclass(slots=True)
class _Tally:
    """What is known of a batch so far."""

    accepted: list[ChangeRecord] = field(default_factory=list)
    dead: list[DeadRecord] = field(default_factory=list)
    filtered: list[ChangeRecord] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    attempts: int = 0
    retries: int = 0
    status: int | None = None
    error: str | None = None
    too_large: int | None = None

    def hand_over(self, batch_id: int) -> Settlement:
        """Return what is known so far, and forget it here."""
        known = Settlement(
            batch_id=batch_id, accepted=self.accepted, dead=self.dead, filtered=self.filtered, finished=False
        )
        self.accepted, self.dead, self.filtered = [], [], []
        return known


class _GaveUp(Exception):
    """The run halts, or the budget for this request is spent."""


class Sender:
    """One lane's way to the target. Belongs to one thread."""

    def __init__(
        self,
        *,
        log_id: UUID,
        target: str,
        client: TargetClient,
        gate: TargetGate,
        rules: JudgingRules,
        retry: RetryPolicy,
        clock: Clock,
        report: Callable[[Settlement], None] = lambda _: None,
    ) -> None:
        self._log_id = log_id
        self._target = target
        self._client = client
        self._gate = gate
        self._rules = rules
        self._retry = retry
        self._clock = clock
        self._report = report

    def send(self, batch_id: int, batch: Batch) -> Sent:
        """Deliver *batch*, in order, as far as the target and the run allow.

        Of a batch that needs several requests, what is known is reported before the next is sent: after a crash it must
        not go out again under another key.
        """
        tally = _Tally()
        todo = deque([_Part(batch.operation, batch.changes, batch.fragments)])
        finished = True
        try:
            while todo:
                part = todo.popleft()
                todo.extendleft(reversed(self._deliver(part, batch.route, tally)))
                if todo and (tally.accepted or tally.dead or tally.filtered):
                    self._report(tally.hand_over(batch_id))
        except _GaveUp:
            finished = False
        settlement = Settlement(
            batch_id=batch_id,
            accepted=tally.accepted,
            dead=tally.dead,
            filtered=tally.filtered,
            finished=finished,
            attempts=tally.attempts,
            status=tally.status,
            seconds=tally.latencies[-1] if tally.latencies else None,
            error=tally.error,
        )
        return Sent(settlement=settlement, latencies=tally.latencies, retries=tally.retries, too_large=tally.too_large)

    def _deliver(self, part: _Part, route: Route, tally: _Tally) -> list[_Part]:
        """Send *part* and note what became of it; return what is to be sent in its place."""
        verdict = self._until_decided(part, tally)
        match verdict:
            case Accepted():
                self._note(tally, accepted=part.changes)
                return []
            case Rejected():
                self._note(tally, rejected=[(part.changes[0], verdict)])
                return []
            case Split():
                half = len(part.changes) // 2
                if verdict.too_large:
                    tally.too_large = min(tally.too_large or len(part.changes), len(part.changes))
                return [part.pick(range(half)), part.pick(range(half, len(part.changes)))]
            case Fallback():
                return self._fall_back(part, route, verdict.kind, tally)
            case Items():
                self._note(
                    tally,
                    accepted=[part.changes[i] for i in verdict.accepted],
                    rejected=[(part.changes[i], refusal) for i, refusal in verdict.rejected.items()],
                )
                instead: list[_Part] = []
                if verdict.fallback:
                    instead += self._fall_back(part.pick(verdict.fallback), route, self._other(part.operation), tally)
                if verdict.retry:
                    fault = TargetFault(reason=verdict.retry_reason)
                    instead.append(replace(part.pick(verdict.retry), fault=fault))
                return instead
            case _:  # pragma: no cover - _until_decided returns no other verdict
                raise AssertionError(verdict)

    @staticmethod
    def _other(operation: RouteOperation) -> OperationKind:
        other = operation.on_conflict or operation.on_missing
        assert other is not None  # a fallback verdict is given only where one is configured
        return other

    def _fall_back(self, part: _Part, route: Route, kind: OperationKind, tally: _Tally) -> list[_Part]:
        """Return *part* as the route's other operation; one that has fallen back once already is refused."""
        other = route.operations.get(kind)
        if part.fallen_back or other is None:
            reason = f"'{part.operation.kind}' and its fallback '{kind}' were both refused"
            refusal = Rejected(reason=reason, status=tally.status)
            self._note(tally, rejected=[(change, refusal) for change in part.changes])
            return []
        parts: list[_Part] = []
        for change in part.changes:
            try:
                fragment = other.render_record(change)
            except RecordUnrenderable as error:
                self._note(tally, rejected=[(change, Rejected(reason=str(error)))])
                continue
            if fragment is None:
                tally.filtered.append(change)
                continue
            parts.append(_Part(other, [change], [fragment], fallen_back=True))
        return parts

    def _note(
        self,
        tally: _Tally,
        *,
        accepted: Sequence[ChangeRecord] = (),
        rejected: Sequence[tuple[ChangeRecord, Rejected]] = (),
    ) -> None:
        tally.accepted.extend(accepted)
        for change, refusal in rejected:
            tally.error = refusal.reason
            tally.dead.append(
                DeadRecord(change=change, reason=refusal.reason, status=refusal.status, response=refusal.response)
            )
        self._gate.judge_records(accepted=len(accepted), dead=len(rejected))

    def _until_decided(self, part: _Part, tally: _Tally) -> Verdict:
        """Send the same bytes under the same key until the answer is about the records; raises _GaveUp."""
        request = part.operation.request(part.changes, part.fragments)
        key = idempotency_key(self._log_id, self._target, part.operation.fingerprint, part.changes)

        def attempt(give_up_at: float | None) -> Verdict:
            permit = self._gate.enter(give_up_at=give_up_at)
            if permit is None:
                raise _GaveUp
            answer = self._client.send(request, key=key)
            tally.attempts += 1
            tally.retries += give_up_at is not None
            if isinstance(answer, Answer):
                tally.latencies.append(answer.seconds)
                tally.status = answer.status
            verdict = judge(
                answer, operation=part.operation, changes=part.changes, rules=self._rules, now=self._clock.now()
            )
            return self._tell_gate(verdict, permit, tally)

        verdict = part.fault or attempt(None)
        if _is_fault(verdict):
            verdict = self._retry_until_decided(attempt, verdict)
        return verdict

    def _tell_gate(self, verdict: Verdict, permit: Permit, tally: _Tally) -> Verdict:
        match verdict:
            case TargetFault():
                tally.error = verdict.reason
                self._gate.failed(permit, verdict.reason, retry_after=verdict.retry_after)
            case Pause():
                tally.error = verdict.reason
                self._gate.pause(verdict, permit)
                raise _GaveUp
            case Items() if not (verdict.accepted or verdict.rejected or verdict.fallback):
                # Not one record is decided: the batch must not go round and round, so it counts as a fault.
                fault = TargetFault(reason=verdict.retry_reason)
                return self._tell_gate(fault, permit, tally)
            case _:
                self._gate.succeeded()
        return verdict

    def _retry_until_decided(self, attempt: Callable[[float | None], Verdict], fault: Verdict) -> Verdict:
        give_up_at = self._clock.monotonic() + self._retry.max_elapsed
        first = [fault]  # the attempt that brought us here is the first of the series

        def attempt_again() -> Verdict:
            return first.pop() if first else attempt(give_up_at)

        def out_of_time(state: tenacity.RetryCallState) -> bool:
            wait = max(state.upcoming_sleep, self._gate.held_for())
            return self._clock.monotonic() + wait > give_up_at

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(_is_fault),
            wait=backoff(initial_backoff=self._retry.initial_backoff, max_backoff=self._retry.max_backoff),
            stop=out_of_time,
            sleep=self._gate.pause_lane,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else fault,
        )
        try:
            verdict = retrying(attempt_again)
        except _GaveUp:
            self._defer(fault)
            raise
        if _is_fault(verdict):
            self._defer(verdict)
            raise _GaveUp
        return verdict

    def _defer(self, fault: Verdict) -> None:
        """Halt the run's sending, unless it halts already: the target has been unwell for too long."""
        if self._gate.halt is None:
            assert isinstance(fault, TargetFault)
            self._gate.defer(fault.reason, retry_after=self._gate.held_for() or None)


def _is_fault(verdict: Verdict) -> bool:
    return isinstance(verdict, TargetFault)
