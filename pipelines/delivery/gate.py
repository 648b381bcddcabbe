"""The one place that all lanes of a target pass before they send.

What concerns the target as a whole (its rate limit, a `Retry-After`, the breaker, a pause) is decided here, for every
lane at once. A *halt* ends the run's sending: what is in flight is finished, nothing new goes out.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from threading import Condition, RLock
from typing import Literal

from pipelines.delivery.breaker import Breaker, Go
from pipelines.delivery.clock import Clock
from pipelines.delivery.outcome import Pause
from pipelines.delivery.rate_limit import TokenBucket

_GUARD_SAMPLE = 200
_GUARD_LEAST_DEAD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    """Why this run sends nothing more to the target."""

    cause: Literal["stopped", "deferred", "credentials", "configuration", "gone", "mapping"]
    reason: str
    retry_after: float | None = None
    """Seconds until the target should be tried again; None leaves it to the policy."""


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one request."""

    probe: bool


FREELY = Permit(probe=False)
"""Leave to send while nothing speaks against it: not a probe, so nobody waits for its answer."""


@dataclass(slots=True)
class _Fates:
    """How the last records went, answer by answer."""

    answers: deque[tuple[int, int]] = field(default_factory=deque)
    judged: int = 0
    dead: int = 0

    def add(self, accepted: int, dead: int) -> None:
        self.answers.append((accepted, dead))
        self.judged += accepted + dead
        self.dead += dead
        while self.judged - sum(self.answers[0]) >= _GUARD_SAMPLE:
            taken, refused = self.answers.popleft()
            self.judged -= taken + refused
            self.dead -= refused


