"""Lists and findings in Postgres, behind the port of `pipelines.reconciliation.workspace`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from pipelines.changes.config import SourceConfig
from pipelines.reconciliation.workspace import (
    Appended,
    CannotReconcile,
    Finding,
    Kind,
    Listing,
    SourceRow,
    Summary,
    Workspace,
    Workspaces,
)
from resources.captured_table import CapturedTable, CaptureRefused, find_tables
from resources.database import connect
from resources.source_reader import SourceReader
from resources.source_rows import SourceBusy, SourceRows
from resources.sql import statements


class PostgresWorkspace(Workspace):
    """One stream of one target. Belongs to one thread, and to the connection that holds its lock."""

    def __init__(
        self, connection: psycopg.Connection, table: CapturedTable, *, target: str, stream: str, run_id: str
    ) -> None:
        self._connection = connection
        self._of = {"target": target, "stream": stream}
        self._run_id = run_id
        self._reader = SourceReader(connection, table)
        self._rows = SourceRows(connection, table)
        self._sql = statements("reconciliation")
        self._listing_id: int | None = None

    def begin(self, *, first: str, fingerprint: str, resume_within: float) -> Listing:
        found = self._connection.execute(self._sql["current"], self._of).fetchone()
        if found is not None:
            listing_id, known, ahead, complete, listed, unkeyed, pages, total, age, whole = found
            self._listing_id = listing_id
            if known == fingerprint and age <= resume_within and whole:
                return Listing(
                    next=ahead,
                    complete=complete,
                    listed=listed,
                    unkeyed=unkeyed,
                    pages=pages,
                    total=total,
                    resumed=True,
                )
            self.discard()
        with self._connection.transaction():
            begun = self._connection.execute(
                self._sql["begin"], {**self._of, "fingerprint": fingerprint, "next": first, "run_id": self._run_id}
            ).fetchone()
            if begun is None:
                raise CannotReconcile("the target has no row in the ledger; launch delivery_job first")
            self._listing_id = begun[0]
            self._define("make_partitions")
        return Listing(next=first, complete=False, listed=0, unkeyed=0, pages=0, total=None, resumed=False)

    def add_page(self, records: Mapping[str, bytes], *, unkeyed: int, next: str | None, total: int | None) -> int:
        with self._connection.transaction():
            # A page that a crash of the server takes back is asked for again.
            self._connection.execute("set local synchronous_commit = off")
            row = self._connection.execute(
                self._sql["add_records"],
                {
                    "listing_id": self._listing_id,
                    "matches": list(records),
                    "records": [record.decode() for record in records.values()],
                },
            ).fetchone()
            assert row is not None
            self._connection.execute(
                self._sql["advance"],
                {
                    "listing_id": self._listing_id,
                    "next": next,
                    "listed": row[0],
                    "unkeyed": unkeyed,
                    "total": total,
                    "run_id": self._run_id,
                },
            )
        return int(row[0])

    def list_again(self, *, first: str) -> None:
        self._execute("list_again", next=first)

    def discard(self) -> None:
        with self._connection.transaction():
            self._define("drop_partitions")
            self._execute("forget")
        self._listing_id = None

    def rows(self, *, limit: int) -> Iterator[Sequence[SourceRow]]:
        self._define("forget_found")
        self._define("analyze")
        return self._reader.chunks(limit=limit)

    def listed(self, matches: Sequence[str]) -> Mapping[str, bytes]:
        return {match: record.encode() for match, record in self._execute("listed", matches=list(matches))}

    def note(self, findings: Sequence[Finding]) -> None:
        if findings:
            self._execute(
                "note",
                matches=[one.match for one in findings],
                keys=[one.key for one in findings],
                kinds=[one.kind for one in findings],
                fields=[Jsonb(list(one.fields)) for one in findings],
                reasons=[one.reason for one in findings],
            )

    def find_extra(self) -> None:
        assert self._listing_id is not None
        self._reader.note_extra(self._listing_id)

    def summarize(self, *, samples: int) -> Summary:
        self._define("analyze")
        # In this order: what is on its way may mend what is dead.
        self._execute("mark_in_flight", composite=self._reader.composite)
        self._execute("mark_dead", composite=self._reader.composite)
        self._execute("mark_twins")
        (moving,) = self._execute("moving", composite=self._reader.composite)[0]
        found: dict[Kind, list[Finding]] = {}
        for kind, match, key, fields, reason in self._execute("samples", limit=samples):
            found.setdefault(kind, []).append(
                Finding(match=match, kind=kind, key=key, fields=tuple(fields), reason=reason)
            )
        return Summary(
            counts=dict(self._execute("counts")),
            fields=list(self._execute("differing_fields")),
            samples=found,
            moving=moving,
        )

    def missing(self, *, limit: int, among: Sequence[str] | None = None) -> Sequence[SourceRow]:
        found = self._execute("some_missing", limit=limit, among=None if among is None else list(among))
        return list(self._reader.by_keys([key for (key,) in found]).values())

    def loaded(self) -> bool:
        row = self._connection.execute(self._sql["loaded"], self._of).fetchone()
        return row is not None and bool(row[0])

    def samples(self, matches: Sequence[str]) -> Mapping[str, tuple[SourceRow, bytes]]:
        held = self.listed(matches)
        keys = self._reader.keys_of(list(held))
        rows = self._reader.by_keys(list(keys.values()))
        return {match: (rows[match], record) for match, record in held.items() if match in rows}

    def append(self, kind: Kind, *, limit: int) -> Iterator[Appended]:
        after = None
        while True:
            found = self._execute("next_found", kind=kind, after=after, limit=limit)
            if not found:
                return
            after = found[-1][0]
            if kind != "extra":
                yield self._append([key for _, key, _ in found])
                continue
            alone = [match for match, _, twin in found if twin is None]
            yield self._append_extra(alone) + Appended(impossible=len(found) - len(alone))

    def _append(self, keys: Sequence[str]) -> Appended:
        appended = self._rows.append_present(target=self._of["target"], keys=keys)
        # What somebody is changing will be in the log as it becomes; what is gone is in it as it went.
        return Appended(snapshots=len(appended), busy=len(keys) - len(appended))

    def _append_extra(self, matches: Sequence[str]) -> Appended:
        keys = self._reader.keys_of(matches)
        impossible = len(matches) - len(keys)
        try:
            gone = self._rows.append_absent(target=self._of["target"], keys=list(keys.values())) if keys else set()
        except SourceBusy:
            gone = set()
        return Appended(deletes=len(gone), busy=len(keys) - len(gone), impossible=impossible)

    def _execute(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        text = self._sql[statement].replace("{selected}", self._sql["selected"])
        cursor = self._connection.execute(text, {"listing_id": self._listing_id, **parameters})
        return cursor.fetchall() if cursor.description is not None else []

    def _define(self, statement: str) -> None:
        """Make or drop what belongs to the listing alone."""
        _define(self._connection, statement, self._listing_id)


def _define(connection: psycopg.Connection, statement: str, listing_id: int | None) -> None:
    assert listing_id is not None
    names = {name: sql.Identifier(f"{name}_{listing_id}") for name in ("listed", "found")}
    text = statements("reconciliation")[statement]
    for command in text.split(";"):
        connection.execute(sql.SQL(command).format(**names, listing_id=sql.Literal(listing_id)))


class PostgresWorkspaces(Workspaces):
    """Every target's workspaces, in the database of the ledger."""

    def __init__(self, url: str, source: SourceConfig) -> None:
        self._url = url
        self._source = source
        self._sql = statements("reconciliation")

    @contextmanager
    def open(self, target: str, stream: str, *, run_id: str) -> Iterator[Workspace]:
        try:
            with closing(
                connect(self._url, application_name="distributary reconciliation", autocommit=True)
            ) as connection:
                locked = connection.execute(self._sql["try_lock"], {"target": target, "stream": stream}).fetchone()
                if locked is None or not locked[0]:
                    raise CannotReconcile("another run is reconciling it; wait for that one")
                self._tidy(connection)
                table = self._find(connection, stream)
                yield PostgresWorkspace(connection, table, target=target, stream=stream, run_id=run_id)
        except psycopg.Error as problem:
            said = str(problem).strip().partition("\n")[0] or type(problem).__name__
            raise CannotReconcile(f"the database failed: {said}") from problem

    def _tidy(self, connection: psycopg.Connection) -> None:
        for (listing_id,) in connection.execute(self._sql["abandoned"]).fetchall():
            with connection.transaction():
                _define(connection, "drop_partitions", listing_id)
                connection.execute(self._sql["forget"], {"listing_id": listing_id})

    def _find(self, connection: psycopg.Connection, stream: str) -> CapturedTable:
        config = self._source.tables.get(stream)
        if config is None:
            raise CannotReconcile(f"source.yaml: there is no table {stream}, so there are no rows to compare; add it")
        try:
            (table,) = find_tables(connection, self._source.model_copy(update={"tables": {stream: config}}))
        except CaptureRefused as problem:
            raise CannotReconcile(f"source.yaml: tables.{problem}") from None
        return table
