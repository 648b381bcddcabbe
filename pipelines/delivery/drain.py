"""One target's delivery loop: claim a window, send it on all lanes, settle what came back, and again.

The loop's own thread is the only one that touches the ledger; each lane is a thread with a client of its own. The
window slides: new batches are claimed while earlier ones are still out, so no lane waits for the slowest.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from queue import Empty, SimpleQueue

from pipelines.delivery.breaker import Breaker
from pipelines.delivery.clock import Clock
from pipelines.delivery.gate import Halt, TargetGate
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.ledger import Settlement, TargetLedger, TargetState
from pipelines.delivery.planning import Batch, LeftoverPlan, plan_leftover, plan_window
from pipelines.delivery.rate_limit import TokenBucket
from pipelines.delivery.report import DrainReport, End, Recorder
from pipelines.delivery.routing import Route, RouteOperation
from pipelines.delivery.sending import RetryPolicy, Sender, Sent
from pipelines.delivery.target import TargetClient

_LONGEST_HOLD = 300.0
_TICK = 0.05
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
    window_records: int = 20_000
    window_bytes: int = 32_000_000


def drain(
    *,
    policy: DrainPolicy,
    routes: Mapping[str, Route],
    ledger: TargetLedger,
    connect: Callable[[], TargetClient],
    clock: Clock,
    limits: DrainLimits,
    stop: threading.Event | None = None,
    on_progress: Callable[[Recorder], None] | None = None,
) -> DrainReport:
    """Deliver all that the target is owed; return when it has caught up and lingered, or cannot go on.

    A target's faults are values in the report, never exceptions. *connect* makes one lane's client. *stop*, once set,
    lets the drain claim nothing new, finish what is in flight, settle and return.
    """
    state = ledger.state()
    loop = _Loop(
        policy=policy,
        routes=routes,
        ledger=ledger,
        connect=connect,
        clock=clock,
        limits=limits,
        stop=stop or threading.Event(),
        on_progress=on_progress or (lambda _: None),
        state=state,
    )
    return loop.run()


def _bucket(limit: RateLimit | None, now: float) -> TokenBucket | None:
    if limit is None:
        return None
    return TokenBucket.full(requests_per_second=limit.requests_per_second, burst=limit.burst, now=now)


class _Lane(threading.Thread):
    """Sends one lane's batches one after another."""

    def __init__(
        self, number: int, sender: Callable[[], tuple[Sender, TargetClient]], results: SimpleQueue[object]
    ) -> None:
        super().__init__(name=f"lane-{number}", daemon=True)
        self.work: SimpleQueue[tuple[int, Batch] | None] = SimpleQueue()
        self._make = sender
        self._results = results

    def run(self) -> None:
        try:
            sender, client = self._make()
            try:
                while (item := self.work.get()) is not None:
                    batch_id, batch = item
                    self._results.put((batch, sender.send(batch_id, batch)))
            finally:
                client.close()
        except BaseException as error:  # handed to the loop, which raises it
            self._results.put(error)


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
        stop: threading.Event,
        on_progress: Callable[[Recorder], None],
        state: TargetState,
    ) -> None:
        self._policy, self._routes, self._ledger = policy, routes, ledger
        self._connect, self._clock, self._limits, self._stop = connect, clock, limits, stop
        self._on_progress = on_progress
        self._unwell = state.failed_runs > 0 or state.status != "active"
        self._earlier_failed_runs = state.failed_runs
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
        self._lanes: list[_Lane] = []
        self._outstanding = 0
        self._outstanding_records = 0
        self._outstanding_bytes = 0
        self._more, self._read_at, self._read_nothing = True, now, False
        self._touched_at = now
        self._learned: dict[tuple[str, str], int] = {}
        self._recorder = Recorder()

    def run(self) -> DrainReport:
        try:
            self._send_leftovers()
            self._deliver_pending()
        except BaseException:
            self._gate.stop("the drain failed")
            self._close_lanes()
            self._settle_what_came_late()
            raise
        self._close_lanes()
        return self._conclude()

    def _settle_what_came_late(self) -> None:
        """Write down what lanes were still told while the drain was ending: what is known must not be sent again."""
        while not self._results.empty():
            with suppress(Exception):  # the drain's own failure is the one to raise
                self._settle_some()

    def _send_leftovers(self) -> None:
        """Send what an earlier drain claimed, as written, and wait for it: nothing new may overtake it."""
        plans = [(left.batch_id, plan_leftover(left, routes=self._routes)) for left in self._ledger.leftovers()]
        self._gate.judge_rendering(
            rendered=sum(len(batch.changes) for _, plan in plans for batch in plan.batches),
            unrenderable=sum(len(plan.dead) for _, plan in plans),
        )
        if self._gate.halt is None:
            for batch_id, plan in plans:
                self._dispatch_leftover(batch_id, plan)
        self._finish_outstanding()

    def _deliver_pending(self) -> None:
        caught_up_at: float | None = None
        while True:
            self._halt_if_stopped()
            if self._gate.halt is not None:
                self._finish_outstanding()
                return
            if self._should_read():
                self._claim()
            if self._outstanding:
                caught_up_at = None
                self._settle_some()
                self._busy_until = self._clock.monotonic()
            elif self._read_nothing:
                now = self._clock.monotonic()
                caught_up_at = now if caught_up_at is None else caught_up_at
                if now - caught_up_at >= self._limits.linger_seconds:
                    return
                self._linger(self._limits.poll_seconds)

    def _linger(self, seconds: float) -> None:
        """Wait, but not on the stop event: a signal's handler sets it, maybe while this thread would hold its lock."""
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
        if self._outstanding_records > self._limits.window_records // 2:
            return False
        if self._outstanding_bytes > self._limits.window_bytes // 2:
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
        pending = self._ledger.pending(
            max_records=self._limits.window_records - self._outstanding_records,
            max_bytes=self._limits.window_bytes - self._outstanding_bytes,
        )
        self._more, self._read_at = not pending.complete, self._clock.monotonic()
        self._read_nothing = not pending.records
        if not pending.records and pending.decided_up_to is None:
            return
        plan = plan_window(
            pending,
            log_id=self._log_id,
            target=self._policy.target,
            routes=self._routes,
            lanes=self._policy.max_in_flight,
            max_records_of=self._max_records_of,
        )
        sendable = sum(len(batch.changes) for batch in plan.batches)
        self._gate.judge_rendering(rendered=sendable, unrenderable=len(plan.window.dead))
        if self._gate.halt is not None:
            return  # nothing of the window is written down: no record is buried for a wrong mapping
        batch_ids = self._ledger.claim(plan.window)
        self._recorder.count("superseded", plan.window.superseded)
        self._recorder.count("filtered", plan.window.filtered)
        self._recorder.bury(plan.window.dead)
        for batch_id, batch in zip(batch_ids, plan.batches, strict=True):
            self._dispatch(batch_id, batch)

    def _max_records_of(self, route: Route, operation: RouteOperation) -> int:
        learned = self._learned.get((route.stream, operation.kind))
        return operation.max_records if learned is None else min(operation.max_records, learned)

    def _dispatch(self, batch_id: int, batch: Batch) -> None:
        if not self._lanes:
            self._lanes = [_Lane(number, self._sender, self._results) for number in range(self._policy.max_in_flight)]
            for lane in self._lanes:
                lane.start()
        self._outstanding += 1
        self._outstanding_records += len(batch.changes)
        self._outstanding_bytes += _weight(batch)
        self._lanes[batch.lane % len(self._lanes)].work.put((batch_id, batch))

    def _dispatch_leftover(self, batch_id: int, plan: LeftoverPlan) -> None:
        if plan.dead or plan.filtered or not plan.batches:
            self._write_down(
                [Settlement(batch_id=batch_id, dead=plan.dead, filtered=plan.filtered, finished=not plan.batches)]
            )
        for batch in plan.batches:
            self._dispatch(batch_id, batch)

    def _settle_some(self) -> None:
        """Wait a moment for a result, then write down all there are in one commit."""
        results: list[object] = []
        try:
            results.append(self._results.get(timeout=_TICK))
            while True:
                results.append(self._results.get_nowait())
        except Empty:
            pass
        if not results:
            self._keep_lock()
        settlements: list[Settlement] = []
        broken: BaseException | None = None
        for result in results:
            if isinstance(result, BaseException):
                broken = result  # after what the other lanes brought is written down
                continue
            if isinstance(result, Settlement):
                settlements.append(result)  # a part of a batch that is still out
                continue
            assert isinstance(result, tuple)
            batch, sent = result
            settlements.append(self._take_in(batch, sent))
        if settlements:
            self._write_down(settlements)
            if self._unwell and self._gate.healthy and self._gate.halt is None:
                self._ledger.resume()
                self._unwell, self._earlier_failed_runs = False, 0
        if broken is not None:
            raise broken

    def _take_in(self, batch: Batch, sent: Sent) -> Settlement:
        self._outstanding -= 1
        self._outstanding_records -= len(batch.changes)
        self._outstanding_bytes -= _weight(batch)
        self._recorder.requests += sent.settlement.attempts
        self._recorder.retries += sent.retries
        for latency in sent.latencies:
            self._recorder.latencies.add(latency)
        if sent.too_large is not None:
            self._learned[(batch.route.stream, batch.operation.kind)] = max(1, sent.too_large // 2)
        return sent.settlement

    def _write_down(self, settlements: Sequence[Settlement]) -> None:
        self._ledger.settle(settlements)
        self._touched_at = self._clock.monotonic()
        now = self._clock.now()
        for settlement in settlements:
            self._recorder.count("accepted", settlement.accepted)
            self._recorder.count("filtered", settlement.filtered)
            self._recorder.bury(settlement.dead)
            for change in settlement.accepted:
                self._recorder.lags.add((now - change.changed_at).total_seconds())
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
            report=self._results.put,
        )
        return sender, client

    def _close_lanes(self) -> None:
        for lane in self._lanes:
            lane.work.put(None)
        for lane in self._lanes:
            lane.join()

    def _conclude(self) -> DrainReport:
        halt = self._gate.halt
        if halt is not None and halt.cause != "stopped":
            self._hold(halt)
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

    def _hold(self, halt: Halt) -> None:
        """Write down why the target is left alone, and until when."""
        failed_runs = self._earlier_failed_runs + 1
        match halt.cause:
            case "deferred":
                # The longer it has been down, the rarer the probes, up to one in five minutes.
                longest = max(_LONGEST_HOLD, self._policy.error_timeout)
                seconds = min(longest, self._policy.error_timeout * 2.0 ** min(failed_runs - 1, 10))
                seconds = max(seconds, halt.retry_after or 0.0)
                self._ledger.hold(
                    status="active",
                    reason=halt.reason,
                    failed_runs=failed_runs,
                    retry_at=self._clock.now() + timedelta(seconds=seconds),
                )
            case "credentials" | "configuration":
                self._ledger.hold(
                    status="paused",
                    reason=halt.reason,
                    failed_runs=failed_runs,
                    retry_at=self._clock.now() + timedelta(seconds=self._policy.probe_interval),
                )
            case "gone":
                self._ledger.hold(status="disabled", reason=halt.reason, failed_runs=failed_runs, retry_at=None)
            case _:
                self._ledger.hold(status="paused", reason=halt.reason, failed_runs=failed_runs, retry_at=None)


def _weight(batch: Batch) -> int:
    """Return the bytes by which *batch* counts towards the window."""
    return sum(len(change.payload) for change in batch.changes)
