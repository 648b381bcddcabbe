"""Backfills in Postgres, behind the port of `pipelines.operating.backfilling`."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from pipelines.changes.config import SourceConfig
from pipelines.operating.backfilling import Backfill, Backfiller, BackfillProgress, CannotBackfill
from resources.captured_table import CaptureRefused, find_tables
from resources.database import connect
from resources.source_rows import SourceRows
from resources.sql import statements

_AT_ONCE = 1000
_PAUSE = 10.0
_LOOK_AGAIN = 1.0


class PostgresBackfiller(Backfiller):
    """Reads the log and the tables of one source, and appends to the log."""

    def __init__(self, url: str, source: SourceConfig) -> None:
        self._url = url
        self._source = source
        self._sql = statements("backfills")
        self._append_originals = statements("dead_letters")["append_originals"]

    def _connect(self) -> psycopg.Connection:
        return connect(self._url, application_name="distributary backfill", autocommit=True)

    def run(self, backfill: Backfill, *, run_id: str) -> Iterator[BackfillProgress]:
        of_this = {
            "target": backfill.target,
            "stream": backfill.stream,
            "since": backfill.since,
            "until": backfill.until,
            "run_id": run_id,
        }
        with self._connect() as connection:
            while connection.execute(self._sql["try_lock"], of_this).fetchone() != (True,):
                yield BackfillProgress(appended=0, waiting=True)
                time.sleep(_LOOK_AGAIN)
            rows = self._rows_of(connection, backfill.stream) if backfill.mode == "state" else None
            try:
                found = connection.execute(self._sql["begin"], of_this).fetchone()
            except psycopg.errors.ForeignKeyViolation:
                raise CannotBackfill(
                    f"{backfill.target} was never delivered to; its first delivery gives it what its 'start' says."
                ) from None
            assert found is not None
            place, appended, by_day = found
            tally = _Tally(appended, by_day)
            what = "events" if rows is None else "keys"
            # Kept by the server, outside of any transaction: nobody's vacuum waits for it.
            with connection.cursor(name="backfill", withhold=True) as cursor:
                cursor.execute(self._sql[what], {**of_this, "position": place})
                while part := cursor.fetchmany(_AT_ONCE):
                    step = {**of_this, "position": str(part[-1][0])}
                    if rows is None:
                        self._append_events(connection, step, part, tally)
                    else:
                        for _ in self._append_states(connection, step, part, rows, tally):
                            yield tally.progress()
                    yield tally.progress()
            connection.execute(self._sql["finish"], of_this)
            yield tally.progress(done=True)

    def _append_events(
        self, connection: psycopg.Connection, step: Mapping[str, Any], part: Sequence[tuple[int, date]], tally: "_Tally"
    ) -> None:
        with connection.transaction():
            parameters = {"target": step["target"], "change_ids": [change_id for change_id, _ in part]}
            connection.execute(self._append_originals, parameters)
            tally.add(day for _, day in part)
            connection.execute(self._sql["advance"], {**step, **tally.columns()})

    def _append_states(
        self,
        connection: psycopg.Connection,
        step: Mapping[str, Any],
        part: Sequence[tuple[str, int, date]],
        rows: SourceRows,
        tally: "_Tally",
    ) -> Iterator[None]:
        """Append the states of the keys of *part*, each with its latest change then and its day; yield now and then."""
        days = {key: day for key, _, day in part}

        def as_they_were() -> Mapping[str, Any]:
            latest = [change_id for _, change_id, _ in part]
            return dict(connection.execute(self._sql["payloads"], {"change_ids": latest}).fetchall())

        for appended in rows.append_states(target=step["target"], keys=list(days), payloads=as_they_were):
            tally.add(days[key] for key in appended)
            yield
            if not appended:
                # Writers queue behind whoever waits for the table: they are left in peace for longer than that.
                time.sleep(_PAUSE)
        # Interrupted before this, these keys' states are appended once more.
        connection.execute(self._sql["advance"], {**step, **tally.columns()})

    def _rows_of(self, connection: psycopg.Connection, stream: str) -> SourceRows:
        config = self._source.tables.get(stream)
        if config is None:
            raise CannotBackfill(f"source.yaml: there is no table {stream}, so it has no state to send; add it.")
        try:
            (table,) = find_tables(connection, self._source.model_copy(update={"tables": {stream: config}}))
        except CaptureRefused as problem:
            raise CannotBackfill(f"source.yaml: tables.{problem}") from None
        return SourceRows(connection, table)

    def kept_since(self) -> datetime | None:
        with self._connect() as connection:
            found = connection.execute(self._sql["kept_since"]).fetchone()
        return None if found is None else found[0]


class _Tally:
    """How many records were appended so far, and of which days."""

    def __init__(self, appended: int, by_day: Mapping[str, int]) -> None:
        self._appended = appended
        self._by_day = Counter({date.fromisoformat(day): count for day, count in by_day.items()})

    def add(self, days: Iterable[date]) -> None:
        more = Counter(days)
        self._appended += more.total()
        self._by_day += more

    def columns(self) -> Mapping[str, Any]:
        return {"appended": self._appended, "by_day": Jsonb({str(day): count for day, count in self._by_day.items()})}

    def progress(self, *, done: bool = False) -> BackfillProgress:
        return BackfillProgress(appended=self._appended, by_day=dict(self._by_day), done=done)
