"""One target's delivery loop: claim a window, send it on all lanes, settle what came back, and again.

The loop's own thread is the only one that touches the ledger; the lanes, each with a client of its own, have theirs
(`pipelines/delivery/lanes.py`). The window slides: new batches are claimed while earlier ones are still out, so no lane
waits for the slowest. A key that is in flight has one lane; as soon as it is not, its next change may take another.

A batch that was set aside before is a *suspect*: it, and not the target, may be what is wrong. If the target was left
unwell, others are sent first, so that a suspect does not stand for it; if it was left well, a suspect is tried once.
"""

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat
from queue import Empty, SimpleQueue
from typing import cast

from pipelines.changes.record import ChangeRecord, keys, streams
from pipelines.delivery.batching import Batch, Lanes
from pipelines.delivery.breaker import Breaker
from pipelines.delivery.clock import Clock
from pipelines.delivery.gate import Halt, TargetGate
from pipelines.delivery.holding import Key, KeyHolds, key_of
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.lanes import LanePool, Told, Work
from pipelines.delivery.ledger import Claim, Leftover, Settlement, TargetLedger, TargetState
from pipelines.delivery.outcome import DeadRecord
from pipelines.delivery.planning import LeftoverPlan, claim_of, plan_leftover, plan_window
from pipelines.delivery.rate_limit import TokenBucket
from pipelines.delivery.report import DrainReport, End, Recorder
from pipelines.delivery.routing import Route, RouteOperation
from pipelines.delivery.sending import DrainEnded, RetryPolicy, Sender, Sent
from pipelines.delivery.target import TargetClient

_COLLECT_AFTER = (50_000, 20, 100)
_FIRST_WINDOW = 1_000
_SMALLEST_WINDOW, _LARGEST_WINDOW = 10_000, 40_000
_WINDOW_PER_FLIGHT = 3
_LONGEST_HOLD = 300.0
_TICK = 0.05
_BETWEEN_COMMITS = 0.05
_LONGEST_DEAF = 0.2
_HEARTBEAT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """Requests that the target allows."""

    requests_per_second: float
    burst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainPolicy:
    """How one target is to be treated. Times are in seconds."""

    target: str
    max_in_flight: int = 4
    rate_limit: RateLimit | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    failure_threshold: int = 5
    error_timeout: float = 30.0
    dead_letter_guard: float = 0.5
    probe_interval: float = 300.0
    rules: JudgingRules = field(default_factory=JudgingRules)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainLimits:
    """How long a drain may go on, in seconds, and how much it may hold in memory."""

    linger_seconds: float = 0.0
    poll_seconds: float = 0.25
    max_seconds: float | None = None
    window_records: int | None = None
    """By default so many that all lanes stay busy (`window_for`)."""
    window_bytes: int = 32_000_000


class StopRequest:
    """What a signal's handler sets. No lock: a second signal may come while the first is being handled."""

    def __init__(self) -> None:
        self._asked = False

    def set(self) -> None:
        """Ask the drain to end."""
        self._asked = True

    def is_set(self) -> bool:
        """Say whether it was asked to."""
        return self._asked


def drain(
    *,
    policy: DrainPolicy,
    routes: Mapping[str, Route],
    ledger: TargetLedger,
    connect: Callable[[], TargetClient],
    clock: Clock,
    limits: DrainLimits,
    stop: StopRequest | None = None,
    on_progress: Callable[[Recorder], None] | None = None,
) -> DrainReport:
    """Deliver all that the target is owed; return when it has caught up and lingered, or cannot go on.

    A target's faults are values in the report, never exceptions. *connect* makes one lane's client. *stop*, once set,
    lets the drain claim nothing new, finish what is in flight, settle and return.
    """
    state = ledger.state()
    with _collecting_seldom():
        return _Loop(
            policy=policy,
            routes=routes,
            ledger=ledger,
            connect=connect,
            clock=clock,
            limits=limits,
            stop=stop or StopRequest(),
            on_progress=on_progress or (lambda _: None),
            state=state,
        ).run()


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Have Python look for reference cycles seldom: a drain makes few, and looking through windows is dear.

    What is there by now (modules, Dagster) is not looked through at all.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def window_for(*, max_in_flight: int, max_records: int) -> int:
    """Return how many records a drain must hold so that no lane waits: the next are read when half of them are done.

    Of requests that may hold very many, no more than memory and a stop request's patience allow.
    """
    return min(_LARGEST_WINDOW, max(_SMALLEST_WINDOW, _WINDOW_PER_FLIGHT * max_in_flight * max_records))