class TargetGate:
    """Admits requests to one target. Thread-safe."""

    def __init__(
        self,
        *,
        clock: Clock,
        breaker: Breaker,
        bucket: TokenBucket | None,
        dead_letter_guard: float,
        one_probe: bool = False,
    ) -> None:
        self._clock = clock
        self._breaker = breaker
        self._bucket = bucket
        self._guard = dead_letter_guard
        self._one_probe = one_probe
        self._successes = 0
        self._excused = 0  # failures in a row of batches that had been given up on before
        self._lock = RLock()
        self._changed = Condition(self._lock)
        """By which to wait; who only looks, or notes what wakes nobody, takes the lock, in a tenth of the time."""
        self._hold_until: float | None = None
        self._halt: Halt | None = None
        self._fates: dict[object, _Fates] = defaultdict(_Fates)
        self._rendered = 0
        self._unrenderable = 0

    @property
    def halt(self) -> Halt | None:
        """Why nothing more is sent, or None."""
        with self._lock:
            return self._halt

    @property
    def failures(self) -> int:
        """Failures in a row, the earlier runs' included."""
        with self._changed:
            return self._breaker.failures

    @property
    def healthy(self) -> bool:
        """Whether requests flow freely: the breaker is closed."""
        with self._changed:
            return self._breaker.closed

    @property
    def successes(self) -> int:
        """Answers so far that the target gave for itself."""
        with self._changed:
            return self._successes

    @property
    def in_doubt(self) -> bool:
        """Whether the target is, or seems, unwell, and no request has succeeded since."""
        with self._changed:
            return self._one_probe

    def enter(self, *, give_up_at: float | None = None) -> Permit | None:
        """Wait until a request may be sent; None if the run halts, or if it would be later than *give_up_at*.

        *give_up_at* is in monotonic seconds. A permit must be answered by `succeeded`, `failed` or `withdrew`.
        """
        with self._changed:
            while self._halt is None:
                now = self._clock.monotonic()
                wait = self._seconds_to_wait(now)
                if isinstance(wait, Permit):
                    return wait
                if give_up_at is not None and now + (wait or 0.0) > give_up_at:
                    return None
                if wait is None and give_up_at is not None:
                    wait = give_up_at - now + 0.001
                self._clock.wait(self._changed, wait)
            return None

    def enter_at_once(self) -> Permit | None:
        """Return leave to send one request, if requests flow freely; None if `enter` is to be asked, and might wait."""
        with self._lock:
            free = self._breaker.closed and not self._one_probe and self._bucket is None and self._hold_until is None
            return FREELY if free and self._halt is None else None

    def _seconds_to_wait(self, now: float) -> Permit | float | None:
        if self._hold_until is not None:
            if now < self._hold_until:
                return self._hold_until - now
            self._hold_until = None
        decision = self._breaker.admit(now)
        if not isinstance(decision, Go):
            return decision.seconds
        short = self._bucket.take(now) if self._bucket else 0.0
        if short > 0:
            self._breaker.withdrew(probe=decision.probe)
            return short
        return Permit(probe=decision.probe)

    def pause_lane(self, seconds: float) -> None:
        """Sleep between one lane's attempts, but no longer than until a halt."""
        with self._changed:
            wake_at = self._clock.monotonic() + seconds
            while self._halt is None and (left := wake_at - self._clock.monotonic()) > 0:
                self._clock.wait(self._changed, left)

    def succeeded(self) -> None:
        """Note an answer that the target gave for itself, a refusal of a record included."""
        with self._lock:
            self._note_success()

    def accepted(self, records: int, *, of: object) -> None:
        """Note an answer that took all of so many records that were sent as *of*: stream and operation."""
        with self._lock:
            self._note_success()
            self._note_fates(records, 0, of)

    def _note_success(self) -> None:
        self._successes += 1
        self._excused = 0
        if not self._breaker.closed or self._breaker.failures:
            self._breaker.succeeded()
            self._one_probe = False
            self._changed.notify_all()

    def failed(
        self,
        permit: Permit,
        reason: str,
        *,
        retry_after: float | None = None,
        excused: bool = False,
        again: bool = False,
    ) -> None:
        """Note a fault of the target's; *retry_after* seconds hold every lane, not only this one.

        If an earlier run left the target unwell (*one_probe*), a failed probe is all that this run tries. One that is
        *excused*, for its batch was given up on before, says little: another is the next probe, so long as they do not
        fail `failure_threshold` times in a row. *again* says that the same request failed before and that its records
        may be to blame: however often it is tried, it counts once.
        """
        with self._changed:
            now = self._clock.monotonic()
            if retry_after is not None:
                until = now + retry_after
                self._hold_until = until if self._hold_until is None else max(self._hold_until, until)
            if (excused or again) and not permit.probe:
                return
            self._breaker.failed(now, probe=permit.probe)
            if excused and self._excused + 1 < self._breaker.failure_threshold:
                self._excused += 1
                self._breaker.half_open(now)
                self._changed.notify_all()
                return
            if permit.probe and self._one_probe:
                self._set_halt(Halt(cause="deferred", reason=reason, retry_after=retry_after))
            self._changed.notify_all()

    def doubt(self, *, since: int) -> None:
        """Note that one request was given up on: the target's fault, or its records'?

        If others have succeeded since (their number was *since*), the target is well. Else the next request decides.
        """
        with self._changed:
            if self._successes == since:
                self._one_probe = True
                if not self._breaker.probing:  # else a probe is out already
                    self._breaker.half_open(self._clock.monotonic())
                self._changed.notify_all()

    def withdrew(self, permit: Permit) -> None:
        """Give a permit back unused."""
        with self._changed:
            self._breaker.withdrew(probe=permit.probe)
            self._changed.notify_all()

    def held_for(self) -> float:
        """Return the seconds for which the target asked to be left alone, from now."""
        with self._changed:
            return 0.0 if self._hold_until is None else max(0.0, self._hold_until - self._clock.monotonic())

    def judge_records(self, *, accepted: int, dead: int, of: object = None) -> None:
        """Count outcomes for the dead-letter guard; halt if too many of the run's last 200 records or so were refused.

        One wrong mapping refuses every record, and a target can change its mind while a drain lingers. What records
        were sent as (*of*: stream and operation) is weighed by itself: one wrong path must not hide behind others.
        """
        with self._lock:
            self._note_fates(accepted, dead, of)

    def _note_fates(self, accepted: int, dead: int, of: object) -> None:
        if accepted + dead:
            fates = self._fates[of]
            fates.add(accepted, dead)
            self._guard_against(fates.dead, fates.judged, "were refused: the mapping is wrong, or the target is")

    def judge_rendering(self, *, rendered: int, unrenderable: int) -> None:
        """Count what is about to be written down; halt if too many of the run's first records cannot be rendered.

        They are weighed among themselves: answers come later and fewer at a time.
        """
        with self._changed:
            if self._rendered + self._unrenderable >= _GUARD_SAMPLE:
                return
            self._rendered += rendered
            self._unrenderable += unrenderable
            total = self._rendered + self._unrenderable
            self._guard_against(self._unrenderable, total, "cannot be rendered: the mapping is wrong, or the rows are")

    def _guard_against(self, bad: int, total: int, what: str) -> None:
        if bad >= _GUARD_LEAST_DEAD and bad > self._guard * total:
            reason = f"{bad} of {total} records {what}. Mend the route, then launch delivery_job."
            self._set_halt(Halt(cause="mapping", reason=reason))

    def pause(self, pause: Pause, permit: Permit) -> None:
        """Halt for credentials or configuration."""
        with self._changed:
            self._breaker.failed(self._clock.monotonic(), probe=permit.probe)
            self._set_halt(Halt(cause=pause.cause, reason=pause.reason))

    def defer(self, reason: str, *, retry_after: float | None = None) -> None:
        """Halt because the target did not get well within the run's budget."""
        with self._changed:
            self._set_halt(Halt(cause="deferred", reason=reason, retry_after=retry_after))

    def stop(self, reason: str) -> None:
        """Halt because the run was asked to end."""
        with self._changed:
            self._set_halt(Halt(cause="stopped", reason=reason))

    def _set_halt(self, halt: Halt) -> None:
        # The first reason is the one to report, but a pause outranks a stop: it must be written down.
        if self._halt is None or (self._halt.cause == "stopped" and halt.cause != "stopped"):
            self._halt = halt
        self._changed.notify_all()
