"""Backfills in Postgres, behind the port of `pipelines.operating.backfilling`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import psycopg

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
            place, appended = found
            what = "events" if rows is None else "keys"
            # Kept by the server, outside of any transaction: nobody's vacuum waits for it.
            with connection.cursor(name="backfill", withhold=True) as cursor:
                cursor.execute(self._sql[what], {**of_this, "position": place})
                while part := cursor.fetchmany(_AT_ONCE):
                    step = {**of_this, "position": str(part[-1][0])}
                    if rows is None:
                        appended += self._append_events(connection, step, [change_id for (change_id,) in part])
                    else:
                        for more in self._append_states(connection, step, dict(part), rows):
                            appended += more
                            yield BackfillProgress(appended=appended)
                    yield BackfillProgress(appended=appended)
            connection.execute(self._sql["finish"], of_this)
            yield BackfillProgress(appended=appended, done=True)

    def _append_events(self, connection: psycopg.Connection, step: Mapping[str, Any], part: Sequence[int]) -> int:
        with connection.transaction():
            parameters = {"target": step["target"], "change_ids": list(part)}
            appended = connection.execute(self._append_originals, parameters).rowcount
            connection.execute(self._sql["advance"], {**step, "appended": appended})
        return appended

    def _append_states(
        self, connection: psycopg.Connection, step: Mapping[str, Any], latest: Mapping[str, int], rows: SourceRows
    ) -> Iterator[int]:
        """Append the states of the keys of *latest*, each with its latest change then; yield how many more."""

        def as_they_were() -> Mapping[str, Any]:
            found = connection.execute(self._sql["payloads"], {"change_ids": list(latest.values())})
            return dict(found.fetchall())

        appended = 0
        for more in rows.append_states(target=step["target"], keys=list(latest), payloads=as_they_were):
            appended += more
            yield more
            if not more:
                # Writers queue behind whoever waits for the table: they are left in peace for longer than that.
                time.sleep(_PAUSE)
        # Interrupted before this, these keys' states are appended once more.
        connection.execute(self._sql["advance"], {**step, "appended": appended})

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
