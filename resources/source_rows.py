"""Append the rows of a watched table, as they stand, to the change log, addressed to one target.

A row is locked (FOR SHARE) while its record is appended. So the record's change id lies after those of the changes that
made the row what it is, and before those of all later ones: no older state can come after a newer one.

Who holds rows' locks waits for nobody here. Else a writer of many rows, which takes them in an order of its own, could
wait for one that is held while it holds the one that is waited for, and Postgres would end either of the two.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from resources.capture import apply_settings, key_text, payload_of
from resources.captured_table import CapturedTable
from resources.sql import statements

_LOCK_TIMEOUT = "2s"


class SourceBusy(Exception):
    """A lock on a row, or on the table, was not had in time; nothing was written. Try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKey:
    """Which row of a table."""

    key: str
    """As the change log has it."""
    position: Sequence[str | None]
    """The key columns as text: where the rows after it begin."""


class SourceRows:
    """One table. Each method but `append_states` is one transaction, or part of the connection's open one."""

    def __init__(self, connection: psycopg.Connection, table: CapturedTable) -> None:
        self._connection = connection
        self._table = table
        # With their schemas: while rows are read, the search path is that of the triggers.
        numbers = [column.attnum for column in table.key]
        found = connection.execute(statements("capture")["key_types"], {"relation": table.oid, "numbers": numbers})
        self._types = {name: sql.SQL(type_name) for name, type_name in found}

    def next_keys(self, *, after: Sequence[str | None] | None, limit: int) -> Sequence[RowKey]:
        """Return the keys of up to *limit* rows that come after the key columns *after*, in the order of the key."""
        columns = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in self._table.key)
        last = sql.SQL(", ").join(
            sql.SQL("%s::text::{}").format(self._types[column.name]) for column in self._table.key
        )
        query = sql.SQL(
            "select {key}, position from ("
            "  select {payload} as payload, array[{texts}] as position, row_number() over (order by {columns}) as place"
            "  from {table} t {beginning} order by {columns} limit {limit}"
            ") t order by place"
        ).format(
            key=key_text(self._table, "payload"),
            payload=payload_of(self._table, "t"),
            texts=sql.SQL(", ").join(
                sql.SQL("t.{}::text").format(sql.Identifier(column.name)) for column in self._table.key
            ),
            table=self._table.identifier,
            beginning=sql.SQL("") if after is None else sql.SQL("where ({}) > ({})").format(columns, last),
            columns=columns,
            limit=sql.Literal(limit),
        )
        with self._connection.transaction():
            apply_settings(self._connection)
            rows = self._connection.execute(query, list(after or [])).fetchall()
        return [RowKey(key=key, position=position) for key, position in rows]

    def append_present(self, *, target: str, keys: Sequence[str]) -> set[str]:
        """Append the row of each of *keys* that there is and nobody is changing, as a `snapshot`; return those keys.

        Waits for nobody. What is left over is for `append_one`, once this is committed.
        """
        with self._connection.transaction():
            apply_settings(self._connection)
            return self._append(target, keys, sql.SQL("for share of t skip locked"))

    def append_one(self, *, target: str, key: str) -> bool:
        """Append the row of *key*, once nobody is changing it, and say whether there is one; raises SourceBusy.

        The transaction must hold no lock of another row, for here is waited.
        """
        try:
            with self._connection.transaction():
                self._connection.execute("select set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
                apply_settings(self._connection)
                return bool(self._append(target, [key], sql.SQL("for share of t")))
        except psycopg.errors.LockNotAvailable as error:
            raise SourceBusy(f"{self._table.stream} {key}: {error.diag.message_primary}") from None

    def _append(self, target: str, keys: Sequence[str], lock: sql.Composable) -> set[str]:
        query = sql.SQL(
            "with locked as materialized ("
            "  select {payload} as payload from {table} t where ({columns}) in (select {wanted}) {lock}"
            "), named as (select {key} as key, payload from locked"
            "), appended as ("
            "  insert into distributary.change_log (stream, key, operation, payload, target)"
            "  select {stream}, key, 'snapshot', payload, {target} from named"
            ") select key from named"
        ).format(
            payload=payload_of(self._table, "t"),
            table=self._table.identifier,
            columns=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in self._table.key),
            wanted=self._columns_of_keys(),
            lock=lock,
            key=key_text(self._table, "payload"),
            stream=sql.Literal(self._table.stream),
            target=sql.Literal(target),
        )
        return {key for (key,) in self._connection.execute(query, [list(keys)])}

    def append_absent(self, *, target: str, keys: Sequence[str], payloads: Mapping[str, Any] | None = None) -> set[str]:
        """Append a `delete` for each of *keys* that has no row, and return those keys; raises SourceBusy.

        No row is there to be locked, so for a moment the table is: else an insert that is not committed yet could have
        an older change id than the delete that does not know of it. *payloads* has rows as they were; by default a
        delete holds the key columns alone.
        """
        key_columns = sql.SQL(", ").join(
            sql.SQL("{}, to_jsonb({}::{})").format(sql.Literal(column.name), text, self._types[column.name])
            for column, text in zip(self._table.key, self._texts_of_key(), strict=True)
        )
        query = sql.SQL(
            "with wanted as ("
            "  select k, coalesce(p, jsonb_build_object({key_columns})) as payload"
            "  from unnest(%s::text[], %s::jsonb[]) as w (k, p)"
            "), absent as ("
            "  select * from wanted where not exists (select from {table} t where ({columns}) = ({of_key}))"
            "), appended as ("
            "  insert into distributary.change_log (stream, key, operation, payload, target)"
            "  select {stream}, k, 'delete', payload, {target} from absent"
            ") select k from absent"
        ).format(
            key_columns=key_columns,
            table=self._table.identifier,
            columns=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in self._table.key),
            of_key=self._typed_key(),
            stream=sql.Literal(self._table.stream),
            target=sql.Literal(target),
        )
        known = payloads or {}
        given = [json.dumps(known[key]) if key in known else None for key in keys]
        try:
            with self._connection.transaction():
                self._connection.execute("select set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
                self._connection.execute(sql.SQL("lock table {} in share mode").format(self._table.identifier))
                apply_settings(self._connection)
                return {key for (key,) in self._connection.execute(query, [list(keys), given])}
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            raise SourceBusy(f"{self._table.stream}: {error.diag.message_primary}") from None

    def append_states(
        self, *, target: str, keys: Sequence[str], payloads: Callable[[], Mapping[str, Any]] = dict
    ) -> Iterator[set[str]]:
        """Append what there is of each of *keys* now, its row or that it has none; yield which more are committed.

        In several transactions, so that none waits while it holds a row. Where a lock of others is in the way it yields
        no key, and tries what is left again when it is asked to go on. *payloads*, asked only if some seem to have no
        row, has rows as they were, as for `append_absent`.
        """
        left = list(dict.fromkeys(keys))
        while left and self.seem_absent(left):
            try:
                absent = self.append_absent(target=target, keys=left, payloads=payloads())
            except SourceBusy:
                yield set()
                continue
            left = [key for key in left if key not in absent]
            if absent:
                yield absent
            break
        if left:
            present = self.append_present(target=target, keys=left)
            left = [key for key in left if key not in present]
            if present:
                yield present
        while left:
            try:
                appended = self.append_one(target=target, key=left[0])
            except SourceBusy:
                yield set()
                continue
            key = left.pop(0)
            # One that is deleted in between is in the log as it is, for all targets.
            if appended:
                yield {key}

    def seem_absent(self, keys: Sequence[str]) -> bool:
        """Say whether some of *keys* seem to have no row; if not, `append_absent` and its lock are not needed."""
        query = sql.SQL("select count(*) from {table} t where ({columns}) in (select {wanted})").format(
            table=self._table.identifier,
            columns=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in self._table.key),
            wanted=self._columns_of_keys(),
        )
        with self._connection.transaction():
            apply_settings(self._connection)
            row = self._connection.execute(query, [list(keys)]).fetchone()
        return row is None or row[0] < len(set(keys))

    def _columns_of_keys(self) -> sql.Composable:
        """Return what follows `select` to make rows of key columns out of a parameter, a list of keys."""
        return sql.SQL("{} from unnest(%s::text[]) as k").format(self._typed_key())

    def _typed_key(self) -> sql.Composable:
        """Return the key columns, out of the key's text `k`."""
        return sql.SQL(", ").join(
            sql.SQL("{}::{}").format(text, self._types[column.name])
            for column, text in zip(self._table.key, self._texts_of_key(), strict=True)
        )

    def _texts_of_key(self) -> list[sql.Composable]:
        if len(self._table.key) == 1:
            return [sql.SQL("k")]
        return [sql.SQL("(k::jsonb ->> {})").format(sql.Literal(place)) for place in range(len(self._table.key))]
