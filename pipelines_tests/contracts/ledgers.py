"""One way to speak to either ledger and its source, so that one suite can ask both the same."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import uuid4

import psycopg

from pipelines.changes.record import ChangeRecord, Operation
from pipelines.delivery.ledger import Claim, Ledger, Leftover, PendingWindow, TargetLedger, Window
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger, FakeLockLost
from resources.postgres_ledger import PostgresLedger

PATIENCE = 10.0


class Writer(Protocol):
    """An open transaction of the source."""

    def append(
        self,
        stream: str,
        key: str,
        *,
        operation: Operation = "update",
        payload: bytes = b"{}",
        target: str | None = None,
        replays: int | None = None,
    ) -> int: ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What is kept of a refused change."""

    target: str
    change_id: int
    stream: str
    key: str
    reason: str
    status: int | None
    attempts: int


@dataclass(frozen=True, slots=True)
class BatchRow:
    """What is kept of a batch."""

    batch_id: int
    lane: int
    change_ids: tuple[int, ...]
    state: str
    accepted: int
    dead: int
    attempts: int
    status: int | None
    error: str | None


class Subject(ABC):
    """A ledger under test, its source, and what the port does not show."""

    ledger: Ledger
    lost: type[Exception]
    """What a holder that lost its lock is told."""

    @abstractmethod
    def begin(self) -> Writer:
        """Open a transaction of the source on a connection of its own."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the ledger's time."""

    @abstractmethod
    def settled_ranges(self, target: str) -> list[tuple[int, int]]:
        """Return the settled set as ranges, both ends included."""

    @abstractmethod
    def claimed_ids(self, target: str) -> set[int]: ...

    @abstractmethod
    def dead_letters(self) -> list[DeadLetter]: ...

    @abstractmethod
    def blocks(self) -> dict[int, int | None]:
        """Return the open dead letters, each with the change that it is blocked by."""

    @abstractmethod
    def batches(self) -> list[BatchRow]: ...

    @contextmanager
    def open(self, target: str) -> Iterator[TargetLedger]:
        """Take the lock of *target*, which nobody has."""
        with self.ledger.open_target(target, run_id="run") as ledger:
            assert ledger is not None
            yield ledger

    def append(self, stream: str = "customers", key: str = "1", **more: Any) -> int:
        """Commit one record in a transaction of its own and return its change id."""
        writer = self.begin()
        change_id = writer.append(stream, key, **more)
        writer.commit()
        return change_id

    def draw_and_roll_back(self) -> int:
        """Use a change id up."""
        writer = self.begin()
        change_id = writer.append("customers", "rolled back")
        writer.rollback()
        return change_id


class FakeSubject(Subject):
    lost = FakeLockLost

    def __init__(self) -> None:
        self._clock = FakeClock()
        self.ledger = self._fake = FakeLedger(clock=self._clock)

    def begin(self) -> Writer:
        return self._fake.begin()

    def now(self) -> datetime:
        return self._clock.now()

    def settled_ranges(self, target: str) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        for change_id in sorted(self._fake.settled[target]):
            if ranges and ranges[-1][1] == change_id - 1:
                ranges[-1] = (ranges[-1][0], change_id)
            else:
                ranges.append((change_id, change_id))
        return ranges

    def claimed_ids(self, target: str) -> set[int]:
        return set(self._fake.claimed[target])

    def dead_letters(self) -> list[DeadLetter]:
        return [
            DeadLetter(
                target,
                record.change.change_id,
                record.change.stream,
                record.change.key,
                record.reason,
                record.status,
                record.attempts,
            )
            for target, record in self._fake.dead_letters
        ]

    def blocks(self) -> dict[int, int | None]:
        return {record.change.change_id: record.blocked_by for _, record in self._fake.open_dead_letters}

    def batches(self) -> list[BatchRow]:
        return [
            BatchRow(
                batch.batch_id,
                batch.lane,
                batch.change_ids,
                batch.state,
                batch.accepted,
                batch.dead,
                batch.attempts,
                batch.status,
                batch.error,
            )
            for batch in self._fake.batches
        ]


