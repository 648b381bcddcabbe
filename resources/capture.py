"""Write every change of the watched tables into the change log, by triggers made for each table.

What holds, whatever the application does (each has its test):

* The function runs as the role that installed it, so the application's roles need no right on the schema distributary.
* The payload is the whole row as it is when the change happens: a column added later is captured at once, and a column
  that changes its type or its name breaks no write. What the text of a value looks like is fixed by SETTINGS.
* `change_id` is drawn by the trigger, while the row's lock is held: per key it is the order in which things happened.
* The trigger's name sorts before all others, the foreign keys' included, so that it has its turn before another trigger
  of the same row can change that row again. Where that is not enough, the function notices (see its comments).
* Triggers are ENABLE ALWAYS: a session with `session_replication_role = replica` is captured too.

What no trigger sees, and reconciliation finds: a table or a partition that is dropped or detached, a rewrite of a table
by ALTER TABLE, and a TRUNCATE that names a partition made since the last `python -m resources.migrate` (one that names
the whole table is seen).

What fails the write rather than be lost: a TRUNCATE in a REPEATABLE READ transaction, a row whose key was dropped, and
a value of type json that jsonb cannot hold (it takes no \\u0000).
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from pipelines.changes.config import SourceConfig
from resources.captured_table import CapturedTable, CaptureRefused, Column, find_tables
from resources.sql import statements

# The text of a value must be the same whoever writes it. Also for whoever else reads rows for the change log.
SETTINGS: Mapping[str, str] = {
    "search_path": "pg_catalog, pg_temp",
    "TimeZone": "UTC",
    "DateStyle": "iso, ymd",
    "IntervalStyle": "iso_8601",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "lc_monetary": "C",
    # A row that a policy hides must be an error and not a change that is not seen.
    "row_security": "off",
}
_LISTS = ("search_path", "DateStyle")  # settings whose value is several words; of the others it is one string

# Triggers of one event fire in the order of their names, and "!" sorts before letters, digits and
# "RI_ConstraintTrigger_…".
ROW_TRIGGER = "!distributary"
TRUNCATE_TRIGGER = "!distributary_truncate"

# While we wait for a table's lock, all of its writers wait behind us.
LOCK_TIMEOUT_MS = 2_000
LOCK_ATTEMPTS = 5
LOCK_PAUSE_SECONDS = 1.0
_TRIGGERS_UNCHANGED = "its triggers are as they were"

_OTHER_MIGRATOR_TIMEOUT_MS = 60_000
_ADVISORY_LOCK = 0x6469737472696275  # "distribu"

_ROW, _BEFORE, _INSERT, _DELETE, _UPDATE, _TRUNCATE = 1, 2, 4, 8, 16, 32  # pg_trigger.tgtype
_ALWAYS = "A"  # pg_trigger.tgenabled

_TEMPLATE = Path(__file__).parent / "sql" / "templates" / "capture_function.sql"


class CaptureBusy(Exception):
    """Others kept a table locked, or another migrator is at work, for longer than we wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What was done about one stream."""

    stream: str
    done: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.stream}: {self.done}"


def install_capture(
    connection: psycopg.Connection,
    source: SourceConfig,
    *,
    sleep: Callable[[float], None] = time.sleep,
    report: Callable[[Action], None] = lambda _: None,
) -> list[Action]:
    """Make the capture triggers be what *source* asks for, and tell what was done for each stream.

    Tables that are captured already as asked are not locked, and no change is lost while one way of capturing a table
    takes the other's place. *connection* must be outside of any transaction. Raises CaptureRefused before anything is
    changed; and CaptureBusy, with the tables done that were reported and the others as they were.
    """
    if connection.info.transaction_status is not psycopg.pq.TransactionStatus.IDLE:
        raise ValueError("install_capture needs a connection with no transaction open")
    actions: list[Action] = []

    def done(stream: str, what: str) -> None:
        actions.append(Action(stream=stream, done=what))
        report(actions[-1])

    with exclusively(connection):
        with connection.transaction():
            tables = find_tables(connection, source)
        watched = frozenset(oid for table in tables for oid in _relations(table))
        for table in tables:
            done(table.stream, _bring_up_to_date(connection, table, watched=watched, sleep=sleep))
        wanted = {function_name(table.stream) for table in tables}
        with connection.transaction():
            leftover = [function for name, function in _functions(connection).items() if name not in wanted]
        for function in leftover:
            _remove(connection, function, sleep=sleep)
            done(function.stream, "capture removed")
    return actions


@contextmanager
def exclusively(connection: psycopg.Connection) -> Iterator[None]:
    """Keep other migrators out for as long as the block lasts; raises CaptureBusy."""
    try:
        with connection.transaction():
            connection.execute("select set_config('lock_timeout', %s, true)", [f"{_OTHER_MIGRATOR_TIMEOUT_MS}ms"])
            connection.execute("select pg_advisory_lock(%s)", [_ADVISORY_LOCK])
    except psycopg.errors.LockNotAvailable:
        raise CaptureBusy("Another migration of this database is still at work; wait for it, or end it.") from None
    try:
        yield
    finally:
        if not connection.closed:
            with connection.transaction():
                connection.execute("select pg_advisory_unlock(%s)", [_ADVISORY_LOCK])


def function_name(stream: str) -> str:
    """Return the name of the stream's trigger function: readable, and unique within the 63 bytes of a name."""
    readable = re.sub(r"[^a-z0-9]+", "_", stream.lower())[:40].strip("_")
    return f"capture_{readable}_{hashlib.sha256(stream.encode()).hexdigest()[:8]}"


