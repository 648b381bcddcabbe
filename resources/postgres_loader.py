"""Initial loads in Postgres, behind the port of `pipelines.delivery.loading`."""

from collections.abc import Collection, Iterator, Sequence

import psycopg

from pipelines.changes.config import SourceConfig
from pipelines.delivery.loading import CannotLoad, Load, Loader, LoadProgress
from resources.captured_table import CapturedTable, CaptureRefused, find_tables
from resources.database import connect
from resources.source_rows import SourceBusy, SourceRows
from resources.sql import statements

_ROWS_AT_ONCE = 2000


class PostgresLoader(Loader):
    """Reads the tables of one source and appends to its log."""

    def __init__(self, url: str, source: SourceConfig) -> None:
        self._url = url
        self._source = source
        self._sql = statements("loads")

    def _connect(self) -> psycopg.Connection:
        return connect(self._url, application_name="distributary load", autocommit=True)

    def begin(self, target: str, streams: Collection[str], *, again: bool = False) -> Sequence[str]:
        with self._connect() as connection:
            rows = connection.execute(self._sql["begin"], {"target": target, "streams": list(streams), "again": again})
            return [stream for (stream,) in rows]

    def loads(self, targets: Collection[str]) -> Sequence[Load]:
        with self._connect() as connection:
            rows = connection.execute(self._sql["loads"], {"targets": list(targets)}).fetchall()
        return [
            Load(target=target, stream=stream, rows=count, done=done, finished_at=finished_at)
            for target, stream, count, done, finished_at in rows
        ]

    def run(self, target: str, stream: str, *, run_id: str) -> Iterator[LoadProgress]:
        of_this = {"target": target, "stream": stream}
        with self._connect() as connection:
            if connection.execute(self._sql["try_lock"], of_this).fetchone() != (True,):
                return
            table = self._find(connection, stream)
            rows = SourceRows(connection, table)
            about = self._estimate(connection, table)
            chunk = 0
            while (found := connection.execute(self._sql["place"], of_this).fetchone()) is not None:
                place, before = found
                chunk += 1
                keys = rows.next_keys(after=place, limit=_ROWS_AT_ONCE)
                after = list(keys[-1].position) if len(keys) == _ROWS_AT_ONCE else None
                advance = {**of_this, "place": place, "position": after, "run_id": run_id}
                with connection.transaction():
                    present = rows.append_present(target=target, keys=[one.key for one in keys])
                    left = [one.key for one in keys if one.key not in present]
                    if not left:
                        connection.execute(self._sql["advance"], {**advance, "rows": len(present)})
                appended = len(present)
                # The place stays until these are in the log too: interrupted here, the chunk is appended once more.
                while left:
                    try:
                        appended += rows.append_one(target=target, key=left[0])
                        del left[0]
                        if not left:
                            connection.execute(self._sql["advance"], {**advance, "rows": appended})
                    except SourceBusy:
                        yield LoadProgress(rows=before + appended, of_about=about, done=False, chunk=chunk)
                so_far = before + appended
                yield LoadProgress(rows=so_far, of_about=max(about, so_far), done=after is None, chunk=chunk)

    def _find(self, connection: psycopg.Connection, stream: str) -> CapturedTable:
        config = self._source.tables.get(stream)
        if config is None:
            raise CannotLoad(f"source.yaml: there is no table {stream}, so there are no rows to load; add it.")
        try:
            (table,) = find_tables(connection, self._source.model_copy(update={"tables": {stream: config}}))
        except CaptureRefused as problem:
            raise CannotLoad(f"source.yaml: tables.{problem}") from None
        return table

    def _estimate(self, connection: psycopg.Connection, table: CapturedTable) -> int:
        found = connection.execute(
            self._sql["estimate"], {"relation": table.oid, "leaves": list(table.leaves)}
        ).fetchone()
        return 0 if found is None or found[0] is None else int(found[0])
