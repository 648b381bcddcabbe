"""The ledger in Postgres: `resources/sql/ledger.sql` behind the port of `pipelines.delivery.ledger`."""

import operator
from bisect import bisect_left
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from itertools import accumulate, chain, compress, count, groupby, islice
from struct import pack
from typing import Any, TypeVar, cast
from uuid import UUID

import msgspec
import psycopg
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.types.json import Jsonb
from psycopg.types.numeric import Int8BinaryLoader

from pipelines.changes.record import ChangeColumns, ChangeRecord, change_ids, keys, picked, streams
from pipelines.changes.texts import SEPARATOR, in_pieces
from pipelines.delivery.ledger import (
    LONG_TAIL,
    Claim,
    Conservation,
    Ledger,
    LedgerConflict,
    LedgerFailed,
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
from pipelines.delivery.outcome import DeadRecord
from resources.database import DatabaseProblem, connect
from resources.migrate import check_sequence
from resources.sql import statements

_LONGEST_TEXT = 2000
_PAYLOAD = ChangeRecord._fields.index("payload")
_IDS_AT_FIRST, _IDS_AT_ONCE, _BYTES_AT_ONCE = 25, 100, 1_000_000
_PREPARED = frozenset({"decided", "claim", "settle"})
"""What comes with every window. To prepare the others would be a round trip each, for once or twice."""
_INT8 = psycopg.postgres.types["int8"].oid
_Range = tuple[int, int]
_Cursor = TypeVar("_Cursor", bound=psycopg.Cursor[Any])


class SchemaMissing(DatabaseProblem):
    """The database was never migrated, or not by this version."""


class _KeyHoldsSeparator(Exception):
    """A key has U+0001 in it, so joined keys cannot be taken apart."""


class PostgresLedger(Ledger):
    """All targets' ledgers in one database. Opens a connection per call, and one per open target."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._sql = statements("ledger")

    @contextmanager
    def _connection(self, purpose: str) -> Iterator[psycopg.Connection]:
        with connect(self._url, application_name=f"distributary {purpose}") as connection:
            connection.autocommit = True
            try:
                yield connection
            except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName):
                raise SchemaMissing(
                    "The database has no schema 'distributary', or an older one: run `python -m resources.migrate`."
                ) from None

    def register(self, targets: Mapping[str, Start], *, streams: Mapping[str, Sequence[str]] | None = None) -> None:
        with self._connection("register") as connection:
            missing = connection.execute(self._sql["unregistered"], {"targets": list(targets)}).fetchall()
            for (target,) in missing:
                wanted = list((streams or {}).get(target, ()))
                connection.execute(self._sql[f"register_from_{targets[target]}"], {"target": target, "streams": wanted})

    @contextmanager
    def open_target(self, target: str, *, run_id: str) -> Iterator[TargetLedger | None]:
        with self._failing_in_words(), self._connection(f"drain {target}") as connection:
            row = connection.execute(self._sql["try_lock"], {"target": target}).fetchone()
            if row is None:
                raise LookupError(f"The target '{target}' is not registered; call register first.")
            if not row[0]:
                yield None
                return
            try:
                check_sequence(connection)
                connection.execute(self._sql["read_by_index"])
                yield PostgresTargetLedger(connection, target, run_id=run_id)
            finally:
                # Closing the connection frees it too, but a moment later: the next drain would find it held by nobody.
                with suppress(psycopg.Error):
                    connection.execute(self._sql["unlock"], {"target": target})

    @contextmanager
    def _failing_in_words(self) -> Iterator[None]:
        try:
            yield
        except DatabaseProblem as problem:
            raise LedgerFailed(str(problem)) from problem
        except psycopg.Error as error:  # of whatever class: a demoted primary is read-only, a role may lose its rights
            said = (error.diag.message_primary or str(error)).strip().splitlines()
            raise LedgerFailed(f"the database failed: {said[0] if said else type(error).__name__}") from error

    def owed(self, streams: Mapping[str, Sequence[str]]) -> Sequence[Owed]:
        wanted = Jsonb({target: list(names) for target, names in streams.items()})
        with self._connection("owed") as connection:
            rows = connection.execute(self._sql["owed"], {"streams": wanted, "long_tail": LONG_TAIL}).fetchall()
        return [
            Owed(target=target, has_work=has_work, held=held, status=status, reason=reason, waiting=waiting)
            for target, has_work, held, status, reason, waiting in rows
        ]

    def upcoming(self, target: str, *, max_records: int, max_bytes: int) -> Upcoming:
        with self._connection("preview") as connection, connection.transaction():
            connection.execute("set transaction isolation level repeatable read, read only")
            found = connection.execute(self._sql["log_identity"]).fetchone()
            assert found is not None  # the schema is there
            looking = PostgresTargetLedger(connection, target, run_id="")
            leftovers = next(looking.leftovers(max_records=max_records, max_bytes=max_bytes), [])
            # What is stopped in the midst fails its transaction: that must not be the one around.
            with connection.transaction(force_rollback=True):
                pending, complete = looking.read_pending(max_records=max_records, max_bytes=max_bytes)
            claimed = [change for left in leftovers for change in left.changes]
            blocked = looking.blocked({(change.stream, change.key) for change in (*claimed, *pending)})
        return Upcoming(log_id=found[0], leftovers=leftovers, pending=pending, blocked=blocked, more=not complete)

    def conservation(self, target: str) -> Conservation:
        with self._connection("conservation") as connection:
            row = connection.execute(self._sql["conservation"], {"target": target}).fetchone()
        if row is None:
            raise LookupError(f"The target '{target}' is not registered; call register first.")
        captured, accepted, superseded, filtered, dead, claimed, pending = row
        return Conservation(
            target=target,
            captured=captured,
            accepted=accepted,
            superseded=superseded,
            filtered=filtered,
            dead=dead,
            claimed=claimed,
            pending=pending,
        )


def _with_instants(cursor: _Cursor) -> _Cursor:
    """Have *cursor*, which must ask for binary results, give times as a `ChangeRecord` has them: as they are sent."""
    cursor.adapters.register_loader("timestamptz", Int8BinaryLoader)
    return cursor


def _in_order(columns: list[Any]) -> list[Any]:
    """Return *columns* by their ids: as they nearly surely are, but Postgres does not promise it of what it gathers."""
    ids = columns[0]
    if ids == sorted(ids):
        return columns
    places = sorted(range(len(ids)), key=ids.__getitem__)
    columns[_PAYLOAD] = columns[_PAYLOAD].split(SEPARATOR)
    found: list[Any] = [picked(column, places) for column in columns]
    found[_PAYLOAD] = SEPARATOR.join(found[_PAYLOAD])
    return found


def _filled(ids: Sequence[int], usual: Any, others: list[int] | None, values: list[Any] | None) -> list[Any]:
    """Return the column in which the rows of *ids* have what is *usual*, but those of *others* the *values*."""
    column = [usual] * len(ids)
    if others and values:
        places = dict(zip(ids, count()))
        for other, value in zip(others, values, strict=True):
            column[places[other]] = value
    return column


def _joined(parts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the ids of *parts*, which come in order and are there once."""
    if parts and parts[-1][-1] - parts[0][0] == sum(map(len, parts)) - 1:
        return range(parts[0][0], parts[-1][-1] + 1)
    return list(chain.from_iterable(parts))


def _are_in_a_row(ids: Sequence[int]) -> bool:
    """Say whether *ids*, in order, are many and have few gaps."""
    return len(ids) >= _IDS_AT_ONCE and (ids[-1] - ids[0] + 1) * 9 <= len(ids) * 10


class PostgresTargetLedger(TargetLedger):
    """One target's ledger on the connection that holds its lock."""

    def __init__(self, connection: psycopg.Connection, target: str, *, run_id: str) -> None:
        connection.adapters.register_dumper(_Ids, _IdsDumper)
        self._connection = connection
        self._target = target
        self._run_id = run_id
        self._sql = statements("ledger")
        self._usual_bytes: int | None = None
        """Of a change's row as text; those of the last window say what to expect of the next."""
        self._keys_are_plain = True
        """No key was met that cannot be sent joined to others."""
        self._prepared: set[str] = set()
        self._in_a_row = False
        """The last window was of ids with few gaps; so is the next then, as a rule, and can be read in less time."""

    def _execute(self, name: str, **parameters: Any) -> psycopg.Cursor[Any]:
        cursor = self._connection.cursor(binary=True)
        return cursor.execute(self._sql[name], {"target": self._target, **parameters}, prepare=name in _PREPARED)

    def _execute_as_written(self, name: str, **parameters: Any) -> psycopg.Cursor[Any]:
        """Execute what is to be planned for these very values, which the planner sees.

        How best to look for dead letters depends on how many there are, and of how many keys: a plan that was made for
        few of either takes seconds for many.
        """
        return psycopg.ClientCursor(self._connection).execute(self._sql[name], {"target": self._target, **parameters})

    def state(self) -> TargetState:
        row = self._execute("state").fetchone()
        assert row is not None  # its lock is held, and rows are never deleted
        log_id, status, reason, failed_runs, retry_at = row
        return TargetState(
            target=self._target, log_id=log_id, status=status, reason=reason, failed_runs=failed_runs, retry_at=retry_at
        )

    def leftovers(self, *, max_records: int, max_bytes: int) -> Iterator[Sequence[Leftover]]:
        # Parts that are written down on the way have later ids: they are no leftovers.
        row = self._execute("last_leftover").fetchone()
        up_to = row and row[0]
        place = (0, 0, 0)
        while up_to is not None:
            origin, first, batch_id = place
            parameters = {
                "target": self._target,
                "origin": origin,
                "first": first,
                "batch_id": batch_id,
                "up_to": up_to,
                "max_records": max_records,
                "max_bytes": max_bytes,
            }
            cursor = _with_instants(self._connection.cursor(binary=True))
            rows = cursor.execute(self._sql["leftovers"], parameters).fetchall()
            if not rows:
                return
            place = rows[-1][:3]
            yield self._leftovers_of(rows)

    def _leftovers_of(self, rows: Sequence[tuple[Any, ...]]) -> Sequence[Leftover]:
        return [
            Leftover(
                batch_id=batch_id,
                lane=lane,
                stream=stream,
                operation=operation,
                set_aside=set_aside,
                idempotency_key=idempotency_key,
                changes=[ChangeRecord._make(row[8:]) for row in members],
            )
            for (_, _, batch_id, lane, stream, operation, idempotency_key, set_aside), members in groupby(
                rows, key=lambda row: row[:8]
            )
        ]

    def blocked(self, keys: Collection[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
        rows = self._execute_as_written(
            "blocked", streams=[stream for stream, _ in keys], record_keys=[key for _, key in keys]
        )
        return {(stream, key): change_id for stream, key, change_id in rows}

    def pending(self, *, max_records: int, max_bytes: int) -> PendingWindow:
        if max_records < 1 or max_bytes < 1:
            # Reading nothing would look as if nothing were pending, and the gaps would close over what is.
            raise ValueError("a window has room for at least one record and one byte")
        # First what is decided, then what there is: all that was decided by then is seen by now.
        found = self._execute("decided").fetchone()
        assert found is not None  # its lock is held, and rows are never deleted
        fenced, decided = found
        records, complete = self.read_pending(max_records=max_records, max_bytes=max_bytes)
        if complete and not fenced:
            self._set_fence(read=_multirange(_ranges(change_ids(records))))
        return PendingWindow(records=records, complete=complete, decided_up_to=decided if complete else None)

    def read_pending(self, *, max_records: int, max_bytes: int) -> tuple[Sequence[ChangeRecord], bool]:
        """Return the oldest pending changes, and whether they are all there are."""
        try:
            return self._read_pending(max_records=max_records, max_bytes=max_bytes)
        except _KeyHoldsSeparator:
            self._in_a_row, self._keys_are_plain = False, False
            return self._read_pending(max_records=max_records, max_bytes=max_bytes)
        except psycopg.errors.ProgramLimitExceeded:
            # After small ones, very large ones: a gigabyte is more than Postgres sends at once. So one by one.
            self._usual_bytes = _BYTES_AT_ONCE
            return self._read_pending(max_records=max_records, max_bytes=max_bytes)
        except psycopg.errors.InvalidSqlStatementName:
            # When something is rolled back, psycopg lets go of all that is prepared on the connection.
            self._prepared.clear()
            return self._read_pending(max_records=max_records, max_bytes=max_bytes)

    def _read_pending(self, *, max_records: int, max_bytes: int) -> tuple[Sequence[ChangeRecord], bool]:
        # To stop in the midst takes a connection of its own: so no more is asked for than seems to fit. What comes
        # at once is here before it is weighed.
        usual = self._usual_bytes
        limit = max_records if usual is None else min(max_records, max_bytes // usual + 1)
        at_once = _IDS_AT_FIRST if usual is None else max(1, min(_IDS_AT_ONCE, _BYTES_AT_ONCE // usual))
        found: list[Any] = [[] for _ in ChangeRecord._fields[1:]]
        ids_of_parts: list[Sequence[int]] = []
        numbers: list[int] = []
        weight, more = 0, False
        with closing(self._pending(limit, ids_at_once=at_once)) as parts:  # what is left of them is not read
            for part, more in parts:
                number, texts = len(part[0]), part[_PAYLOAD]
                size = len(texts) - number + 1
                if weight + size >= max_bytes:
                    single = texts.split(SEPARATOR)
                    sizes = list(accumulate(map(len, single), initial=0))
                    # Up to the one that reaches the bound, and that with it.
                    number = bisect_left(sizes, max_bytes - weight)
                    size, texts = sizes[number], SEPARATOR.join(single[:number])
                part[_PAYLOAD] = [texts]
                ids_of_parts.append(part[0][:number])
                for column, read in zip(found, part[1:], strict=True):
                    column += read if number == len(read) else read[:number]
                numbers.append(number)
                weight += size
                if weight >= max_bytes:
                    more = True
                    break
        found[_PAYLOAD - 1] = in_pieces(found[_PAYLOAD - 1], numbers)
        records = ChangeColumns([_joined(ids_of_parts), *found])
        if records:
            self._usual_bytes = max(1, weight // len(records))
        elif self._in_a_row:  # or there is something, but in a hole
            self._in_a_row = False
            return self._read_pending(max_records=max_records, max_bytes=max_bytes)
        self._in_a_row = self._keys_are_plain and _are_in_a_row(change_ids(records))
        return records, not more and len(records) < limit

    def _pending(self, max_records: int, *, ids_at_once: int) -> Generator[tuple[list[Any], bool], None, None]:
        """Yield the oldest pending changes in order, as columns, those of so many ids at a time, their payloads joined.

        And with each, whether there are more than it is going to yield, as far as it can tell.
        """
        name = "pending_in_a_row" if self._in_a_row else "pending"
        if name not in self._prepared:
            statement = self._sql[name] % {"target": "$1", "max_records": "$2", "ids_at_once": "$3"}
            self._connection.execute(f"prepare {name} (text, bigint, bigint) as {statement}")
            self._prepared.add(name)
        # psycopg does not prepare what it streams, and to plan it anew for each window takes a tenth of its time.
        window = sql.SQL("execute {} ({}, {}, {})").format(
            sql.Identifier(name), sql.Literal(self._target), sql.Literal(max_records), sql.Literal(ids_at_once)
        )
        rows = _with_instants(self._connection.cursor()).stream(window, binary=True)
        with closing(cast("Generator[tuple[Any, ...], None, None]", rows)) as rows:
            if not self._in_a_row:
                for ids, of_streams, of_keys, operations, texts, made_at, replays in rows:
                    yield _in_order([ids, of_streams, of_keys, operations.split(","), texts, made_at, replays]), False
                return
            for first, number, sent_ids, joined_keys, texts, made_at, *differing, more in rows:
                ids = sent_ids or range(first, first + number)
                of_streams = _filled(ids, *differing[:3])
                operations = _filled(ids, *differing[3:6])
                replays = _filled(ids, None, *differing[6:])
                of_keys = joined_keys.split("\x01")
                if len(of_keys) != number:
                    raise _KeyHoldsSeparator
                yield [ids, of_streams, of_keys, operations, texts, made_at, replays], more

    def _set_fence(self, *, read: str) -> None:
        row = self._execute("last_change_id").fetchone()
        if row is not None and row[0] is not None:
            self._execute("set_fence", last=row[0], read=read)

    def claim(self, window: Window) -> Sequence[int]:
        members, firsts, lasts = _laid_end_to_end(window.claims)
        claimed = _ranges_of_many([change_ids(claim.changes) for claim in window.claims])
        settled = _ranges(
            [*change_ids(window.superseded), *change_ids(window.filtered), *map(_id_of_dead, window.dead)]
        )
        self._merged([*claimed, *settled])  # no change is in both
        streams_named, place_of_stream = _named([claim.stream for claim in window.claims])
        operations_named, place_of_operation = _named([claim.operation for claim in window.claims])
        with self._at_once_with(window.dead):
            row = self._execute(
                "claim",
                run_id=self._run_id,
                lanes=_array([claim.lane for claim in window.claims]),
                streams=streams_named,
                stream_each=place_of_stream,
                operations=operations_named,
                operation_each=place_of_operation,
                firsts=_array(firsts),
                lasts=_array(lasts),
                keys=_array_of_uuids([claim.idempotency_key for claim in window.claims]),
                members=_Ids(members),
                claimed=_multirange(claimed),
                settled=_multirange(settled),
                superseded=len(window.superseded),
                filtered=len(window.filtered),
                dead=len(window.dead),
                decided=window.decided_up_to,
            ).fetchone()
            if row is None:
                raise LedgerConflict(f"{self._target}: some of the window is settled or claimed already.")
            self._bury(window.dead)
        batch_ids: Sequence[int] = row[0]
        return batch_ids

    def split(self, batch_id: int, parts: Sequence[Claim]) -> Sequence[int]:
        members, firsts, lasts = _laid_end_to_end(parts)
        row = self._execute(
            "split",
            batch_id=batch_id,
            run_id=self._run_id,
            operations=[part.operation for part in parts],
            firsts=firsts,
            lasts=lasts,
            keys=[part.idempotency_key for part in parts],
            members=_Ids(members),
        ).fetchone()
        if row is None or row[0] is None:
            raise LedgerConflict(f"{self._target}: the parts are not what is still claimed of batch {batch_id}.")
        batch_ids: Sequence[int] = row[0]
        return batch_ids

    def settle(self, settlements: Sequence[Settlement]) -> None:
        dead = [record for s in settlements for record in s.dead]
        settled = self._merged(_ranges_of_many([_ids_of(s) for s in settlements]))
        batches = _by_batch(settlements)
        superseding = [change for s in settlements if s.supersedes for change in s.accepted]
        errors = [s.error and _storable(s.error) for s in batches]
        with self._at_once_with(dead or superseding):
            written = self._execute(
                "settle",
                batch_ids=_array([s.batch_id for s in batches]),
                set_aside=_array([s.set_aside for s in batches]),
                decided_each=_array([len(s.accepted) + len(s.dead) + len(s.filtered) for s in batches]),
                accepted_each=_array([len(s.accepted) for s in batches]),
                dead_each=_array([len(s.dead) for s in batches]),
                attempts=_array([s.attempts for s in batches]),
                statuses=_array([s.status for s in batches]),
                latencies=_array([None if s.seconds is None else s.seconds * 1000 for s in batches]),
                errors=None if errors.count(None) == len(errors) else errors,
                settled=_multirange(settled),
                accepted=sum(len(s.accepted) for s in settlements),
                filtered=sum(len(s.filtered) for s in settlements),
                dead=len(dead),
            )
            if written.rowcount != 1:
                raise LedgerConflict(f"{self._target}: some of what is to be settled is not claimed.")
            self._bury(dead)
            self._supersede(superseding)

    def _at_once_with(self, others: Sequence[object]) -> AbstractContextManager[object]:
        """Return the transaction around a statement and what it does to *others*; alone, it is one by itself."""
        return self._connection.transaction() if others else nullcontext()

    def _supersede(self, accepted: Sequence[ChangeRecord]) -> None:
        if accepted:
            self._execute_as_written(
                "supersede",
                change_ids=list(change_ids(accepted)),
                streams=list(streams(accepted)),
                record_keys=list(keys(accepted)),
            )

    def _merged(self, ranges: Sequence[_Range]) -> Sequence[_Range]:
        """Return *ranges* in order, those next to one another as one: Postgres would compare them one by one.

        Raises LedgerConflict if a change is in two of them.
        """
        merged: list[_Range] = []
        for first, last in sorted(ranges):
            end = merged[-1][1] if merged else -1
            if first <= end:
                # As a set it would be settled once, but it would be counted twice and so hide one that is missing.
                raise LedgerConflict(f"{self._target}: some change is named twice.")
            if merged and first == end + 1:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        return merged

    def _bury(self, dead: Sequence[DeadRecord]) -> None:
        if not dead:
            return
        self._execute(
            "bury",
            run_id=self._run_id,
            change_ids=[record.change.change_id for record in dead],
            streams=[record.change.stream for record in dead],
            record_keys=[record.change.key for record in dead],
            operations=[record.change.operation for record in dead],
            reasons=[_storable(record.reason) for record in dead],
            statuses=[_storable_status(record.status) for record in dead],
            responses=[record.response and _storable(record.response) for record in dead],
            attempts=[record.attempts for record in dead],
            blocked_by=[record.blocked_by for record in dead],
        )

    def check(self) -> None:
        self._execute("still_connected")

    def hold(self, *, status: Status, reason: str, failed_runs: int, retry_in: float | None) -> None:
        self._execute("hold", status=status, reason=_storable(reason), failed_runs=failed_runs, retry_in=retry_in)

    def resume(self) -> None:
        self._execute("resume")


def _laid_end_to_end(claims: Sequence[Claim]) -> tuple[list[int], list[int], list[int]]:
    """Return all members' ids, and where in them each claim begins and ends, counted from 1."""
    members: list[int] = []
    firsts: list[int] = []
    for claim in claims:
        firsts.append(len(members) + 1)
        members += change_ids(claim.changes)
    lasts = [first - 1 for first in firsts[1:]] + [len(members)] if firsts else []
    return members, firsts, lasts


def _by_batch(settlements: Sequence[Settlement]) -> Sequence[Settlement]:
    """Return one for each batch: a statement updates a row once, and would lose what is told of it a second time."""
    found: dict[int, Settlement] = {}
    for one in settlements:
        before = found.get(one.batch_id)
        found[one.batch_id] = one if before is None else _added(before, one)
    return list(found.values())


def _added(first: Settlement, then: Settlement) -> Settlement:
    return msgspec.structs.replace(
        then,
        accepted=[*first.accepted, *then.accepted],
        dead=[*first.dead, *then.dead],
        filtered=[*first.filtered, *then.filtered],
        set_aside=first.set_aside or then.set_aside,
        attempts=first.attempts + then.attempts,
        status=first.status if then.status is None else then.status,
        seconds=first.seconds if then.seconds is None else then.seconds,
        error=first.error if then.error is None else then.error,
    )


class _Ids:
    """Many change ids, to be sent as Postgres takes an array in its binary form.

    To read that takes it a quarter of the time of text.
    """

    __slots__ = ("ids",)

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids


class _IdsDumper(Dumper):
    """Has psycopg send `_Ids`."""

    format = Format.BINARY
    oid = psycopg.postgres.types["int8"].array_oid

    def dump(self, obj: _Ids) -> bytes:
        ids = list(obj.ids)
        number = len(ids)
        if not number:
            return pack(">iii", 0, 0, _INT8)
        return pack(">iiiii", 1, 0, _INT8, number, 1) + _elements(ids)


def _elements(ids: Sequence[int]) -> bytearray:
    """Return *ids* as the elements of a binary array: eight bytes each, and before them that they are eight.

    MessagePack is the fastest way there: of large numbers, each is a tag and then its bytes. If not all have one width,
    as some are small, `struct` takes four times as long.
    """
    number = len(ids)
    packed = msgspec.msgpack.encode(ids)
    head = 1 if number < 1 << 4 else 3 if number < 1 << 16 else 5
    if packed[head::5] == b"\xce" * number:
        start, step, width = head + 1, 5, 4
    elif packed[head::9] == b"\xcf" * number:
        start, step, width = head + 1, 9, 8
    else:
        packed = pack(f">{number}q", *ids)
        start, step, width = 0, 8, 8
    elements = bytearray(b"\0\0\0\x08\0\0\0\0\0\0\0\0") * number
    for place in range(width):
        elements[12 - width + place :: 12] = packed[start + place :: step]
    return elements


def _array(values: Sequence[int | float | None]) -> str:
    """Return numbers or truth values as Postgres writes an array: in one piece, for psycopg would look at each.

    JSON has the same words for them; of texts it would be another matter.
    """
    return "{" + msgspec.json.encode(values)[1:-1].decode() + "}"


def _array_of_uuids(values: Sequence[UUID]) -> str:
    return "{" + ",".join([value.hex for value in values]) + "}"


def _named(names: Sequence[str]) -> tuple[Sequence[str], str]:
    """Return each of *names* once, and as an array where among these each is, counted from 1."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names), 1)}
    return list(places), _array(list(map(places.__getitem__, names)))


def _ids_of(settlement: Settlement) -> Sequence[int]:
    """Return all ids that it names."""
    if not (settlement.filtered or settlement.dead):
        return change_ids(settlement.accepted)
    return [*change_ids(settlement.accepted), *change_ids(settlement.filtered), *map(_id_of_dead, settlement.dead)]


def _id_of_dead(record: DeadRecord) -> int:
    return record.change.change_id


def _ranges_of_many(batches: Sequence[Sequence[int]]) -> list[_Range]:
    """Return the ids of *batches* as ranges: of most a batch is one, and those of others often complete one another."""
    found: list[_Range] = []
    scattered: list[int] = []
    for ids in batches:
        if (one := _in_a_row(ids)) is not None:
            found.append(one)
        else:
            scattered += ids
    return found + _ranges(scattered)


def _in_a_row(ids: Sequence[int]) -> _Range | None:
    """Return the first and last of *ids* if they are all there are between these, each once."""
    if not ids:
        return None
    if isinstance(ids, range):
        return (ids[0], ids[-1]) if ids.step == 1 else None
    ordered, number = sorted(ids), len(ids)
    first, last = ordered[0], ordered[-1]
    return (first, last) if last - first == number - 1 and len(set(ids)) == number else None


def _ranges(ids: Sequence[int]) -> list[_Range]:
    """Return *ids* as ranges, by their first and last; an id that is there twice is in two of them."""
    if not ids:
        return []
    if (one := _in_a_row(ids)) is not None:  # a window of changes in a row, as it nearly always is
        return [one]
    ordered = sorted(ids)
    steps = map(operator.sub, islice(ordered, 1, None), ordered)
    begins = [0, *compress(count(1), map((1).__ne__, steps))]
    ends = [*(place - 1 for place in begins[1:]), -1]
    return [(ordered[begin], ordered[end]) for begin, end in zip(begins, ends, strict=True)]


def _multirange(ranges: Sequence[_Range]) -> str:
    """Return the set of what is in *ranges* as Postgres writes it."""
    return "{" + ",".join(f"[{first},{last}]" for first, last in ranges) + "}"


def _storable(text: str) -> str:
    """Return *text* as Postgres can keep it: a target's words may hold NUL, and have no end."""
    return text[:_LONGEST_TEXT].replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def _storable_status(status: int | None) -> int | None:
    """Return *status* if a column can hold it: of a single record a target may say any number."""
    return status if status is not None and abs(status) < 2**31 else None