def rows_query(table: CapturedTable) -> sql.Composed:
    """Return the query for all rows of *table* as `key, payload`, the same as its triggers write them.

    To be run after `apply_settings`, or values may be written in another way.
    """
    return sql.SQL("select {key} as key, payload from (select {payload} as payload from {table} t) as r").format(
        key=key_text(table, "payload"),
        payload=payload_of(table, "t"),
        table=table.identifier,
    )


def payload_of(table: CapturedTable, alias: str) -> sql.Composable:
    """Return the SQL of what enters the log of the row *alias*."""
    return sql.SQL("to_jsonb({}) - {}").format(sql.SQL(alias), _names(table.exclude))


def apply_settings(connection: psycopg.Connection) -> None:
    """Apply SETTINGS until the end of the current transaction of *connection*."""
    for name, value in SETTINGS.items():
        connection.execute("select set_config(%s, %s, true)", [name, value])


# --- the function -----------------------------------------------------------------------------------------------------


def _function_body(connection: psycopg.Connection, table: CapturedTable) -> str:
    """Return the source text of the table's trigger function."""
    named = (*table.key, *table.exclude)
    numbers = sql.SQL(", ").join(sql.Literal(column.attnum) for column in named)
    return (
        sql.SQL(_TEMPLATE.read_text())
        .format(
            stream=sql.Literal(table.stream),
            relation=sql.SQL("{}::oid").format(sql.Literal(str(table.oid))),
            key_columns=_names(table.key),
            key_length=sql.Literal(len(table.key)),
            exclude=_names(table.exclude),
            has_exclude=sql.Literal(bool(table.exclude)),
            recorded_columns=_names(named),
            attribute_numbers=sql.SQL("array[{}]::smallint[]").format(numbers),
            before_key=key_text(table, "before"),
            after_key=key_text(table, "after"),
            logs_insert=sql.Literal("insert" in table.operations),
            logs_update=sql.Literal("update" in table.operations),
            logs_delete=sql.Literal("delete" in table.operations),
            inserted_within=sql.Literal(f"distributary.inserted_within_{table.oid}"),
            truncate=_truncate(connection, table),
        )
        .as_string(connection)
    )


def key_text(table: CapturedTable, row: str) -> sql.Composable:
    """Return the SQL of the key's text out of the jsonb *row*; several columns are an array, `["UA", 1545]`."""
    if len(table.key) == 1:
        return sql.SQL("{}::text").format(_column_text(table.key[0], row))
    values = [
        _column_text(column, row)
        if column.type == "numeric"
        else sql.SQL("{} -> {}").format(sql.SQL(row), sql.Literal(column.name))
        for column in table.key
    ]
    present = [sql.SQL("{} is not null").format(_column_text(column, row)) for column in table.key]
    return sql.SQL("case when {} then jsonb_build_array({})::text end").format(
        sql.SQL(" and ").join(present), sql.SQL(", ").join(values)
    )


def _column_text(column: Column, row: str) -> sql.Composable:
    text = sql.SQL("({} ->> {})").format(sql.SQL(row), sql.Literal(column.name))
    # 1.0 and 1.00 are one key.
    return sql.SQL("trim_scale({}::numeric)").format(text) if column.type == "numeric" else text


def _names(columns: Iterable[Column]) -> sql.Composable:
    return sql.SQL("array[{}]::text[]").format(sql.SQL(", ").join(sql.Literal(column.name) for column in columns))


