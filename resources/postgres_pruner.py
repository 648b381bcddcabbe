"""Pruning in Postgres, behind the port of `pipelines.operating.pruning`."""

from collections.abc import Iterator, Sequence
from datetime import datetime

import psycopg

from pipelines.operating.pruning import Holder, Pruned, Pruner
from resources.database import connect
from resources.sql import statements

_ROWS_AT_ONCE = 5000


class PostgresPruner(Pruner):
    """Removes rows in small transactions of their own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._sql = statements("prune")

    def _connect(self) -> psycopg.Connection:
        return connect(self._url, application_name="distributary prune", autocommit=True)

    def holders(self) -> Sequence[Holder]:
        with self._connect() as connection:
            rows = connection.execute(self._sql["states"]).fetchall()
        return [Holder(target=target, status=status, last_active=active) for target, status, active in rows]

    def prune(self, *, before: datetime, holding: Sequence[str], dropped: Sequence[str]) -> Iterator[Pruned]:
        with self._connect() as connection:
            yield from self._prune_changes(connection, before, holding)
            if dropped:
                connection.execute(self._sql["prune_empty_claims"], {"dropped": list(dropped)})
            gone = _ROWS_AT_ONCE
            while gone == _ROWS_AT_ONCE:
                done = connection.execute(self._sql["prune_batches"], {"before": before, "limit": _ROWS_AT_ONCE})
                gone = done.rowcount
                yield Pruned(batches=gone)

    def _prune_changes(
        self, connection: psycopg.Connection, before: datetime, holding: Sequence[str]
    ) -> Iterator[Pruned]:
        after: int | None = -1
        old = True
        while after is not None and old:
            row = connection.execute(
                self._sql["prune_changes"],
                {"before": before, "after": after, "holding": list(holding), "limit": _ROWS_AT_ONCE},
            ).fetchone()
            assert row is not None
            after, changes, old, missed = row
            yield Pruned(changes=changes, missed=missed)
