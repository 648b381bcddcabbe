"""Find the watched tables in the database, and refuse those whose changes could not be captured truly."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from pipelines.changes.config import CapturedOperation, SourceConfig, TableConfig, TableName
from resources.sql import statements

# Types whose equal values have one text. Not interval (1 day = 24 hours), arrays (their bounds are not in the text) or
# citext. Floating point is fine: jsonb has no -0. For numeric see Column.key_text.
_KEY_TYPES = frozenset(
    "int2 int4 int8 oid numeric float4 float8 text varchar bpchar name uuid bool date time timetz timestamp"  # noqa: SIM905
    " timestamptz bytea inet cidr macaddr macaddr8 bit varbit".split()
)
_NOT_A_TABLE = {
    "v": "is a view, which has no rows of its own; name the tables that it reads",
    "m": "is a materialized view, whose refresh fires no triggers; name the tables that it reads",
    "f": "is a foreign table, whose changes elsewhere fire no triggers; watch it in its own database",
}

_Row = TypeVar("_Row")


class CaptureRefused(Exception):
    """A table cannot be captured as the configuration asks. One line per table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column that the configuration names."""

    name: str
    attnum: int
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedTable:
    """One watched table, found in the database and fit to be captured."""

    stream: str
    oid: int
    name: TableName
    partitioned: bool
    branches: tuple[int, ...]
    """Partitions that are partitioned themselves."""
    leaves: tuple[int, ...]
    """Partitions that hold rows."""
    key: tuple[Column, ...]
    exclude: tuple[Column, ...]
    operations: frozenset[CapturedOperation]

    @property
    def identifier(self) -> sql.Identifier:
        """The table's name, as SQL."""
        return sql.Identifier(*self.name)


