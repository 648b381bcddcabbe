"""The ledger in plain Python, with a source whose transactions stay open, commit late or roll back as a test wants.

What it does is what `pipelines_tests/contracts/test_ledger.py` finds Postgres to do; that is its licence to stand in.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock
from typing import Literal
from uuid import UUID

from pipelines.changes.record import ChangeRecord, Operation, instant_of
from pipelines.delivery.clock import Clock
from pipelines.delivery.ledger import (
    LONG_TAIL,
    Claim,
    Conservation,
    Ledger,
    LedgerConflict,
    Leftover,
    Owed,
    PendingWindow,
    Settlement,
    Start,
    Status,
    TargetLedger,
    TargetState,
    Upcoming,
    Window,
)
from pipelines.delivery.outcome import DeadRecord, OperationKind
from pipelines_tests.fakes.clock import FakeClock

LOG_ID = UUID("5b0f6a52-3f0b-5f0e-9d5a-7d1f6c1b3a11")


class FakeLockLost(Exception):
    """Somebody writes to a target whose lock is not theirs (any more)."""


@dataclass(slots=True, kw_only=True)
class FakeBatch:
    """One row of the trail: a claimed batch and what became of it."""

    batch_id: int
    target: str
    lane: int
    stream: str
    operation: OperationKind
    change_ids: tuple[int, ...]
    idempotency_key: UUID
    run_id: str
    part_of: int | None = None
    state: Literal["claimed", "settled", "split"] = "claimed"
    accepted: int = 0
    dead: int = 0
    set_aside: int = 0
    attempts: int = 0
    status: int | None = None
    seconds: float | None = None
    error: str | None = None


class FakeTransaction:
    """A writer of the source: what it appended is seen once it commits."""

    def __init__(self, ledger: "FakeLedger") -> None:
        self._ledger = ledger
        self.xid: int | None = None
        self.records: list[ChangeRecord] = []
        self.state: Literal["open", "committed", "rolled back"] = "open"

    def append(
        self,
        stream: str,
        key: str,
        *,
        operation: Operation = "update",
        payload: bytes = b"{}",
        target: str | None = None,
        replays: int | None = None,
    ) -> int:
        """Draw a change id for a record and return it; *target* addresses the record."""
        assert self.state == "open"
        return self._ledger._append(self, stream, key, operation, payload, target, replays)

    def commit(self) -> None:
        """Let all see what was appended."""
        assert self.state == "open"
        self.state = "committed"

    def rollback(self) -> None:
        """Take back what was appended; its change ids are never used again."""
        assert self.state == "open"
        self.state = "rolled back"


@dataclass(slots=True)
class _Logged:
    record: ChangeRecord
    target: str | None
    writer: FakeTransaction

    def is_for(self, target: str) -> bool:
        return self.writer.state == "committed" and self.target in (None, target)


@dataclass(slots=True)
class _Fence:
    xid: int
    change_id: int


@dataclass(slots=True)
class _Target:
    name: str
    settled: set[int] = field(default_factory=set)
    claimed: set[int] = field(default_factory=set)
    before_start: int = 0
    accepted: int = 0
    superseded: int = 0
    filtered: int = 0
    dead: int = 0
    status: Status = "active"
    reason: str | None = None
    failed_runs: int = 0
    retry_at: datetime | None = None
    fence: _Fence | None = None
    holder: "FakeTargetLedger | None" = None


class FakeLedger(Ledger):
    """All targets' ledgers, and the change log of their source.

    Seeded with *changes*, committed under the ids that they bring, and with registered *targets*.
    """

    def __init__(
        self,
        *,
        targets: Mapping[str, Start] | None = None,
        changes: Iterable[ChangeRecord] = (),
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or FakeClock()
        self._log: list[_Logged] = []
        self._last_change_id = 0
        self._last_xid = 0
        self._transactions: list[FakeTransaction] = []
        self._targets: dict[str, _Target] = {}
        self._batches: list[FakeBatch] = []
        self._dead_letters: list[tuple[str, DeadRecord]] = []
        self._closed_dead_letters: set[tuple[str, int]] = set()
        self.running_loads: set[tuple[str, str]] = set()
        """Targets and streams whose rows are being loaded."""
        self._lock = Lock()
        if targets:
            self.register(targets)
        self.seed(changes)

    # --- the source --------------------------------------------------------------------------------------------------

    def seed(self, changes: Iterable[ChangeRecord]) -> None:
        """Commit *changes* under the ids that they bring, all greater than any before."""
        writer = self.begin()
        for change in changes:
            assert change.change_id > self._last_change_id
            self._last_change_id = change.change_id
            self._log.append(_Logged(change, None, writer))
            writer.records.append(change)
        writer.commit()

    def begin(self) -> FakeTransaction:
        """Open a transaction of the source."""
        transaction = FakeTransaction(self)
        self._transactions.append(transaction)
        return transaction

    def append(
        self,
        stream: str,
        key: str,
        *,
        operation: Operation = "update",
        payload: bytes = b"{}",
        target: str | None = None,
        replays: int | None = None,
    ) -> ChangeRecord:
        """Append a record in a transaction of its own and commit it."""
        writer = self.begin()
        writer.append(stream, key, operation=operation, payload=payload, target=target, replays=replays)
        writer.commit()
        return writer.records[0]

    def _append(
        self,
        writer: FakeTransaction,
        stream: str,
        key: str,
        operation: Operation,
        payload: bytes,
        target: str | None,
        replays: int | None,
    ) -> int:
        with self._lock:
            if writer.xid is None:  # before the change id is drawn, as in the log's first column
                writer.xid = self._next_xid()
            self._last_change_id += 1
            record = ChangeRecord(
                change_id=self._last_change_id,
                stream=stream,
                key=key,
                operation=operation,
                payload=payload,
                instant=instant_of(self._clock.now()),
                replays=replays,
            )
            self._log.append(_Logged(record, target, writer))
            writer.records.append(record)
            return record.change_id

    def _next_xid(self) -> int:
        self._last_xid += 1
        return self._last_xid

    # --- what tests read ---------------------------------------------------------------------------------------------

    @property
    def changes(self) -> tuple[ChangeRecord, ...]:
        """The committed records, by change id."""
        return tuple(logged.record for logged in self._log if logged.writer.state == "committed")

    @property
    def batches(self) -> tuple[FakeBatch, ...]:
        """The trail of all targets' batches, in the order in which they were claimed."""
        return tuple(self._batches)

    @property
    def dead_letters(self) -> tuple[tuple[str, DeadRecord], ...]:
        """Targets and what they refused, in the order in which it was written."""
        return tuple(self._dead_letters)

    @property
    def open_dead_letters(self) -> tuple[tuple[str, DeadRecord], ...]:
        """Those of the dead letters that nothing has closed."""
        closed = self._closed_dead_letters
        return tuple(one for one in self._dead_letters if (one[0], one[1].change.change_id) not in closed)

    def close_dead_letter(self, target: str, change_id: int) -> None:
        """Close a dead letter, as a redrive does, or a newer state."""
        self._closed_dead_letters.add((target, change_id))

    @property
    def settled(self) -> Mapping[str, frozenset[int]]:
        """The settled change ids of each target, those in closed gaps included."""
        return {target.name: frozenset(target.settled) for target in self._targets.values()}

    @property
    def claimed(self) -> Mapping[str, frozenset[int]]:
        """The claimed change ids of each target."""
        return {target.name: frozenset(target.claimed) for target in self._targets.values()}

    @property
    def states(self) -> Mapping[str, TargetState]:
        """Each target's status and breaker."""
        return {target.name: _state_of(target) for target in self._targets.values()}

    # --- the port ----------------------------------------------------------------------------------------------------

    def register(self, targets: Mapping[str, Start], *, streams: Mapping[str, Sequence[str]] | None = None) -> None:
        for name, start in targets.items():
            if name in self._targets:
                continue
            target = self._targets[name] = _Target(name)
            if start == "snapshot":
                self.running_loads.update((name, stream) for stream in (streams or {}).get(name, ()))
            if start in ("now", "snapshot"):
                before = [entry for entry in self._log if entry.writer.state == "committed" and entry.target != name]
                target.settled = {entry.record.change_id for entry in before}
                target.before_start = sum(entry.target is None for entry in before)

    @contextmanager
    def open_target(self, target: str, *, run_id: str) -> Iterator[TargetLedger | None]:
        row = self._row(target)
        ledger = FakeTargetLedger(self, row, run_id=run_id)
        with self._lock:
            taken = row.holder is not None
            if not taken:
                row.holder = ledger
        if taken:
            yield None
            return
        try:
            yield ledger
        finally:
            with self._lock:
                if row.holder is ledger:
                    row.holder = None

    def break_lock(self, target: str) -> None:
        """Free a target's lock as a lost connection does: its holder's next call raises FakeLockLost."""
        with self._lock:
            self._row(target).holder = None

    def owed(self, streams: Mapping[str, Sequence[str]]) -> Sequence[Owed]:
        return [
            Owed(
                target=name,
                has_work=bool(row.claimed) or self._is_owed_something(row, streams[name]),
                held=row.holder is not None,
                status=row.status,
                reason=row.reason,
                waiting=self._is_waiting(row, streams[name]),
            )
            for name, row in sorted(self._targets.items())
            if name in streams
        ]

    def _is_waiting(self, row: _Target, streams: Sequence[str]) -> bool:
        if row.retry_at is None:
            return row.status == "paused"
        if row.status == "active" and not row.failed_runs and self._is_owed_something(row, streams):
            return False  # only what was set aside waits
        return row.retry_at > self._clock.now()

    def _is_owed_something(self, row: _Target, streams: Sequence[str]) -> bool:
        if any(target == row.name for target, _ in self.running_loads):
            return True
        taken = row.settled | row.claimed
        seen = (one for one in self._log if one.writer.state == "committed")
        tail = sorted((one for one in seen if one.record.change_id not in taken), key=lambda one: one.record)
        tail = tail[:LONG_TAIL]
        return len(tail) == LONG_TAIL or any(one.is_for(row.name) and one.record.stream in streams for one in tail)

    def upcoming(self, target: str, *, max_records: int, max_bytes: int) -> Upcoming:
        if target not in self._targets:
            return Upcoming(log_id=LOG_ID, leftovers=[], pending=[], blocked={}, more=False)
        looking = _Looking(self, self._targets[target], run_id="")
        leftovers = next(looking.leftovers(max_records=max_records, max_bytes=max_bytes), [])
        waiting = self._pending(self._targets[target])
        pending: list[ChangeRecord] = []
        for change in waiting[:max_records]:
            if sum(len(one.payload) for one in pending) >= max_bytes:
                break
            pending.append(change)
        claimed = [change for left in leftovers for change in left.changes]
        blocked = looking.blocked({(change.stream, change.key) for change in (*claimed, *pending)})
        more = len(pending) < len(waiting)
        return Upcoming(log_id=LOG_ID, leftovers=leftovers, pending=pending, blocked=blocked, more=more)

    def conservation(self, target: str) -> Conservation:
        row = self._row(target)
        ids = [logged.record.change_id for logged in self._log if logged.is_for(target)]
        return Conservation(
            target=target,
            captured=len(ids) - row.before_start,
            accepted=row.accepted,
            superseded=row.superseded,
            filtered=row.filtered,
            dead=row.dead,
            claimed=sum(change_id in row.claimed for change_id in ids),
            pending=len(self._pending(row)),
        )

    def _row(self, target: str) -> _Target:
        row = self._targets.get(target)
        if row is None:
            raise LookupError(f"The target '{target}' is not registered; call register first.")
        return row

    def _pending(self, row: _Target) -> list[ChangeRecord]:
        taken = row.settled | row.claimed
        mine = [logged.record for logged in self._log if logged.is_for(row.name)]
        return sorted(change for change in mine if change.change_id not in taken)

    def _oldest_open_xid(self) -> int:
        """Return the id below which every transaction is over: the snapshot's xmin."""
        still_open = [writer.xid for writer in self._transactions if writer.state == "open" and writer.xid is not None]
        return min(still_open, default=self._last_xid + 1)