def _most_records(routes: Mapping[str, Route]) -> int:
    """Return how many records the largest of all requests may hold."""
    return max((one.max_records for route in routes.values() for one in route.operations.values()), default=1)


def _bucket(limit: RateLimit | None, now: float) -> TokenBucket | None:
    if limit is None:
        return None
    return TokenBucket.full(requests_per_second=limit.requests_per_second, burst=limit.burst, now=now)


@dataclass(frozen=True, slots=True)
class _Split:
    """A lane's request to write a batch down as several; it waits for the answer."""

    batch_id: int
    parts: Sequence[Claim]
    answer: SimpleQueue[Sequence[int]] = field(default_factory=SimpleQueue)


class _Loop:
    """One call of `drain`."""

    def __init__(
        self,
        *,
        policy: DrainPolicy,
        routes: Mapping[str, Route],
        ledger: TargetLedger,
        connect: Callable[[], TargetClient],
        clock: Clock,
        limits: DrainLimits,
        stop: StopRequest,
        on_progress: Callable[[Recorder], None],
        state: TargetState,
    ) -> None:
        self._policy, self._routes, self._ledger = policy, routes, ledger
        self._connect, self._clock, self._limits, self._stop = connect, clock, limits, stop
        self._on_progress = on_progress
        self._window_records = limits.window_records or window_for(
            max_in_flight=policy.max_in_flight, max_records=_most_records(routes)
        )
        self._unwell = state.failed_runs > 0 or state.status != "active"
        self._earlier_failed_runs = state.failed_runs
        self._waited = state.retry_at is not None and not self._unwell  # batches were set aside
        self._log_id = state.log_id
        now = clock.monotonic()
        self._started_at, self._busy_until = now, now
        self._gate = TargetGate(
            clock=clock,
            # A target left unwell gets one request first, whatever the clock says: this run was asked for.
            breaker=Breaker(
                failure_threshold=policy.failure_threshold,
                error_timeout=policy.error_timeout,
                open_until=now if self._unwell else None,
            ),
            bucket=_bucket(policy.rate_limit, now),
            dead_letter_guard=policy.dead_letter_guard,
            one_probe=self._unwell,
        )
        self._results: SimpleQueue[object] = SimpleQueue()
        self._lanes: LanePool | None = None
        self._records_of_lane = [0] * policy.max_in_flight
        self._arrived: deque[object] = deque()
        self._unwritten: list[Settlement] = []
        self._done_records = self._done_bytes = 0  # held until what became of them is written
        self._outstanding: dict[int, Work] = {}  # by batch id, in the order in which they were handed out
        self._held_records = 0
        self._held_bytes = 0
        self._more, self._read_at, self._read_nothing = True, now, False
        # The first window is small, so that the lanes have something to do while the next, twice as large, is planned.
        self._largest_window = _FIRST_WINDOW
        self._touched_at = self._committed_at = now
        self._learned: dict[tuple[str, str], int] = {}
        self._holds = KeyHolds()
        self._blocking = frozenset(stream for stream, route in routes.items() if route.on_dead == "block")
        self._last_batch = 0
        self._suspects_wait = False
        self._aside = _Aside()
        self._failed = threading.Event()
        self._recorder = Recorder()

    def run(self) -> DrainReport:
        try:
            self._send_leftovers(suspects=not self._unwell)
            self._deliver_pending()
        except BaseException:
            self._failed.set()
            self._gate.stop("the drain failed")
            self._close_lanes()
            self._settle_what_came_late()
            raise
        self._close_lanes()
        return self._conclude()

    def _settle_what_came_late(self) -> None:
        """Write down what lanes were still told while the drain was ending: what is known must not be sent again."""
        while self._arrived or self._unwritten or not self._results.empty():
            try:
                self._settle_some()
            except Exception:  # the drain's own failure is the one to raise
                if self._unwritten:
                    return  # the ledger still fails, and nothing later may be written without this

    def _send_leftovers(self, *, suspects: bool) -> None:
        """Send what an earlier drain claimed, as written, and wait for it: nothing new may overtake it.

        Without *suspects*, their keys wait instead.
        """
        parts = self._ledger.leftovers(
            # Half of what may be held: a part is still here while the next is read.
            max_records=max(1, self._window_records // 2),
            max_bytes=max(1, self._limits.window_bytes // 2),
        )
        for leftovers in parts:
            self._send_part_of_leftovers(leftovers, suspects=suspects)
            if self._gate.halt is not None:
                return

    def _send_part_of_leftovers(self, leftovers: Sequence[Leftover], *, suspects: bool) -> None:
        blocks = self._blocked([change for left in leftovers for change in left.changes])
        plans = [(left, plan_leftover(left, routes=self._routes, blocks=blocks)) for left in leftovers]
        self._gate.judge_rendering(
            rendered=sum(len(batch.changes) for _, plan in plans for batch in plan.batches),
            unrenderable=sum(plan.unrenderable for _, plan in plans),
        )
        self._last_batch = max([self._last_batch, *(left.batch_id for left in leftovers)])
        lane_of_key: dict[Key, int] = {}
        for left, plan in plans:
            if self._lanes_differ(left, lane_of_key):
                # Claimed when the one or the other was not in flight, or by runs with other numbers of lanes: a key's
                # batches must not go side by side.
                self._finish_outstanding()
                lane_of_key.clear()
            lane_of_key.update(dict.fromkeys(map(key_of, left.changes), left.lane % self._policy.max_in_flight))
            if self._gate.halt is not None:
                break
            if left.set_aside and not suspects:
                self._suspects_wait = True
                self._holds.hold(left.changes)
            else:
                self._dispatch_leftover(left, plan)
        self._finish_outstanding()

    def _lanes_differ(self, left: Leftover, lane_of_key: Mapping[Key, int]) -> bool:
        lane = left.lane % self._policy.max_in_flight
        return any(lane_of_key.get(key_of(change), lane) != lane for change in left.changes)

    def _send_suspects(self) -> None:
        """Send again whatever is claimed and was not delivered, the suspects with it."""
        self._finish_outstanding()
        self._suspects_wait = False
        self._holds.release_all()
        self._aside = _Aside()
        self._send_leftovers(suspects=True)

    def _is_time_for_what_was_set_aside(self) -> bool:
        """Say whether to try it again in this run: one that always finds more to do may go on for long."""
        if not self._aside.times:
            return False
        waited = self._clock.monotonic() - self._aside.since
        return waited >= self._longer_and_longer(self._aside.times)

    def _blocked(self, changes: Sequence[ChangeRecord]) -> dict[Key, int]:
        """Return which keys of *changes* have a dead change that blocks them."""
        if not self._blocking:
            return {}
        asked = {key for key in zip(streams(changes), keys(changes), strict=True) if key[0] in self._blocking}
        return dict(self._ledger.blocked(asked)) if asked else {}

    def _deliver_pending(self) -> None:
        caught_up_at: float | None = None
        while True:
            self._halt_if_stopped()
            if self._gate.halt is not None:
                self._finish_outstanding()
                return
            if self._gate.healthy and (self._suspects_wait or self._is_time_for_what_was_set_aside()):
                self._send_suspects()
                continue
            if self._should_read():
                self._claim()
            if self._outstanding:
                caught_up_at = None
                self._settle_some()
                self._busy_until = self._clock.monotonic()
            elif self._suspects_wait:
                self._send_suspects()  # there is nothing else by which to find out whether the target is well
            elif self._read_nothing:
                now = self._clock.monotonic()
                caught_up_at = now if caught_up_at is None else caught_up_at
                if now - caught_up_at >= self._limits.linger_seconds:
                    return
                self._linger(self._limits.poll_seconds)

    def _linger(self, seconds: float) -> None:
        """Wait; a stop request, which cannot wake anybody, is looked at again and again."""
        until = self._clock.monotonic() + seconds
        while not self._stop.is_set() and (left := until - self._clock.monotonic()) > 0:
            with suppress(Empty):
                self._results.put(self._results.get(timeout=min(left, _LONGEST_DEAF)))
                return  # a lane broke: `_settle_some` sees to it

    def _keep_lock(self) -> None:
        """Notice while lanes wait and retry that the lock was lost with its connection: another may drain now."""
        now = self._clock.monotonic()
        if now - self._touched_at >= _HEARTBEAT:
            self._touched_at = now
            self._ledger.check()

    def _should_read(self) -> bool:
        """Read on while there is known to be more and room for it; else now and then, and whenever idle."""
        if not self._outstanding:
            return True
        if self._held_records > self._window_records // 2:
            return False
        if self._held_bytes > self._limits.window_bytes // 2:
            return False
        return self._more or self._clock.monotonic() - self._read_at >= self._limits.poll_seconds

    def _halt_if_stopped(self) -> None:
        if self._stop.is_set():
            self._gate.stop("the run was asked to stop")
        elif (
            self._limits.max_seconds is not None
            and self._clock.monotonic() - self._started_at >= self._limits.max_seconds
        ):
            self._gate.stop(f"max_seconds ({self._limits.max_seconds:g}) passed")

    def _finish_outstanding(self) -> None:
        while self._outstanding:
            self._halt_if_stopped()
            self._settle_some()

    def _claim(self) -> None:
        """Write the next window down and hand its batches to the lanes."""
        if self._holds.blocks_unwritten:
            return  # first the refusal, then what is dead because of it
        pending = self._ledger.pending(
            max_records=min(self._largest_window, self._window_records - self._held_records),
            max_bytes=self._limits.window_bytes - self._held_bytes,
        )
        self._largest_window = min(2 * self._largest_window, self._window_records)
        self._more, self._read_at = not pending.complete, self._clock.monotonic()
        self._read_nothing = not pending.records
        if not pending.records and pending.decided_up_to is None:
            return
        plan = plan_window(
            pending,
            log_id=self._log_id,
            target=self._policy.target,
            routes=self._routes,
            lanes=Lanes(in_flight=self._in_flight, records=self._records_of_lane),
            max_records_of=self._max_records_of,
            blocked_keys=self._blocked(pending.records),
        )
        sendable = sum(len(batch.changes) for batch in plan.batches)
        self._gate.judge_rendering(rendered=sendable, unrenderable=plan.unrenderable)
        if self._gate.halt is not None:
            return  # nothing of the window is written down: no record is buried for a wrong mapping
        batch_ids = self._ledger.claim(plan.window)
        self._recorder.count("superseded", plan.window.superseded)
        self._recorder.count("filtered", plan.window.filtered)
        self._recorder.bury(plan.window.dead)
        self._last_batch = max(batch_ids, default=self._last_batch)
        for batch_id, batch, claim in zip(batch_ids, plan.batches, plan.window.claims, strict=True):
            self._dispatch(Work(batch_id, batch, claim.idempotency_key))

    def _in_flight(self, stream: str, wanted: AbstractSet[str]) -> Mapping[str, Batch]:
        """Return, for each key of *stream* that is in flight, the last batch with it; nothing if none is *wanted*.

        Gathered when a window is planned: to take each key out again when its batch is done would be dearer.
        """
        out = [work.batch for work in self._outstanding.values() if work.batch.route.stream == stream]
        if all(wanted.isdisjoint(keys(batch.changes)) for batch in out):  # as of a backlog it nearly always is
            return {}
        found: dict[str, Batch] = {}
        for batch in out:
            found.update(zip(keys(batch.changes), repeat(batch)))
        return found

    def _max_records_of(self, route: Route, operation: RouteOperation) -> int:
        learned = self._learned.get((route.stream, operation.kind))
        return operation.max_records if learned is None else min(operation.max_records, learned)

    def _dispatch(self, work: Work) -> None:
        if self._lanes is None:
            self._lanes = LanePool(
                self._policy.max_in_flight,
                sender=self._sender,
                tell=self._tell,
                tell_all=self._results.put,
                broke=self._results.put,
                clock=self._clock,
            )
        self._outstanding[work.batch_id] = work
        self._held_records += len(work.batch.changes)
        self._held_bytes += work.bytes
        self._records_of_lane[work.batch.lane % self._policy.max_in_flight] += len(work.batch.changes)
        self._lanes.put(work)

    def _dispatch_leftover(self, left: Leftover, plan: LeftoverPlan) -> None:
        if plan.dead or plan.filtered:
            self._write_down([Settlement(batch_id=left.batch_id, dead=plan.dead, filtered=plan.filtered)])
        if not plan.batches:
            return
        batch_ids: Sequence[int] = [left.batch_id]
        claims = [claim_of(batch, log_id=self._log_id, target=self._policy.target) for batch in plan.batches]
        if [claim.idempotency_key for claim in claims] != [left.idempotency_key]:
            # Some of it is settled, or the mapping is another: what is sent is written down first, here too.
            batch_ids = self._ledger.split(left.batch_id, claims)
        for batch_id, batch, claim in zip(batch_ids, plan.batches, claims, strict=True):
            self._dispatch(Work(batch_id, batch, claim.idempotency_key, left.set_aside, left.batch_id))

    def _split(self, batch_id: int, parts: Sequence[Claim]) -> Sequence[int]:
        """Have the loop's thread write a batch down as *parts*: for the lanes, which wait."""
        request = _Split(batch_id, parts)
        self._results.put(request)
        while not self._failed.is_set():
            with suppress(Empty):
                return request.answer.get(timeout=_LONGEST_DEAF)
        raise DrainEnded

    def _tell(self, told: Told) -> None:
        """Have the loop's thread write down what a lane knows; the lane waits if something was refused.

        Were the next change of that key sent before, and the refusal lost with the drain, then the refused change would
        be sent again after a newer one. What was accepted is a repeat then, and the target can tell.
        """
        if not told.settlement.dead:
            self._results.put(told)
            return None
        written: SimpleQueue[None] = SimpleQueue()
        self._results.put(Told(told.settlement, told.done, written))
        while not self._failed.is_set():
            with suppress(Empty):
                return written.get(timeout=_LONGEST_DEAF)
        raise DrainEnded

    def _settle_some(self) -> None:
        """Take in what there is of results, or wait a moment for one; now and then write down all that is known.

        At once if somebody waits for it, nothing more is under way, or much is held for it; else a while after the last
        commit. What cannot be written stays in front of what comes later: else a later outcome of a key could be
        written and an earlier one not, and the next drain would send the earlier state again, after the later.
        """
        with suppress(Empty):
            wait = min(_TICK, self._seconds_until_commit()) if self._unwritten else _TICK
            self._arrived.append(self._results.get(timeout=wait))
            while True:
                self._arrived.append(self._results.get_nowait())
        idle = not self._arrived
        if idle:
            self._keep_lock()
        broken: BaseException | None = None
        awaited: list[SimpleQueue[None]] = []
        while self._arrived:
            result = self._arrived.popleft()
            if isinstance(result, BaseException):
                broken = result  # after what the other lanes brought is written down
            elif isinstance(result, _Split):
                self._write_unwritten()  # first, what is known of the whole
                result.answer.put(self._ledger.split(result.batch_id, result.parts))
            else:
                for told in [result] if isinstance(result, Told) else cast("Sequence[Told]", result):
                    if told.done is not None:
                        self._take_in(*told.done)
                    self._unwritten.append(told.settlement)
                    if told.written is not None:
                        awaited.append(told.written)
        if not (idle or awaited or broken or self._is_time_to_commit()):
            return
        wrote = self._write_unwritten()
        for one in awaited:
            one.put(None)
        if wrote and self._unwell and self._gate.healthy and self._gate.halt is None:
            self._ledger.resume()
            self._unwell, self._earlier_failed_runs = False, 0
        if broken is not None:
            raise broken

    def _seconds_until_commit(self) -> float:
        return max(0.0, self._committed_at + _BETWEEN_COMMITS - self._clock.monotonic())

    def _is_time_to_commit(self) -> bool:
        return (
            not self._outstanding
            or self._unwell  # and perhaps no longer, which is to be known even if it is brief
            or not self._seconds_until_commit()
            or self._done_records > self._window_records // 4
            or self._done_bytes > self._limits.window_bytes // 4
        )

    def _write_unwritten(self) -> bool:
        """Write down what is known; say whether there was anything."""
        if not self._unwritten:
            return False
        self._write_down(self._unwritten)
        self._unwritten = []
        self._held_records -= self._done_records
        self._held_bytes -= self._done_bytes
        self._done_records = self._done_bytes = 0
        return True

    def _take_in(self, work: Work, sent: Sent) -> None:
        batch, records = work.batch, len(work.batch.changes)
        del self._outstanding[work.batch_id]
        self._done_records += records
        self._done_bytes += work.bytes
        self._records_of_lane[batch.lane % self._policy.max_in_flight] -= records
        self._recorder.requests += sent.settlement.attempts
        self._recorder.retries += sent.retries
        for latency in sent.latencies:
            self._recorder.latencies.add(latency)
        if sent.too_large is not None:
            self._learned[(batch.route.stream, batch.operation.kind)] = max(1, sent.too_large // 2)
        if sent.set_aside:
            self._aside.add(sent, times=work.set_aside + 1, now=self._clock.monotonic())

    def _write_down(self, settlements: Sequence[Settlement]) -> None:
        self._ledger.settle(settlements)
        self._touched_at = self._committed_at = self._clock.monotonic()
        for settlement in settlements:
            if settlement.dead and self._blocking:
                self._holds.written_down(_refused(settlement.dead), last_batch=self._last_batch)
        self._recorder.settled(settlements, now=self._clock.now())
        self._on_progress(self._recorder)

    def _sender(self) -> tuple[Sender, TargetClient]:
        client = self._connect()
        sender = Sender(
            log_id=self._log_id,
            target=self._policy.target,
            client=client,
            gate=self._gate,
            rules=self._policy.rules,
            retry=self._policy.retry,
            clock=self._clock,
            report=lambda settlement: self._tell(Told(settlement)),
            split=self._split,
            holds=self._holds,
        )
        return sender, client

    def _close_lanes(self) -> None:
        if self._lanes is not None:
            self._lanes.close()

    def _conclude(self) -> DrainReport:
        halt = self._gate.halt
        if halt is not None and halt.cause != "stopped":
            self._hold(halt)
        elif halt is not None and self._gate.held_for():
            # Stopped while the target wanted to be left alone: the next run is to do so.
            reason = f"the target asked to be left alone; {halt.reason}"
            self._hold(Halt(cause="deferred", reason=reason))
        elif self._aside.records and not (self._gate.in_doubt or self._unwell):
            self._hold_aside()
            halt = halt or Halt(cause="deferred", reason=self._aside.describe())
        elif self._aside.records and halt is None:
            # There was nothing else by which to tell the records' fault from the target's.
            halt = Halt(cause="deferred", reason=self._aside.reason)
            self._hold(halt)
        elif halt is None and self._waited:
            self._ledger.resume()
        ends: dict[str, End] = {"stopped": "stopped", "deferred": "deferred"}
        recorder = self._recorder
        return DrainReport(
            target=self._policy.target,
            end="caught_up" if halt is None else ends.get(halt.cause, "paused"),
            reason=halt.reason if halt else None,
            tallies=dict(recorder.tallies),
            requests=recorder.requests,
            retries=recorder.retries,
            seconds=self._busy_until - self._started_at,
            latency_p50=recorder.latencies.quantile(0.5),
            latency_p95=recorder.latencies.quantile(0.95),
            lag_p50=recorder.lags.quantile(0.5),
            lag_p95=recorder.lags.quantile(0.95),
            refusals=dict(recorder.refusals),
        )

    def _hold_aside(self) -> None:
        """Write down that batches wait while the target is well; the more often they were set aside, the longer."""
        seconds = max(self._longer_and_longer(self._aside.times), self._gate.held_for())
        self._ledger.hold(status="active", reason=self._aside.describe(), failed_runs=0, retry_in=seconds)

    def _longer_and_longer(self, times: int) -> float:
        """Return how many seconds to leave alone what was tried so many times in vain: up to five minutes."""
        longest = max(_LONGEST_HOLD, self._policy.error_timeout)
        return min(longest, self._policy.error_timeout * 2.0 ** min(times - 1, 10))

    def _hold(self, halt: Halt) -> None:
        """Write down why the target is left alone, and until when."""
        failed_runs = self._earlier_failed_runs + 1
        match halt.cause:
            case "deferred":
                seconds = max(self._longer_and_longer(failed_runs), halt.retry_after or 0.0, self._gate.held_for())
                self._ledger.hold(status="active", reason=halt.reason, failed_runs=failed_runs, retry_in=seconds)
            case "credentials" | "configuration":
                seconds = max(self._policy.probe_interval, self._gate.held_for())
                self._ledger.hold(status="paused", reason=halt.reason, failed_runs=failed_runs, retry_in=seconds)
            case "gone":
                self._ledger.hold(status="disabled", reason=halt.reason, failed_runs=failed_runs, retry_in=None)
            case _:
                self._ledger.hold(status="paused", reason=halt.reason, failed_runs=failed_runs, retry_in=None)


@dataclass(slots=True)
class _Aside:
    """What of a run was set aside."""

    records: int = 0
    times: int = 0
    """How often; the least of all."""
    reason: str = ""
    since: float = 0.0
    """When the last was set aside, in monotonic seconds."""

    def add(self, sent: Sent, *, times: int, now: float) -> None:
        self.records += sent.set_aside
        self.since = now
        if sent.settlement.set_aside:  # else it waits for one that was
            self.times = min(self.times or times, times)
            self.reason = sent.settlement.error or self.reason

    def describe(self) -> str:
        """Say what waits and what to do about it."""
        return (
            f"{self.records} set aside while others are accepted: {self.reason}. They are tried again; "
            "if the status means that a record is refused, name it in drop_on"
        )


def _refused(dead: Sequence[DeadRecord]) -> list[ChangeRecord]:
    return [record.change for record in dead if record.blocked_by is None]
