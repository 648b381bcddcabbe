"""Dead letters in Postgres, behind the port of `pipelines.operating.dead_letters`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg

from pipelines.changes.config import SourceConfig
from pipelines.operating.dead_letters import CannotRedrive, DeadLetters, Group, Redrive, Redriven, Selection
from resources.captured_table import CaptureRefused, find_tables
from resources.database import connect
from resources.source_rows import SourceBusy, SourceRows
from resources.sql import statements

_KEYS_AT_ONCE = 500


class PostgresDeadLetters(DeadLetters):
    """All targets' dead letters in one database, and the tables that a redrive of states reads."""

    def __init__(self, url: str, source: SourceConfig) -> None:
        self._url = url
        self._source = source
        found = dict(statements("dead_letters"))
        selected = found.pop("selected")
        self._sql = {name: text.replace("{selected}", selected) for name, text in found.items()}

    def _connect(self) -> psycopg.Connection:
        return connect(self._url, application_name="distributary dead letters", autocommit=True)

    def groups(self, selection: Selection) -> Sequence[Group]:
        with self._connect() as connection:
            rows = connection.execute(self._sql["groups"], _parameters(selection)).fetchall()
        return [
            Group(
                target=target,
                stream=stream,
                reason=reason,
                count=count,
                oldest=oldest,
                newest=newest,
                example_keys=keys,
            )
            for target, stream, reason, count, oldest, newest, keys in rows
        ]

    def redrive(self, selection: Selection, how: Redrive, *, run_id: str) -> Iterator[Redriven]:
        parameters = {
            **_parameters(selection),
            "target": how.target,
            "stream": how.stream,
            "whole": how.whole_keys,
            "run_id": run_id,
            "limit": _KEYS_AT_ONCE,
        }
        with self._connect() as connection:
            rows = self._rows_of(connection, how.stream) if how.mode == "state" else None
            after: str | None = None
            while keys := self._next_keys(connection, parameters, after):
                after = keys[-1]
                if rows is None:
                    yield self._redrive_events(connection, parameters, keys)
                else:
                    yield from self._redrive_states(connection, parameters, keys, rows)

    def _rows_of(self, connection: psycopg.Connection, stream: str) -> SourceRows:
        tables = {name: config for name, config in self._source.tables.items() if name == stream}
        if not tables:
            raise CannotRedrive(
                f"{stream} is no table of source.yaml, so it has no state to send; add it, or discard the dead letters."
            )
        try:
            (table,) = find_tables(connection, self._source.model_copy(update={"tables": tables}))
        except CaptureRefused as problem:
            raise CannotRedrive(f"source.yaml: tables.{problem}") from None
        return SourceRows(connection, table)

    def _next_keys(self, connection: psycopg.Connection, parameters: Mapping[str, Any], after: str | None) -> list[str]:
        return [key for (key,) in connection.execute(self._sql["next_keys"], {**parameters, "after": after})]

    def _redrive_events(
        self, connection: psycopg.Connection, parameters: Mapping[str, Any], keys: Sequence[str]
    ) -> Redriven:
        with connection.transaction():
            closed = self._close(connection, parameters, keys)
            appended = connection.execute(
                self._sql["append_originals"], {"target": parameters["target"], "change_ids": closed}
            )
            if appended.rowcount != len(closed):
                raise CannotRedrive(
                    f"{parameters['stream']}: some of the changes are no longer in the log; nothing more was redriven."
                )
        return Redriven(closed=len(closed), appended=appended.rowcount)

    def _redrive_states(
        self, connection: psycopg.Connection, parameters: Mapping[str, Any], keys: Sequence[str], rows: SourceRows
    ) -> Iterator[Redriven]:
        target: str = parameters["target"]
        absent: set[str] = set()
        try:
            if rows.seem_absent(keys):
                with connection.transaction():
                    # A delete is to hold the row as it was: a template may name more than the key.
                    found = connection.execute(self._sql["payloads"], {**parameters, "key_list": list(keys)})
                    absent = rows.append_absent(target=target, keys=keys, payloads=dict(found.fetchall()))
                    closed = self._close(connection, parameters, sorted(absent))
                yield Redriven(closed=len(closed), appended=len(absent))
        except SourceBusy as busy:
            raise CannotRedrive(f"{busy}; launch the redrive again, it goes on where it stopped.") from None
        with connection.transaction():
            present = rows.append_present(target=target, keys=[key for key in keys if key not in absent])
            closed = self._close(connection, parameters, sorted(present))
        yield Redriven(closed=len(closed), appended=len(present))
        for key in keys:
            if key not in absent and key not in present:
                yield self._redrive_state(connection, parameters, key, rows)

    def _redrive_state(
        self, connection: psycopg.Connection, parameters: Mapping[str, Any], key: str, rows: SourceRows
    ) -> Redriven:
        """Redrive one key, whose row others were changing; or it was deleted, and that is in the log, for all."""
        try:
            with connection.transaction():
                appended = rows.append_one(target=parameters["target"], key=key)
                closed = self._close(connection, parameters, [key])
        except SourceBusy as busy:
            raise CannotRedrive(f"{busy}; launch the redrive again, it goes on where it stopped.") from None
        return Redriven(closed=len(closed), appended=int(appended))

    def _close(self, connection: psycopg.Connection, parameters: Mapping[str, Any], keys: Sequence[str]) -> list[int]:
        rows = connection.execute(self._sql["close_keys"], {**parameters, "key_list": list(keys)})
        return [change_id for (change_id,) in rows]

    def discard(self, selection: Selection, *, note: str, run_id: str) -> int:
        with self._connect() as connection:
            done = connection.execute(self._sql["discard"], {**_parameters(selection), "note": note, "run_id": run_id})
        return done.rowcount


def _parameters(selection: Selection) -> dict[str, Any]:
    return {
        "targets": list(selection.targets),
        "streams": list(selection.streams),
        "keys": list(selection.keys),
        "change_ids_meant": list(selection.change_ids),
        "reason": selection.reason,
        "since": selection.since,
        "until": selection.until,
    }