def _truncate(connection: psycopg.Connection, table: CapturedTable) -> sql.Composable:
    """Return the statements that append a delete for every row which is about to go."""
    append = sql.SQL(
        "insert into distributary.change_log (stream, key, operation, payload)"
        " select {stream}, {key}, 'delete', r.row - $2"
        " from (select to_jsonb(t) || coalesce((select jsonb_object_agg(n.was, to_jsonb(t) -> n.now)"
        " from unnest({key_columns}, $1) n (was, now) where n.was <> n.now), '{{}}') as row from only "
    ).format(stream=sql.Literal(table.stream), key=key_text(table, "r.row"), key_columns=_names(table.key))

    def rows_of(relation: str) -> sql.Composable:
        return sql.SQL("execute {} || {} || ' t) r' using key_columns, excluded;").format(
            sql.Literal(append.as_string(connection)), sql.SQL(relation)
        )

    if not table.partitioned:
        return rows_of("tg_relid::regclass")
    # TRUNCATE of the whole fires the triggers of the whole and of its partitions. A new partition is given no statement
    # triggers. So each partition speaks for itself, and the whole for those that cannot.
    return sql.SQL(
        "if exists (select from pg_class c where c.oid = tg_relid and c.relkind = 'p') then"
        " for partition_name in select p.relid::regclass from pg_partition_tree(tg_relid) p where p.isleaf"
        " and not exists (select from pg_trigger t where t.tgrelid = p.relid and t.tgname = tg_name)"
        " loop {} end loop; else {} end if;"
    ).format(rows_of("partition_name"), rows_of("tg_relid::regclass"))


# --- what is there, and what should be --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Function:
    """A row of `functions`."""

    name: str
    stream: str
    body: str
    settings: list[str]
    definer: bool

    def is_current(self, body: str) -> bool:
        """Whether it does what a function with *body*, written now, would do."""
        settings = sorted(f"{name}={value}" for name, value in SETTINGS.items())
        return self.definer and self.body == body and sorted(self.settings) == settings


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Trigger:
    """A row of `triggers`."""

    relation: int
    name: str
    function: str
    type: int
    enabled: str

    @property
    def place(self) -> tuple[int, str]:
        """What can be there only once."""
        return (self.relation, self.name)


def _functions(connection: psycopg.Connection) -> dict[str, _Function]:
    with connection.cursor(row_factory=class_row(_Function)) as cursor:
        return {function.name: function for function in cursor.execute(_statement("functions"))}


def _triggers(connection: psycopg.Connection, function: str) -> set[_Trigger]:
    with connection.cursor(row_factory=class_row(_Trigger)) as cursor:
        return {trigger for trigger in cursor.execute(_statement("triggers")) if trigger.function == function}


def _wanted_triggers(table: CapturedTable) -> set[_Trigger]:
    # A change of the key is a delete and an insert, so updates are always watched.
    events = _UPDATE
    events |= _INSERT if "insert" in table.operations else 0
    events |= _DELETE if "delete" in table.operations else 0
    function = function_name(table.stream)
    wanted = {
        _Trigger(relation=oid, name=ROW_TRIGGER, function=function, type=_ROW | events, enabled=_ALWAYS)
        for oid in _relations(table)
    }
    if "delete" in table.operations:
        wanted |= {
            _Trigger(relation=oid, name=TRUNCATE_TRIGGER, function=function, type=_BEFORE | _TRUNCATE, enabled=_ALWAYS)
            for oid in (table.oid, *table.leaves)
        }
    return wanted


def _relations(table: CapturedTable) -> tuple[int, ...]:
    return (table.oid, *table.branches, *table.leaves)


# --- making it so -----------------------------------------------------------------------------------------------------


def _bring_up_to_date(
    connection: psycopg.Connection,
    table: CapturedTable,
    *,
    watched: frozenset[int],
    sleep: Callable[[float], None],
) -> str:
    """Make function and triggers of *table* what they should be, and say what that took."""
    with connection.transaction():
        body = _function_body(connection, table)
        function = _functions(connection).get(function_name(table.stream))
        present = _triggers(connection, function_name(table.stream))
    wanted = _wanted_triggers(table)
    is_current = function is not None and function.is_current(body)
    if present == wanted:
        if is_current:
            return "unchanged"
        # Replacing a function needs no lock on the table: every writer uses the new one from its next row on.
        with connection.transaction():
            _write_function(connection, table, body)
        return "capture changed"

    # What hangs on a table that goes by another name now, or is part of this one no more. Is that table watched as
    # another stream, then its own trigger takes the place.
    places = {trigger.place for trigger in wanted}
    strays = sorted(
        trigger
        for trigger in present
        if trigger.place not in places and (trigger.relation not in watched or trigger.relation in _relations(table))
    )

    def install() -> None:
        for oid in dict.fromkeys([table.oid, *(stray.relation for stray in strays)]):
            # No writer may come in between one trigger and the next.
            name = _relation_name(connection, oid)
            connection.execute(sql.SQL("lock table {} in share row exclusive mode").format(name))
        _write_function(connection, table, body)
        for stray in strays:
            _drop_trigger(connection, stray)
        _write_triggers(connection, table)

    relations = [*_relations(table), *(stray.relation for stray in strays)]
    patiently(connection, table.stream, relations, install, unchanged=_TRIGGERS_UNCHANGED, sleep=sleep)
    if function is None or not present:
        return "capture installed"
    return "capture repaired" if is_current else "capture changed"