class FakeTargetLedger(TargetLedger):
    """One target's ledger; every call asks first whether the lock is still this one's."""

    def __init__(self, ledger: FakeLedger, row: _Target, *, run_id: str) -> None:
        self._ledger = ledger
        self._target = row
        self._run_id = run_id

    @property
    def _row(self) -> _Target:
        if self._target.holder is not self:
            raise FakeLockLost(f"the lock of '{self._target.name}' is not this ledger's")
        return self._target

    def state(self) -> TargetState:
        return _state_of(self._row)

    def leftovers(self, *, max_records: int, max_bytes: int) -> Iterator[Sequence[Leftover]]:
        logged = {entry.record.change_id: entry.record for entry in self._ledger._log}
        mine = [one for one in self._ledger._batches if one.target == self._row.name and one.state == "claimed"]
        part: list[Leftover] = []
        room, bytes_left = max_records, max_bytes
        for batch in sorted(mine, key=lambda one: (one.part_of or one.batch_id, one.change_ids[0], one.batch_id)):
            members = [logged[change_id] for change_id in batch.change_ids if change_id in self._row.claimed]
            if not members:
                continue
            weight = sum(len(change.payload) for change in members)
            if part and (len(members) > room or weight > bytes_left):
                yield part
                part, room, bytes_left = [], max_records, max_bytes
            room, bytes_left = room - len(members), bytes_left - weight
            part.append(
                Leftover(
                    batch_id=batch.batch_id,
                    lane=batch.lane,
                    stream=batch.stream,
                    operation=batch.operation,
                    idempotency_key=batch.idempotency_key,
                    set_aside=batch.set_aside,
                    changes=members,
                )
            )
        if part:
            yield part

    def blocked(self, keys: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
        name = self._row.name
        found: dict[tuple[str, str], int] = {}
        for target, record in self._ledger.open_dead_letters:
            key = (record.change.stream, record.change.key)
            if target == name and key in keys:
                found[key] = min(found.get(key, record.change.change_id), record.change.change_id)
        return found

    def pending(self, *, max_records: int, max_bytes: int) -> PendingWindow:
        row = self._row
        if max_records < 1 or max_bytes < 1:
            raise ValueError("a window has room for at least one record and one byte")
        owed = self._ledger._pending(row)
        records: list[ChangeRecord] = []
        size = 0
        for change in owed[:max_records]:
            if size >= max_bytes:
                break
            records.append(change)
            size += len(change.payload)
        complete = len(records) == len(owed) < max_records
        decided = None
        if complete and row.fence is None:
            self._set_fence(row, read=records)
        elif complete and row.fence is not None and row.fence.xid < self._ledger._oldest_open_xid():
            decided = row.fence.change_id
        return PendingWindow(records=records, complete=complete, decided_up_to=decided)

    def _set_fence(self, row: _Target, *, read: Sequence[ChangeRecord]) -> None:
        last = self._ledger._last_change_id
        covered = row.settled | row.claimed | {change.change_id for change in read}
        if last and not covered.issuperset(range(last + 1)):
            row.fence = _Fence(self._ledger._next_xid(), last)

    def claim(self, window: Window) -> Sequence[int]:
        row = self._row
        claimed = [change.change_id for claim in window.claims for change in claim.changes]
        settled = [change.change_id for change in (*window.superseded, *window.filtered)]
        settled += [record.change.change_id for record in window.dead]
        self._refuse_repeats([*claimed, *settled])
        if not (row.settled | row.claimed).isdisjoint([*claimed, *settled]):
            raise LedgerConflict(f"{row.name}: some of the window is settled or claimed already.")
        row.claimed.update(claimed)
        row.settled.update(settled)
        if window.decided_up_to is not None:
            row.settled.update(set(range(window.decided_up_to + 1)) - row.claimed)
            row.fence = None
        row.superseded += len(window.superseded)
        row.filtered += len(window.filtered)
        self._bury(row, window.dead)
        return self._write(row, window.claims)

    def split(self, batch_id: int, parts: Sequence[Claim]) -> Sequence[int]:
        row = self._row
        whole = next((batch for batch in self._ledger._batches if batch.batch_id == batch_id), None)
        members = sorted(change.change_id for part in parts for change in part.changes)
        still = [] if whole is None else sorted(one for one in whole.change_ids if one in row.claimed)
        if whole is None or whole.state != "claimed" or whole.target != row.name or members != still or not members:
            raise LedgerConflict(f"{row.name}: the parts are not what is still claimed of batch {batch_id}.")
        whole.state = "split"
        return self._write(row, parts, part_of=whole.part_of or whole.batch_id)

    def _write(self, row: _Target, claims: Sequence[Claim], *, part_of: int | None = None) -> list[int]:
        first = len(self._ledger._batches) + 1
        for batch_id, claim in enumerate(claims, start=first):
            self._ledger._batches.append(
                FakeBatch(
                    batch_id=batch_id,
                    target=row.name,
                    lane=claim.lane,
                    stream=claim.stream,
                    operation=claim.operation,
                    change_ids=tuple(change.change_id for change in claim.changes),
                    idempotency_key=claim.idempotency_key,
                    run_id=self._run_id,
                    part_of=part_of,
                )
            )
        return list(range(first, first + len(claims)))

    def settle(self, settlements: Sequence[Settlement]) -> None:
        row = self._row
        accepted = [change.change_id for s in settlements for change in s.accepted]
        filtered = [change.change_id for s in settlements for change in s.filtered]
        dead = [record for s in settlements for record in s.dead]
        ids = [*accepted, *filtered, *(record.change.change_id for record in dead)]
        self._refuse_repeats(ids)
        if not row.claimed.issuperset(ids):
            raise LedgerConflict(f"{row.name}: some of what is to be settled is not claimed.")
        row.claimed.difference_update(ids)
        row.settled.update(ids)
        row.accepted += len(accepted)
        row.filtered += len(filtered)
        self._bury(row, dead)
        self._supersede(row, [change for s in settlements if s.supersedes for change in s.accepted])
        batches = {batch.batch_id: batch for batch in self._ledger._batches if batch.target == row.name}
        for settlement in settlements:
            batch = batches.get(settlement.batch_id)
            if batch is not None:
                self._take_down(row, batch, settlement)

    @staticmethod
    def _take_down(row: _Target, batch: FakeBatch, settlement: Settlement) -> None:
        # A batch is not over while a member of it is claimed: nobody would ever send that one.
        if batch.state == "claimed" and row.claimed.isdisjoint(batch.change_ids):
            batch.state = "settled"
        batch.accepted += len(settlement.accepted)
        batch.dead += len(settlement.dead)
        batch.set_aside += settlement.set_aside
        batch.attempts += settlement.attempts
        batch.status = batch.status if settlement.status is None else settlement.status
        batch.seconds = batch.seconds if settlement.seconds is None else settlement.seconds
        batch.error = batch.error if settlement.error is None else settlement.error

    def _refuse_repeats(self, change_ids: Sequence[int]) -> None:
        if len(set(change_ids)) != len(change_ids):
            raise LedgerConflict(f"{self._target.name}: some change is named twice.")

    def _bury(self, row: _Target, dead: Sequence[DeadRecord]) -> None:
        row.dead += len(dead)
        self._ledger._dead_letters += [(row.name, record) for record in dead]

    def _supersede(self, row: _Target, accepted: Sequence[ChangeRecord]) -> None:
        newest = {(change.stream, change.key): change.change_id for change in sorted(accepted)}
        for target, record in self._ledger.open_dead_letters:
            older = record.change
            if target == row.name and older.change_id < newest.get((older.stream, older.key), 0):
                self._ledger.close_dead_letter(target, older.change_id)

    def check(self) -> None:
        _ = self._row

    def hold(self, *, status: Status, reason: str, failed_runs: int, retry_in: float | None) -> None:
        row = self._row
        retry_at = None if retry_in is None else self._ledger._clock.now() + timedelta(seconds=retry_in)
        row.status, row.reason, row.failed_runs, row.retry_at = status, reason, failed_runs, retry_at

    def resume(self) -> None:
        row = self._row
        row.status, row.reason, row.failed_runs, row.retry_at = "active", None, 0, None


def _state_of(row: _Target) -> TargetState:
    return TargetState(
        target=row.name,
        log_id=LOG_ID,
        status=row.status,
        reason=row.reason,
        failed_runs=row.failed_runs,
        retry_at=row.retry_at,
    )


class _Looking(FakeTargetLedger):
    """A target's rows as one sees them who does not hold its lock."""

    @property
    def _row(self) -> _Target:
        return self._target