def find_tables(connection: psycopg.Connection, source: SourceConfig) -> tuple[CapturedTable, ...]:
    """Return the tables of *source* as they are in the database; raises CaptureRefused with all that is wrong."""
    found: list[CapturedTable] = []
    problems: list[str] = []
    for stream, config in source.tables.items():
        try:
            found.append(_find_table(connection, stream, source.table_name(stream), config))
        except CaptureRefused as problem:
            problems.append(f"{stream}: {problem}")
    if problems:
        raise CaptureRefused("\n".join(problems))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A row of `find_table`."""

    oid: int
    kind: str
    persistence: str
    relation: str
    of_the_system: bool
    owner: str
    may_alter: bool
    hides_rows: bool
    has_children: bool
    partition_of: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partition:
    """A row of `partitions`."""

    oid: int
    relation: str
    leaf: bool
    kind: str
    persistence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """A row of `columns`."""

    name: str
    attnum: int
    not_null: bool
    virtual: bool
    enumerated: bool
    built_in: bool
    type: str
    modifier: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _UniqueIndex:
    """A row of `unique_indexes`."""

    columns: list[str]
    is_primary: bool
    immediate: bool
    valid: bool
    whole: bool
    deterministic: bool


def _find_table(connection: psycopg.Connection, stream: str, name: TableName, config: TableConfig) -> CapturedTable:
    found = _rows(connection, "find_table", _Table, **name._asdict())
    if not found:
        raise CaptureRefused(f"there is no table {_shown(name)}{_hint(_near(connection, name))}")
    table = found[0]
    partitions = _rows(connection, "partitions", _Partition, relation=table.oid)
    _refuse_unseen_changes(table, partitions)
    _refuse_missing_rights(table, user=connection.info.user)
    columns = {column.name: column for column in _rows(connection, "columns", _Column, relation=table.oid)}
    for field, names in (("key", config.key_columns), ("exclude", config.exclude)):
        for missing in (column for column in names if column not in columns):
            near = difflib.get_close_matches(missing.lower(), columns, n=3, cutoff=0.5)
            raise CaptureRefused(
                f"'{missing}' in '{field}' is no column of the table{_hint(near or list(columns)[:9])}"
            )
    _refuse_virtual_columns(columns.values(), exclude=config.exclude)
    key = [columns[column] for column in config.key_columns]
    _refuse_unusable_key(key, _rows(connection, "unique_indexes", _UniqueIndex, relation=table.oid))
    return CapturedTable(
        stream=stream,
        oid=table.oid,
        name=name,
        partitioned=table.kind == "p",
        branches=tuple(partition.oid for partition in partitions if not partition.leaf),
        leaves=tuple(partition.oid for partition in partitions if partition.leaf),
        key=tuple(_named(column) for column in key),
        exclude=tuple(_named(columns[column]) for column in config.exclude),
        operations=frozenset(config.operations),
    )


def _refuse_unseen_changes(table: _Table, partitions: Sequence[_Partition]) -> None:
    """Raise CaptureRefused if rows could come and go without a trigger."""
    if table.kind not in ("r", "p"):
        raise CaptureRefused(f"this {_NOT_A_TABLE.get(table.kind, 'is not a table; name a table')}.")
    if table.of_the_system:
        raise CaptureRefused("temporary tables, and those of the system or of Distributary itself, cannot be watched.")
    if table.partition_of:
        raise CaptureRefused(f"this is a partition; name the whole table, {table.partition_of}.")
    if table.persistence == "u":
        raise CaptureRefused(
            "the table is UNLOGGED, so that a crash empties it without a delete; run"
            f" ALTER TABLE {table.relation} SET LOGGED."
        )
    if table.has_children:
        raise CaptureRefused(
            "other tables inherit from it, whose rows neither fire its triggers nor share its key; name those tables."
        )
    for partition in partitions:
        if partition.kind == "f" or partition.persistence == "u":
            kind = "a foreign table" if partition.kind == "f" else "UNLOGGED"
            raise CaptureRefused(
                f"its partition {partition.relation} is {kind}, so that not all of its changes are seen; detach it, or"
                " make it an ordinary table."
            )


def _refuse_missing_rights(table: _Table, *, user: str) -> None:
    if not table.may_alter:
        raise CaptureRefused(
            f"installing triggers needs the rights of the table's owner, which '{user}' has not got; run this as"
            f" '{table.owner}', or GRANT {_quoted(table.owner)} TO {_quoted(user)}."
        )
    if table.hides_rows:
        raise CaptureRefused(
            "FORCE ROW LEVEL SECURITY hides its rows even from its owner; run this as a role with BYPASSRLS."
        )


def _refuse_virtual_columns(columns: Iterable[_Column], *, exclude: Sequence[str]) -> None:
    for column in columns:
        if column.virtual and column.name not in exclude:
            raise CaptureRefused(
                f"the column '{column.name}' is GENERATED … VIRTUAL, whose value a trigger does not see; add it to"
                " 'exclude', or make it STORED."
            )


def _refuse_unusable_key(key: Sequence[_Column], indexes: Sequence[_UniqueIndex]) -> None:
    """Raise CaptureRefused unless equal keys are one row, and one text, at every moment."""
    names = sorted(column.name for column in key)
    shown = ", ".join(column.name for column in key)
    on_the_key = [index for index in indexes if sorted(index.columns) == names]
    flaws = [flaw for index in on_the_key if (flaw := _flaw(index))]
    if len(flaws) == len(on_the_key):
        primary = next((index for index in indexes if index.is_primary and not _flaw(index)), None)
        better = f"use its primary key, [{', '.join(primary.columns)}]" if primary else "make one that is usable"
        why = f"its unique index {flaws[0]}" if flaws else "it has no unique index on just these columns"
        raise CaptureRefused(f"the key ({shown}) does not tell the rows apart: {why}; {better}.")
    for column in key:
        if not column.not_null:
            raise CaptureRefused(
                f"the key column '{column.name}' may be null, and rows without a key cannot be told apart; ALTER it to"
                " SET NOT NULL."
            )
        known = column.enumerated or (column.built_in and column.type in _KEY_TYPES)
        # bpchar with no length keeps the blanks at the end, and disregards them when it compares.
        if not known or (column.type == "bpchar" and column.modifier == -1):
            raise CaptureRefused(
                f"the key column '{column.name}' is of type {column.type}, whose equal values can have different texts,"
                " and so would be different keys; use another unique key."
            )


def _flaw(index: _UniqueIndex) -> str | None:
    """Return why *index* does not make a usable key, None if it does."""
    if not index.immediate:
        # Until it is checked two rows may have one key, and then no row's lock puts the key's changes in order.
        return "is DEFERRABLE, so that two rows may have one key for a while"
    if not index.whole:
        return "is partial, and says nothing of the other rows"
    if not index.valid:
        return "is not valid; REINDEX it"
    if not index.deterministic:
        return "has a nondeterministic collation, for which different texts are one key"
    return None


def _near(connection: psycopg.Connection, name: TableName) -> list[str]:
    """Return up to three tables that *name* may have meant."""
    tables = [TableName(*row) for row in connection.execute(statements("capture")["table_names"])]
    elsewhere = [table for table in tables if table.table == name.table]
    spellings = difflib.get_close_matches(name.table.lower(), {table.table for table in tables}, n=3, cutoff=0.6)
    alike = [table for spelling in spellings for table in tables if table.table == spelling]
    return [_shown(table) for table in dict.fromkeys([*elsewhere, *alike])][:3]


def _shown(name: TableName) -> str:
    return name.table if name.schema == "public" else f"{name.schema}.{name.table}"


def _hint(near: Sequence[str]) -> str:
    return (
        f"; did you mean {' or '.join(near)}?"
        if near
        else "; check its name, and the database that DATABASE_URL names."
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _named(column: _Column) -> Column:
    return Column(name=column.name, attnum=column.attnum, type=column.type)


def _rows(connection: psycopg.Connection, statement: str, row: type[_Row], **parameters: object) -> list[_Row]:
    with connection.cursor(row_factory=class_row(row)) as cursor:
        return cursor.execute(statements("capture")[statement], parameters).fetchall()