def _remove(connection: psycopg.Connection, function: _Function, *, sleep: Callable[[float], None]) -> None:
    """Remove *function* and the triggers that call it."""
    with connection.transaction():
        triggers = sorted(_triggers(connection, function.name))

    def remove() -> None:
        for trigger in triggers:
            _drop_trigger(connection, trigger)
        connection.execute(sql.SQL("drop function {}()").format(sql.Identifier("distributary", function.name)))

    relations = [trigger.relation for trigger in triggers]
    patiently(connection, function.stream, relations, remove, unchanged=_TRIGGERS_UNCHANGED, sleep=sleep)


def _write_function(connection: psycopg.Connection, table: CapturedTable, body: str) -> None:
    name = sql.Identifier("distributary", function_name(table.stream))
    settings = sql.SQL(" ").join(
        sql.SQL("set {} = {}").format(sql.SQL(setting), sql.SQL(value) if setting in _LISTS else sql.Literal(value))
        for setting, value in SETTINGS.items()
    )
    head = sql.SQL("create or replace function {}() returns trigger language plpgsql security definer {} as {}")
    connection.execute(head.format(name, settings, sql.Literal(body)))
    connection.execute(sql.SQL("revoke all on function {}() from public").format(name))
    comment = f"Written by python -m resources.migrate, which also removes it; do not edit. Stream: {table.stream}"
    connection.execute(sql.SQL("comment on function {}() is {}").format(name, sql.Literal(comment)))


def _write_triggers(connection: psycopg.Connection, table: CapturedTable) -> None:
    function = sql.Identifier("distributary", function_name(table.stream))
    events = [event for event in ("insert", "update", "delete") if event == "update" or event in table.operations]
    on_row = sql.SQL("create or replace trigger {} after {} on {} for each row execute function {}()")
    connection.execute(
        on_row.format(
            sql.Identifier(ROW_TRIGGER),
            sql.SQL(" or ").join(map(sql.SQL, events)),
            _relation_name(connection, table.oid),
            function,
        )
    )
    if "delete" in table.operations:
        on_truncate = sql.SQL("create or replace trigger {} before truncate on {} execute function {}()")
        for oid in (table.oid, *table.leaves):
            name = _relation_name(connection, oid)
            connection.execute(on_truncate.format(sql.Identifier(TRUNCATE_TRIGGER), name, function))
    enable = sql.SQL("alter table only {} enable always trigger {}")
    for trigger in sorted(_wanted_triggers(table)):
        name = _relation_name(connection, trigger.relation)
        connection.execute(enable.format(name, sql.Identifier(trigger.name)))


def _drop_trigger(connection: psycopg.Connection, trigger: _Trigger) -> None:
    """Drop *trigger*; one that a partition has from its whole goes with the whole's."""
    parameters = {"relation": trigger.relation, "name": trigger.name}
    if connection.execute(_statement("is_cloned"), parameters).fetchone() == (False,):
        name = _relation_name(connection, trigger.relation)
        connection.execute(sql.SQL("drop trigger {} on {}").format(sql.Identifier(trigger.name), name))


def _relation_name(connection: psycopg.Connection, oid: int) -> sql.Identifier:
    row = connection.execute(_statement("relation_name"), {"relation": oid}).fetchone()
    if row is None:
        raise CaptureRefused("A table was dropped while its triggers were being changed; run this again.")
    return sql.Identifier(*row)


def patiently(
    connection: psycopg.Connection,
    what: str,
    relations: Sequence[int],
    change: Callable[[], None],
    *,
    unchanged: str,
    sleep: Callable[[float], None],
) -> None:
    """Make *change* in one transaction, giving way and trying again while others hold a lock of *relations*.

    Raises CaptureBusy: for *what* it was, what is *unchanged* because of it, and who holds the locks.
    """
    for attempt in range(LOCK_ATTEMPTS):
        if attempt:
            sleep(LOCK_PAUSE_SECONDS)
        try:
            with connection.transaction():
                connection.execute("select set_config('lock_timeout', %s, true)", [f"{LOCK_TIMEOUT_MS}ms"])
                change()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            continue
        else:
            return
    with connection.transaction():
        holders = connection.execute(_statement("blockers"), {"relations": list(relations)}).fetchall()
    who = ", ".join(f"pid {pid} ({name}, since {since:%H:%M:%S})" for pid, name, since in holders)
    raise CaptureBusy(
        f"{what}: other transactions keep the table locked{f': {who}' if who else ''}; {unchanged}; end those"
        " transactions, or run this again at a quieter time."
    )


def _statement(name: str) -> str:
    return statements("capture")[name]
