"""Initial loads in Postgres, behind the port of `pipelines.delivery.loading`."""

from collections.abc import Collection, Iterator, Sequence

import psycopg

from pipelines.changes.config import SourceConfig
from pipelines.delivery.loading import CannotLoad, Load, Loader, LoadProgress
from resources.captured_table import CapturedTable, CaptureRefused, find_tables
from resources.database import connect
from resources.source_rows import SourceRows
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
        with self._connect() as connection:
            table = self._find(connection, stream)
            rows = SourceRows(connection, table)
            about = self._estimate(connection, table)
            done, chunks = False, 0
            while not done:
                with connection.transaction():
                    of_this = {"target": target, "stream": stream}
                    taken = connection.execute(self._sql["take"], of_this).fetchone()
                    if taken is None:
                        return
                    chunk = rows.append_chunk(target=target, after=taken[0], limit=_ROWS_AT_ONCE)
                    position = None if chunk.last is None else list(chunk.last)
                    advanced = connection.execute(
                        self._sql["advance"], {**of_this, "position": position, "rows": chunk.rows, "run_id": run_id}
                    ).fetchone()
                assert advanced is not None
                done, chunks = position is None, chunks + 1
                yield LoadProgress(rows=advanced[0], of_about=max(about, advanced[0]), done=done, chunk=chunks)

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
