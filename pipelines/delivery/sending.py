"""Get one claimed batch to its target: retry, halve, fall back, until every record's fate is known or the run gives up.

What is sent is what was written down: a batch that must go on in several requests is *split* in the ledger first, so
that after a crash each goes out again under the key that it had.
Whatever is known when the run gives up is reported; the rest stays claimed. What a record might be to blame for, though
it looks like the target's fault (a 500, a time-out), is *set aside* if others succeed: it stays claimed under its key,
and with it later changes of its keys; everything else goes on.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NoReturn
from uuid import UUID

import msgspec
import tenacity

from pipelines.changes.record import ChangeRecord, picked
from pipelines.delivery.batching import Batch
from pipelines.delivery.clock import Clock
from pipelines.delivery.gate import FREELY, Permit, TargetGate
from pipelines.delivery.holding import KeyHolds
from pipelines.delivery.idempotency import idempotency_key
from pipelines.delivery.judging import JudgingRules, judge
from pipelines.delivery.ledger import Claim, Settlement
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
    blocked,
)
from pipelines.delivery.planning import claim_of
from pipelines.delivery.retrying import backoff
from pipelines.delivery.routing import HttpRequest, Route, RouteOperation
from pipelines.delivery.target import Answer, NoAnswer, TargetClient
from pipelines.delivery.template import RecordUnrenderable

_ANY_TIME = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long one request's faults are borne, in seconds."""

    initial_backoff: float = 0.5
    max_backoff: float = 30.0
    max_elapsed: float = 60.0


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """What sending a batch came to."""

    settlement: Settlement
    """Of the batch, or of the last part of it; what was known before was reported."""
    latencies: Sequence[float]
    """Seconds from request to answer, one for each answer."""
    retries: int
    too_large: int | None = None
    """The smallest number of records that the target called too large (413)."""
    set_aside: int = 0
    """Records that stay claimed while the rest of the target goes on."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of a batch's records, to be sent in one request."""

    batch_id: int
    """As what they are written down."""
    operation: RouteOperation
    changes: Sequence[ChangeRecord]
    fragments: Sequence[bytes]
    key: UUID | None = None
    """As it is written down, if it is the whole of that."""
    fallen_back: bool = False
    fault: TargetFault | None = None
    """Why these records, sent with others before, are still undecided: so they wait like any retry."""
    out: bool = False
    """A first attempt was made already, so it is too late to let anything of it wait."""
    first: Answer | NoAnswer | None = None
    """What that came to, if it is known."""

    def pick(self, positions: Sequence[int]) -> "_Part":
        return replace(
            self,
            changes=picked(self.changes, positions),
            fragments=picked(self.fragments, positions),
            key=None,
        )


@dataclass(slots=True)
class _Tally:
    """What is known so far: of the whole batch that was claimed, and of the part of it that is written down as one."""

    batch_id: int
    supersedes: bool
    accepted: Sequence[ChangeRecord] = ()
    dead: list[DeadRecord] = field(default_factory=list)
    filtered: list[ChangeRecord] = field(default_factory=list)
    attempts: int = 0
    status: int | None = None
    seconds: float | None = None
    error: str | None = None
    suspect: bool = False
    latencies: list[float] = field(default_factory=list)
    retries: int = 0
    too_large: int | None = None
    set_aside: int = 0

    def hand_over(self, *, then: int | None = None) -> Settlement:
        """Return what is known of the part, and forget it here; *then* is the part that comes next."""
        known = Settlement(
            batch_id=self.batch_id,
            accepted=self.accepted,
            dead=self.dead,
            filtered=self.filtered,
            supersedes=self.supersedes,
            set_aside=self.suspect,
            attempts=self.attempts,
            status=self.status,
            seconds=self.seconds,
            error=self.error,
        )
        self.batch_id = self.batch_id if then is None else then
        self.accepted, self.dead, self.filtered = (), [], []
        self.attempts, self.status, self.seconds, self.error, self.suspect = 0, None, None, None, False
        return known


class DrainEnded(Exception):
    """The drain has failed elsewhere, and nothing more can be written down."""


class _GaveUp(Exception):
    """The run halts, or the budget for this request is spent and the target is to blame."""


class _SetAside(Exception):
    """The budget for this request is spent, and its records may be to blame."""


