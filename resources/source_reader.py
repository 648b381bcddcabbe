"""Read the rows of a watched table as the change log would have them: by chunks in the order of the key, or by keys."""

from collections.abc import Iterator, Mapping, Sequence

import psycopg
from psycopg import sql

from pipelines.reconciliation.workspace import SourceRow
from resources.capture import apply_settings, key_text, payload_of
from resources.captured_table import CapturedTable
from resources.sql import statements


class SourceReader:
    """One table. Nothing is locked; each chunk is as it is when it is read."""

    def __init__(self, connection: psycopg.Connection, table: CapturedTable) -> None:
        self._connection = connection
        self._table = table
        numbers = [column.attnum for column in table.key]
        found = connection.execute(statements("capture")["key_types"], {"relation": table.oid, "numbers": numbers})
        self._types = {name: sql.SQL(type_name) for name, type_name in found}

    @property
    def composite(self) -> bool:
        """Whether the key has several columns."""
        return len(self._table.key) > 1

    def chunks(self, *, limit: int) -> Iterator[list[SourceRow]]:
        """Yield all rows, *limit* at a time."""
        after: list[str] | None = None
        while True:
            rows, after = self._chunk(after, limit)
            if rows:
                yield rows
            if len(rows) < limit:
                return

    def _chunk(self, after: list[str] | None, limit: int) -> tuple[list[SourceRow], list[str] | None]:
        columns = self._columns("t")
        last = sql.SQL(", ").join(sql.SQL("%s::text::{}").format(self._types[c.name]) for c in self._table.key)
        query = sql.SQL(
            "select {key}, {match}, payload::text, position from ("
            "  select {payload} as payload, array[{texts}] as position"
            "  from {table} t {beginning} order by {columns} limit {limit}"
            ") r"
        ).format(
            key=key_text(self._table, "payload"),
            match=self._match("payload"),
            payload=payload_of(self._table, "t"),
            texts=sql.SQL(", ").join(sql.SQL("t.{}::text").format(sql.Identifier(c.name)) for c in self._table.key),
            table=self._table.identifier,
            beginning=sql.SQL("") if after is None else sql.SQL("where ({}) > ({})").format(columns, last),
            columns=columns,
            limit=sql.Literal(limit),
        )
        with self._connection.transaction():
            apply_settings(self._connection)
            found = self._connection.execute(query, after or []).fetchall()
        rows = [SourceRow(key=key, match=match, payload=payload.encode()) for key, match, payload, _ in found]
        return rows, list(found[-1][3]) if found else None

    def by_keys(self, keys: Sequence[str]) -> Mapping[str, SourceRow]:
        """Return those of *keys* that have a row, by what they are matched by."""
        query = sql.SQL(
            "select {key}, {match}, payload::text from ("
            "  select {payload} as payload from {table} t"
            "  where ({columns}) in (select {typed} from unnest(%s::text[]) as k)"
            ") r"
        ).format(
            key=key_text(self._table, "payload"),
            match=self._match("payload"),
            payload=payload_of(self._table, "t"),
            table=self._table.identifier,
            columns=self._columns("t"),
            typed=self._typed("k"),
        )
        with self._connection.transaction():
            apply_settings(self._connection)
            found = self._connection.execute(query, [list(keys)]).fetchall()
        return {match: SourceRow(key=key, match=match, payload=payload.encode()) for key, match, payload in found}

    def note_extra(self, listing_id: int) -> None:
        """Note every record of a listing that has no row, unless it had one a moment ago that differed."""
        query = sql.SQL(
            "insert into distributary.found (listing_id, match, kind)"
            " select l.listing_id, l.match, 'extra' from distributary.listed l where l.listing_id = %s and not exists ("
            '  select from (select {row} as payload from {table} t) r where ({match}) collate "C" = l.match)'
            " on conflict do nothing"
        ).format(
            row=sql.SQL("jsonb_build_object({})").format(
                sql.SQL(", ").join(
                    sql.SQL("{}, t.{}").format(sql.Literal(c.name), sql.Identifier(c.name)) for c in self._table.key
                )
            ),
            table=self._table.identifier,
            match=self._match("r.payload"),
        )
        with self._connection.transaction():
            apply_settings(self._connection)
            self._connection.execute(query, [listing_id])

    def keys_of(self, matches: Sequence[str]) -> Mapping[str, str]:
        """Return the key that a row would have, of those of *matches* that are what a row would be matched by."""
        try:
            return self._keys_of(matches)
        except (psycopg.DataError, psycopg.errors.InvalidTextRepresentation):
            pass
        found: dict[str, str] = {}
        for match in matches:
            try:
                found.update(self._keys_of([match]))
            except (psycopg.DataError, psycopg.errors.InvalidTextRepresentation):
                continue  # '12a' is no key of a table that counts
        return found

    def _keys_of(self, matches: Sequence[str]) -> dict[str, str]:
        parts = (
            [sql.SQL("k")]
            if not self.composite
            else [sql.SQL("(k::jsonb ->> {})").format(sql.Literal(place)) for place in range(len(self._table.key))]
        )
        row = sql.SQL(", ").join(
            sql.SQL("{}, to_jsonb({}::{})").format(sql.Literal(column.name), part, self._types[column.name])
            for column, part in zip(self._table.key, parts, strict=True)
        )
        query = sql.SQL(
            "select k, {key} from ("
            "  select k, jsonb_build_object({row}) as payload from unnest(%s::text[]) as k"
            ") r where {match} = k"
        ).format(key=key_text(self._table, "payload"), row=row, match=self._match("payload"))
        with self._connection.transaction():
            apply_settings(self._connection)
            return {match: key for match, key in self._connection.execute(query, [list(matches)]) if key is not None}

    def _columns(self, alias: str) -> sql.Composable:
        return sql.SQL(", ").join(
            sql.SQL("{}.{}").format(sql.Identifier(alias), sql.Identifier(column.name)) for column in self._table.key
        )

    def _typed(self, name: str) -> sql.Composable:
        key = sql.SQL(name)
        if not self.composite:
            return sql.SQL("{}::{}").format(key, self._types[self._table.key[0].name])
        return sql.SQL(", ").join(
            sql.SQL("({}::jsonb ->> {})::{}").format(key, sql.Literal(place), self._types[column.name])
            for place, column in enumerate(self._table.key)
        )

    def _match(self, row: str) -> sql.Composable:
        """Return the SQL of what a row is matched by: its key's text, or the texts of its columns."""
        key = key_text(self._table, row)
        if not self.composite:
            return key
        return sql.SQL(
            "(select jsonb_agg(part order by place)::text"
            " from jsonb_array_elements_text(({})::jsonb) with ordinality as p (part, place))"
        ).format(key)