class PostgresWriter:
    """A transaction on a connection of its own; its records are direct inserts."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self._connection = stack.enter_context(psycopg.connect(url))

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
        row = self._connection.execute(
            "insert into distributary.change_log (stream, key, operation, payload, target, replays)"
            " values (%s, %s, %s, %s::jsonb, %s, %s) returning change_id",
            [stream, key, operation, payload.decode(), target, replays],
        ).fetchone()
        assert row is not None
        return int(row[0])

    def commit(self) -> None:
        self._connection.commit()
        self._connection.close()

    def rollback(self) -> None:
        self._connection.rollback()
        self._connection.close()


class PostgresSubject(Subject):
    lost = psycopg.Error

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.url = url
        self.ledger = PostgresLedger(url)
        self._stack = stack
        self._reader = stack.enter_context(psycopg.connect(url, autocommit=True))

    def begin(self) -> Writer:
        return PostgresWriter(self.url, self._stack)

    def now(self) -> datetime:
        return datetime.now(UTC)

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Return what *query* finds, seen from outside."""
        return self._reader.execute(query, parameters).fetchall()

    def settled_ranges(self, target: str) -> list[tuple[int, int]]:
        return [
            (lower, upper - 1)
            for lower, upper in self.rows(
                "select lower(r), upper(r) from distributary.target_state, unnest(settled) r"
                " where target = %s order by 1",
                target,
            )
        ]

    def claimed_ids(self, target: str) -> set[int]:
        return {
            change_id
            for lower, upper in self.rows(
                "select lower(r), upper(r) from distributary.target_state, unnest(claimed) r where target = %s", target
            )
            for change_id in range(lower, upper)
        }

    def dead_letters(self) -> list[DeadLetter]:
        rows = self.rows(
            "select target, change_id, stream, key, reason, status_code, attempts from distributary.dead_letter"
            " order by died_at, change_id"
        )
        return [DeadLetter(*row) for row in rows]

    def blocks(self) -> dict[int, int | None]:
        return dict(self.rows("select change_id, blocked_by from distributary.dead_letter where state = 'open'"))

    def batches(self) -> list[BatchRow]:
        rows = self.rows(
            "select batch_id, lane, change_ids, state, accepted, dead, attempts, status_code, error"
            " from distributary.batch order by batch_id"
        )
        return [BatchRow(row[0], row[1], tuple(row[2]), *row[3:]) for row in rows]


# --- what drains do, in few words -------------------------------------------------------------------------------------


def read(ledger: TargetLedger, *, max_records: int = 1000, max_bytes: int = 1_000_000) -> PendingWindow:
    """Return the next window."""
    return ledger.pending(max_records=max_records, max_bytes=max_bytes)


def left_over(ledger: TargetLedger, *, max_records: int = 1000) -> list[Leftover]:
    """Return all that is left over, in its order."""
    return [left for part in ledger.leftovers(max_records=max_records, max_bytes=1_000_000) for left in part]


def ids(records: Sequence[ChangeRecord]) -> list[int]:
    """Return the change ids of *records*, in their order."""
    return [record.change_id for record in records]


def claim_of(*changes: ChangeRecord, lane: int = 0) -> Claim:
    """Return a batch of *changes* about to be written down."""
    return Claim(lane=lane, stream=changes[0].stream, operation="upsert", changes=changes, idempotency_key=uuid4())


def claim_each(ledger: TargetLedger, window: PendingWindow) -> Mapping[int, ChangeRecord]:
    """Claim every record of *window* in a batch of its own and close its gaps; return the records by batch id."""
    claims = [claim_of(change) for change in window.records]
    batch_ids = ledger.claim(Window(claims=claims, decided_up_to=window.decided_up_to))
    return dict(zip(batch_ids, window.records, strict=True))


def comes_true(condition: Callable[[], bool]) -> bool:
    """Return whether *condition* holds before long: Postgres' own transactions may keep a gap open for a moment."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