class Sender:
    """One lane's way to the target. Belongs to one thread at a time."""

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
        split: Callable[[int, Sequence[Claim]], Sequence[int]],
        holds: KeyHolds | None = None,
    ) -> None:
        self._log_id = log_id
        self._target = target
        self._client = client
        self._gate = gate
        self._rules = rules
        self._retry = retry
        self._clock = clock
        self._report = report
        self._split = split
        self._holds = KeyHolds() if holds is None else holds

    def begin(self, batch: Batch) -> HttpRequest | None:
        """Return the request of *batch*, which may be sent now; None if it might have to wait, or something before it.

        What is answered goes to `end`; what was not sent after all, to `send`.
        """
        if self._holds.concern(batch.changes) or self._gate.enter_at_once() is None:
            return None
        return batch.operation.request(batch.changes, batch.fragments)

    def end(self, batch_id: int, batch: Batch, answer: Answer | NoAnswer) -> Sent | None:
        """Return what *batch* came to by its first *answer*; None if that does not settle it, and `send` goes on."""
        if isinstance(answer, NoAnswer):
            return None
        changes = batch.changes
        # The time is asked for where something says how long to wait: `send` judges that again.
        verdict = judge(answer, operation=batch.operation, changes=changes, rules=self._rules, now=_ANY_TIME)
        if isinstance(verdict, Items):
            if len(verdict.accepted) != len(changes):
                return None
        elif not isinstance(verdict, Accepted):
            return None
        self._gate.accepted(len(changes), of=(batch.route.stream, batch.operation.kind))
        settlement = Settlement(
            batch_id=batch_id,
            accepted=changes,
            supersedes=batch.route.on_dead == "supersede",
            attempts=1,
            status=answer.status,
            seconds=answer.seconds,
        )
        return Sent(settlement=settlement, latencies=[answer.seconds], retries=0)

    def send(
        self,
        batch_id: int,
        batch: Batch,
        *,
        key: UUID,
        suspect: bool = False,
        claimed_as: int | None = None,
        out: bool = False,
        first: Answer | NoAnswer | None = None,
    ) -> Sent:
        """Deliver *batch* under its *key*, in order, as far as the target and the run allow.

        Of a batch that needs several requests, what is known is reported before the next is sent. A *suspect* was set
        aside by an earlier run: it is tried once. *claimed_as* is the batch that this is a part of, if it is. If it is
        *out*, a first attempt was made already; *first* is what that came to, if it is known.
        """
        tally = _Tally(batch_id, supersedes=batch.route.on_dead == "supersede")
        out = out or first is not None
        todo = deque([_Part(batch_id, batch.operation, batch.changes, batch.fragments, key, out=out, first=first)])
        with suppress(_GaveUp, DrainEnded):
            while todo:
                part = todo.popleft()
                if part.batch_id != tally.batch_id or tally.accepted or tally.dead or tally.filtered:
                    self._report(tally.hand_over(then=part.batch_id))
                if not part.out and not self._holds.empty:
                    waiting, part = self._set_waiting_keys_apart(part, batch, claimed_as or batch_id, tally)
                    tally.set_aside += waiting
                if part.changes:
                    todo.extendleft(reversed(self._deliver(part, batch, tally, suspect=suspect)))
        return Sent(
            settlement=tally.hand_over(),
            latencies=tally.latencies,
            retries=tally.retries,
            too_large=tally.too_large,
            set_aside=tally.set_aside,
        )

    def _set_waiting_keys_apart(self, part: _Part, batch: Batch, claimed_as: int, tally: _Tally) -> tuple[int, _Part]:
        """Leave out what must wait for an earlier change of its key: such a change was never sent, in no request.

        Returns how many stay claimed, and what goes.
        """
        going: list[int] = []
        waiting: list[int] = []
        for position, change in enumerate(part.changes):
            if self._holds.is_held(change):
                waiting.append(position)
            elif (dead := self._holds.blocked_by(change, batch_id=claimed_as)) is not None:
                tally.dead.append(blocked(change, dead))
            else:
                going.append(position)
        if not going or len(going) == len(part.changes):
            return len(waiting), part.pick(going)
        parts = self._write_down(part, [going, waiting] if waiting else [going], batch, tally)
        return len(waiting), parts[0]

    def _write_down(self, part: _Part, pieces: Sequence[Sequence[int]], batch: Batch, tally: _Tally) -> list[_Part]:
        """Have *part*, a batch in the ledger, stand there as *pieces* of it; what is known is written down first."""
        self._report(tally.hand_over())
        parts = [part.pick(positions) for positions in pieces]
        claims = [
            claim_of(
                msgspec.structs.replace(batch, operation=one.operation, changes=one.changes, fragments=one.fragments),
                log_id=self._log_id,
                target=self._target,
            )
            for one in parts
        ]
        batch_ids = self._split(part.batch_id, claims)
        tally.batch_id = batch_ids[0]
        return [replace(one, batch_id=batch_id) for one, batch_id in zip(parts, batch_ids, strict=True)]

    def _deliver(self, part: _Part, batch: Batch, tally: _Tally, *, suspect: bool) -> list[_Part]:
        """Send *part* and note what became of it; return what is to be sent in its place."""
        route = batch.route
        fault, first = part.fault, part.first
        if fault is not None or part.out:
            part = replace(part, fault=None, out=False, first=None)
        try:
            verdict = self._until_decided(part, fault, first, tally, suspect=suspect)
        except _SetAside:
            self._holds.hold(part.changes)
            tally.set_aside += len(part.changes)
            tally.suspect = True
            return []
        match verdict:
            case Accepted():
                self._note(tally, route, part.operation, accepted=part.changes)
                return []
            case Rejected():
                self._note(tally, route, part.operation, rejected=[(part.changes[0], verdict)])
                return []
            case Split():
                half = len(part.changes) // 2
                if verdict.too_large:
                    tally.too_large = min(tally.too_large or len(part.changes), len(part.changes))
                return self._write_down(part, [range(half), range(half, len(part.changes))], batch, tally)
            case Fallback():
                return self._fall_back(part, route, verdict.kind, tally)
            case Items():
                self._note(
                    tally,
                    route,
                    part.operation,
                    accepted=picked(part.changes, verdict.accepted),
                    rejected=[(part.changes[i], refusal) for i, refusal in verdict.rejected.items()],
                )
                return self._go_on(part, verdict, batch, tally)
            case _:  # pragma: no cover - _until_decided returns no other verdict
                raise AssertionError(verdict)

    def _go_on(self, part: _Part, items: Items, batch: Batch, tally: _Tally) -> list[_Part]:
        """Return what is to be sent of a part of which some records are not decided."""
        falling, again = part.pick(items.fallback), part.pick(items.retry)
        if items.retry and len(items.retry) < len(part.changes):
            pieces = [one for one in (items.fallback, items.retry) if one]
            *first, again = self._write_down(part, pieces, batch, tally)
            falling = first[0] if first else falling
        instead: list[_Part] = []
        if falling.changes:
            instead += self._fall_back(falling, batch.route, self._other(part.operation), tally)
        if again.changes:
            instead.append(replace(again, fault=TargetFault(reason=items.retry_reason, may_be_the_records=True)))
        return instead

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
            self._note(tally, route, part.operation, rejected=[(change, refusal) for change in part.changes])
            return []
        parts: list[_Part] = []
        for change in part.changes:
            try:
                fragment = other.render_record(change)
            except RecordUnrenderable as error:
                self._note(tally, route, other, rejected=[(change, Rejected(reason=str(error)))])
                continue
            if fragment is None:
                tally.filtered.append(change)
                continue
            parts.append(_Part(part.batch_id, other, [change], [fragment], fallen_back=True))
        return parts

    def _note(
        self,
        tally: _Tally,
        route: Route,
        operation: RouteOperation,
        *,
        accepted: Sequence[ChangeRecord] = (),
        rejected: Sequence[tuple[ChangeRecord, Rejected]] = (),
    ) -> None:
        # Nearly always all of a batch at once: so it stays as it is.
        tally.accepted = [*tally.accepted, *accepted] if tally.accepted else accepted
        for change, refusal in rejected:
            tally.error = refusal.reason
            if route.on_dead == "block":
                self._holds.block(change)
            tally.dead.append(
                DeadRecord(change=change, reason=refusal.reason, status=refusal.status, response=refusal.response)
            )
        self._gate.judge_records(accepted=len(accepted), dead=len(rejected), of=(route.stream, operation.kind))

    def _until_decided(
        self,
        part: _Part,
        fault: TargetFault | None,
        first: Answer | NoAnswer | None,
        tally: _Tally,
        *,
        suspect: bool,
    ) -> Verdict:
        """Send the same bytes under the same key until the answer is about the records; raises _GaveUp or _SetAside."""
        request = part.operation.request(part.changes, part.fragments)
        key = part.key or idempotency_key(self._log_id, self._target, part.operation.fingerprint, part.changes)

        def attempt(give_up_at: float | None, made: Answer | NoAnswer | None = None) -> Verdict:
            permit = FREELY if made is not None else self._gate.enter(give_up_at=give_up_at)
            if permit is None:
                raise _GaveUp
            answer = self._client.send(request, key=key) if made is None else made
            tally.attempts += 1
            tally.retries += give_up_at is not None
            if isinstance(answer, Answer):
                tally.latencies.append(answer.seconds)
                tally.status, tally.seconds = answer.status, answer.seconds
            verdict = judge(
                answer, operation=part.operation, changes=part.changes, rules=self._rules, now=self._clock.now()
            )
            again = give_up_at is not None
            return self._tell_gate(verdict, permit, tally, suspect=suspect, again=again)

        verdict = fault or attempt(None, first)
        if isinstance(verdict, TargetFault):
            if suspect and verdict.may_be_the_records and not self._is_to_be_left_alone():
                raise _SetAside
            verdict = self._retry_until_decided(attempt, verdict, tally)
        return verdict

    def _tell_gate(self, verdict: Verdict, permit: Permit, tally: _Tally, *, suspect: bool, again: bool) -> Verdict:
        match verdict:
            case TargetFault():
                tally.error = verdict.reason
                self._gate.failed(
                    permit,
                    verdict.reason,
                    retry_after=verdict.retry_after,
                    excused=suspect and verdict.may_be_the_records,
                    again=again and verdict.may_be_the_records,
                )
            case Pause():
                tally.error = verdict.reason
                self._gate.pause(verdict, permit)
                raise _GaveUp
            case Items() if not (verdict.accepted or verdict.rejected or verdict.fallback):
                # Not one record is decided: the batch must not go round and round, so it counts as a fault.
                fault = TargetFault(reason=verdict.retry_reason, may_be_the_records=True)
                return self._tell_gate(fault, permit, tally, suspect=suspect, again=again)
            case _:
                self._gate.succeeded()
        return verdict

    def _retry_until_decided(
        self, attempt: Callable[[float | None], Verdict], fault: TargetFault, tally: _Tally
    ) -> Verdict:
        give_up_at = self._clock.monotonic() + self._retry.max_elapsed
        successes = self._gate.successes
        first: list[Verdict] = [fault]  # the attempt that brought us here is the first of the series
        unknown, conflict = False, None

        def attempt_again() -> Verdict:
            nonlocal unknown, conflict
            verdict = first.pop() if first else attempt(give_up_at)
            conflict = None
            if isinstance(verdict, TargetFault):
                unknown |= verdict.outcome_unknown
            elif unknown and self._is_conflict(verdict):
                conflict = verdict
                return TargetFault(reason="answered 409, perhaps because an earlier attempt is still in work")
            return verdict

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
            verdict: Verdict = retrying(attempt_again)
        except _GaveUp:
            self._give_up(fault, successes, tally)
        if conflict is not None:
            return conflict  # it stays, so the record itself is what is in conflict
        if isinstance(verdict, TargetFault):
            self._give_up(verdict, successes, tally)
        return verdict

    def _is_conflict(self, verdict: Verdict) -> bool:
        """Say whether it is a 409, with which a target that keeps keys refuses one whose request it is still at.

        Were that taken for a refusal, a record would be buried that the target is about to have, or the halves of a
        batch sent under keys of their own beside the whole. (draft-ietf-httpapi-idempotency-key-header §2.6.)
        """
        return isinstance(verdict, Rejected | Split) and verdict.status == 409 and 409 not in self._rules.drop_on

    def _give_up(self, fault: TargetFault, successes: int, tally: _Tally) -> NoReturn:
        """Halt the run's sending, for the target has been unwell for too long; or doubt that it is the target."""
        if self._gate.halt is None:
            if fault.may_be_the_records and not self._is_to_be_left_alone():
                self._gate.doubt(since=successes)
                raise _SetAside
            self._gate.defer(fault.reason, retry_after=self._gate.held_for() or None)
        halt = self._gate.halt
        # The next run is to find out by another batch whether the target is well: it might be this one's fault.
        tally.suspect |= fault.may_be_the_records and halt is not None and halt.cause == "deferred"
        raise _GaveUp

    def _is_to_be_left_alone(self) -> bool:
        """Say whether the target asked for more time than a request is tried for: then no other goes out either."""
        return self._gate.held_for() > self._retry.max_elapsed


def _is_fault(verdict: Verdict) -> bool:
    return isinstance(verdict, TargetFault)
