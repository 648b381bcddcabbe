"""Whatever an application does to a watched table is in the change log: once, whole, and per key in order.

Most tests end by asking whether a target that was told the log, change by change, would now hold what the table holds.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from pipelines.changes.config import SourceConfig
from resources import capture
from resources.capture import CaptureBusy, apply_settings, function_name, install_capture, rows_query
from resources.captured_table import CaptureRefused, find_tables

Change = tuple[str, str, dict[str, Any]]


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def another(database: str) -> Iterator[Callable[..., psycopg.Connection]]:
    """Return what opens one more connection to the same database."""
    opened: list[psycopg.Connection] = []

    def connect(**arguments: Any) -> psycopg.Connection:
        opened.append(psycopg.connect(database, **arguments))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture(scope="module")
def database_of_refusals(postgres_url: str, template_database: str) -> Iterator[psycopg.Connection]:
    """One database for all the tests that leave nothing in it: making one takes longer than they do."""
    name = sql.Identifier(f"refusals_{template_database}")
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {} template {}").format(name, sql.Identifier(template_database)))
        with psycopg.connect(postgres_url, dbname=f"refusals_{template_database}") as connection:
            yield connection
        server.execute(sql.SQL("drop database {} with (force)").format(name))


@pytest.fixture
def undone(database_of_refusals: psycopg.Connection) -> Iterator[psycopg.Connection]:
    with database_of_refusals.transaction(force_rollback=True):
        yield database_of_refusals


def source(**tables: dict[str, Any]) -> SourceConfig:
    return SourceConfig.model_validate({"tables": tables})


def install(connection: psycopg.Connection, **tables: dict[str, Any]) -> list[str]:
    return [str(action) for action in install_capture(connection, source(**tables))]


def changes(connection: psycopg.Connection, stream: str | None = None) -> list[Change]:
    """Return (operation, key, payload) of what was captured."""
    query = "select operation, key, payload from distributary.change_log where %(s)s::text is null or stream = %(s)s"
    return connection.execute(query + " order by change_id", {"s": stream}).fetchall()


def what(connection: psycopg.Connection) -> list[tuple[str, str]]:
    return [(operation, key) for operation, key, _ in changes(connection)]


def told(connection: psycopg.Connection, stream: str) -> dict[str, Any]:
    """Return what a target holds that was told every change, in order."""
    held: dict[str, Any] = {}
    for operation, key, payload in changes(connection, stream):
        if operation == "delete":
            held.pop(key, None)
        else:
            held[key] = payload
    return held


def rows(connection: psycopg.Connection, **tables: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the one table of *tables*, by key."""
    with connection.transaction():
        apply_settings(connection)
        (table,) = find_tables(connection, source(**tables))
        return dict(connection.execute(rows_query(table)).fetchall())


def our_triggers(connection: psycopg.Connection) -> list[Any]:
    return connection.execute(
        "select tgrelid::regclass, tgname from pg_trigger where tgname ~ 'distributary'"
    ).fetchall()


# --- what is written --------------------------------------------------------------------------------------------------


def test_inserts_updates_and_deletes_are_captured_in_order(connection: psycopg.Connection) -> None:
    connection.execute("create table orders (id int primary key, total numeric)")
    install(connection, orders={"key": "id"})

    connection.execute("insert into orders values (1, 10.50)")
    connection.execute("update orders set total = 11.00")
    connection.execute("delete from orders")

    assert changes(connection) == [
        ("insert", "1", {"id": 1, "total": 10.5}),
        ("update", "1", {"id": 1, "total": 11.0}),
        ("delete", "1", {"id": 1, "total": 11.0}),
    ]


def test_a_change_carries_the_id_of_the_transaction_that_made_it(connection: psycopg.Connection) -> None:
    """Gaps close by it; also within a savepoint it is the outer transaction's."""
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})

    with connection.transaction(), connection.transaction():
        connection.execute("insert into t values (1)")
        mine = connection.execute("select pg_current_xact_id()::text").fetchone()

    assert connection.execute("select xid::text from distributary.change_log").fetchone() == mine


def test_an_update_that_changes_nothing_is_not_captured(connection: psycopg.Connection) -> None:
    """Told by the bytes: json, xml and point have no equality operator."""
    connection.execute("create table t (id int primary key, j json, p point, n numeric, h text[])")
    install(connection, t={"key": "id"})
    connection.execute("""insert into t values (1, '{"a": 1}', '(1,2)', 1.0, '{x,null}')""")

    connection.execute("update t set j = j, p = p, n = n, h = h")

    assert what(connection) == [("insert", "1")]


def test_another_scale_of_the_same_number_is_a_change(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, n numeric)")
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, 1.0)")

    connection.execute("update t set n = 1.00")

    (written,) = connection.execute(
        "select payload::text from distributary.change_log where operation = 'update'"
    ).fetchall()
    assert written == ('{"n": 1.00, "id": 1}',)


@pytest.mark.parametrize("end", ["delete from people", "truncate people"])
def test_excluded_columns_never_enter_the_log(connection: psycopg.Connection, end: str) -> None:
    connection.execute('create table people (id int primary key, name text, hash text, "Odd one" text)')
    install(connection, people={"key": "id", "exclude": ["hash", "Odd one"]})

    connection.execute("insert into people values (1, 'Ann', 'secret', 'secret'), (2, 'Bo', 'secret', 'secret')")
    connection.execute("update people set name = upper(name), hash = 'secret too'")
    connection.execute("update people set id = id + 10")
    connection.execute(end)

    log = connection.execute("select string_agg(l::text, ' ') from distributary.change_log l").fetchone()
    assert log is not None
    assert "secret" not in log[0]
    assert len(changes(connection)) == 2 + 2 + 4 + 2
    assert told(connection, "people") == {}


def test_an_update_of_excluded_columns_only_is_not_captured(connection: psycopg.Connection) -> None:
    connection.execute("create table people (id int primary key, n numeric, hash text)")
    install(connection, people={"key": "id", "exclude": ["hash"]})
    connection.execute("insert into people values (1, 1.0, 'a')")

    connection.execute("update people set hash = 'b'")
    assert what(connection) == [("insert", "1")]
    connection.execute("update people set hash = 'c', n = 1.00")
    assert what(connection) == [("insert", "1"), ("update", "1")]


def test_a_changed_key_is_a_delete_and_an_insert(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v text)")
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, 'a')")

    connection.execute("update t set id = 2, v = 'b'")

    assert changes(connection)[1:] == [("delete", "1", {"id": 1, "v": "a"}), ("insert", "2", {"id": 2, "v": "b"})]


def test_keys_that_move_up_by_one_are_told_in_an_order_that_ends_well(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v text)")
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (3, 'c'), (2, 'b'), (1, 'a')")

    connection.execute("update t set id = id + 1")

    assert told(connection, "t") == rows(connection, t={"key": "id"})
    assert {key: row["v"] for key, row in told(connection, "t").items()} == {"2": "a", "3": "b", "4": "c"}


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        (["insert"], ["insert 1", "insert 2"]),
        (["update"], ["update 1"]),
        (["delete"], ["delete 1", "delete 2"]),
        (["insert", "delete"], ["insert 1", "delete 1", "insert 2", "delete 2"]),
    ],
)
def test_only_the_operations_asked_for_are_captured(
    connection: psycopg.Connection, operations: list[str], expected: list[str]
) -> None:
    """A changed key counts as a delete and an insert."""
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id", "operations": operations})

    connection.execute("insert into t values (1, 0)")
    connection.execute("update t set v = 1")
    connection.execute("update t set id = 2")
    connection.execute("truncate t")

    assert [f"{operation} {key}" for operation, key in what(connection)] == expected


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_composite_key_stand_in_the_order_of_the_configuration(connection: psycopg.Connection) -> None:
    connection.execute(
        "create table flights (flight int, carrier char(2), day date, primary key (day, flight, carrier))"
    )
    install(connection, flights={"key": ["carrier", "flight", "day"]})

    connection.execute("insert into flights values (1545, 'UA', '2013-01-01')")

    assert what(connection) == [("insert", '["UA", 1545, "2013-01-01"]')]


@pytest.mark.parametrize(
    ("type_", "value", "again", "key"),
    [
        ("numeric", "1.50", "1.5", "1.5"),
        ("numeric", "100", "100.000", "100"),
        ("numeric", "'NaN'", "'NaN'", "NaN"),
        ("float8", "'-0'", "0", "0"),
        ("float8", "0.1::float8 + 0.2", "0.1::float8 + 0.2", "0.30000000000000004"),
        ("char(5)", "'ab'", "'ab '", "ab   "),
        ("timestamptz", "'2024-01-01 12:00+02'", "'2024-01-01 05:00-05'", "2024-01-01T10:00:00+00:00"),
        ("inet", "'10.0.0.1/32'", "'10.0.0.1'", "10.0.0.1"),
        ("bytea", "'\\xff00'", "'\\xFF00'", "\\xff00"),
        ("boolean", "'yes'", "true", "true"),
        (
            "uuid",
            "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
            "'{a0eebc999c0b4ef8bb6d6bb9bd380a11}'",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
        ),
        ("mood", "'so so'", "'so so'", "so so"),
        ("small_number", "1.0", "1.000", "1"),
    ],
)
def test_equal_keys_have_one_text(connection: psycopg.Connection, type_: str, value: str, again: str, key: str) -> None:
    connection.execute("create type mood as enum ('so so'); create domain small_number as numeric check (value < 10)")
    connection.execute(f"create table t (k {type_} primary key, n int not null default 1, unique (n, k))")
    connection.execute(f"create table pair (k {type_} not null, n int not null default 1, primary key (n, k))")
    install(connection, t={"key": "k"}, pair={"key": ["k", "n"]})

    for written in (value, again):
        connection.execute(f"insert into t values ({written})")
        connection.execute(f"update t set n = n + 1 where k = {written}")
        connection.execute(f"delete from t where k = {written}")
        connection.execute(f"insert into pair values ({written})")
        connection.execute(f"delete from pair where k = {written}")

    assert {change[1] for change in changes(connection, "t")} == {key}
    assert len({change[1] for change in changes(connection, "pair")}) == 1


def test_a_number_that_changes_its_scale_keeps_its_key(connection: psycopg.Connection) -> None:
    connection.execute("create table t (k numeric primary key)")
    install(connection, t={"key": "k"})
    connection.execute("insert into t values (1.0)")

    connection.execute("update t set k = 1.00")

    assert what(connection) == [("insert", "1"), ("update", "1")]


@pytest.mark.parametrize(
    ("columns", "config", "sentence"),
    [
        ("id int", {"key": "id"}, "no unique index on just these columns; make one"),
        ("id int primary key, v int", {"key": "v"}, r"use its primary key, \[id\]"),
        ("id int unique", {"key": "id"}, "'id' may be null"),
        ("id int primary key deferrable", {"key": "id"}, "is DEFERRABLE"),
        ("id int primary key, v int not null unique deferrable", {"key": "v"}, "is DEFERRABLE.*use its primary key"),
        ("id interval primary key", {"key": "id"}, "type interval, whose equal values"),
        ("id int[] primary key", {"key": "id"}, "type _int4, whose equal values"),
        ("id bpchar primary key", {"key": "id"}, "type bpchar, whose equal values"),
        ("id text collate odd primary key", {"key": "id"}, "nondeterministic collation"),
        ("id int primary key, b int", {"key": ["id", "b"]}, r"the key \(id, b\) does not tell the rows apart"),
        ("id int, b int, primary key (id, b)", {"key": "id"}, r"use its primary key, \[id, b\]"),
        ("customer_id int primary key", {"key": "customerid"}, "'customerid' in 'key'.* did you mean customer_id?"),
        ('"ID" int primary key', {"key": "id"}, "did you mean ID?"),
        ("id int primary key, mail text", {"key": "id", "exclude": ["email"]}, "'exclude'.* did you mean mail?"),
        (
            "id int primary key, twice int generated always as (id * 2) virtual",
            {"key": "id"},
            "'twice' is GENERATED … VIRTUAL.* add it to 'exclude'",
        ),
    ],
)
def test_a_key_that_does_not_tell_rows_apart_is_refused(
    undone: psycopg.Connection, columns: str, config: dict[str, Any], sentence: str
) -> None:
    undone.execute("create collation odd (locale = 'C')")
    # As ICU collations can be; the embedded server has none.
    undone.execute("update pg_collation set collisdeterministic = false where collname = 'odd'")
    undone.execute(f"create table things ({columns})")

    with pytest.raises(CaptureRefused, match=f"^things: .*{sentence}"):
        find_tables(undone, source(things=config))


@pytest.mark.parametrize("condition", ["(lower(id))", "(id) where id <> ''"])
def test_a_unique_index_on_an_expression_or_on_some_rows_is_no_key(undone: psycopg.Connection, condition: str) -> None:
    undone.execute(f"create table t (id text not null); create unique index on t {condition}")

    with pytest.raises(CaptureRefused, match="does not tell the rows apart"):
        find_tables(undone, source(t={"key": "id"}))


def test_a_unique_index_that_includes_other_columns_is_a_key(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int not null, v int); create unique index on t (id) include (v)")

    assert install(connection, t={"key": "id"}) == ["t: capture installed"]


def test_an_index_whose_building_failed_is_no_key(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int not null); insert into t values (1), (1)")
    with pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute("create unique index concurrently i on t (id)")

    with pytest.raises(CaptureRefused, match="is not valid; REINDEX it"):
        install(connection, t={"key": "id"})


# --- sessions of all kinds --------------------------------------------------------------------------------------------


def test_what_is_written_does_not_depend_on_the_sessions_settings(connection: psycopg.Connection) -> None:
    connection.execute(
        "create table t (id timestamptz primary key, i interval, b bytea, f float8, m money, r tstzrange, d date)"
    )
    install(connection, t={"key": "id"})
    row = "'2024-01-01 00:00+00', '1 day 2 hours', '\\x00ff', 0.1::float8 + 0.2, 12.5::money"
    row += ", '[2024-01-01 00:00+00,)', '2024-02-01'"

    connection.execute(f"insert into t values ({row})")
    for setting in (
        "timezone = 'America/New_York'",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = sql_standard",
        "bytea_output = escape",
        "extra_float_digits = -10",
        "lc_monetary = 'C'",
        "search_path = ''",
        "row_security = on",
    ):
        connection.execute(f"set {setting}")
    connection.execute("delete from public.t")

    (first, second) = changes(connection)
    assert first == ("insert", "2024-01-01T00:00:00+00:00", first[2])
    assert second == ("delete", first[1], first[2])
    assert first[2] == {
        "id": "2024-01-01T00:00:00+00:00",
        "i": "P1DT2H",
        "b": "\\x00ff",
        "f": 0.30000000000000004,
        "m": "$12.50",
        "r": '["2024-01-01 00:00:00+00",)',
        "d": "2024-02-01",
    }


def test_the_writers_settings_are_its_own_again_afterwards(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})
    connection.execute("set timezone = 'Asia/Tokyo'")

    connection.execute("insert into t values (1)")

    assert connection.execute("show timezone").fetchone() == ("Asia/Tokyo",)


def test_a_role_needs_no_right_on_our_schema(connection: psycopg.Connection, role: str) -> None:
    connection.execute("create table t (id int primary key, v int)")
    connection.execute(sql.SQL("grant all on t to {}").format(sql.Identifier(role)))
    install(connection, t={"key": "id"})

    connection.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
    connection.execute("insert into t values (1, 1)")
    connection.execute("update t set v = 2")
    connection.execute("truncate t")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("select * from distributary.change_log")
    connection.execute("reset role")

    assert what(connection) == [("insert", "1"), ("update", "1"), ("delete", "1")]


def test_a_role_that_sees_few_rows_is_captured_like_any_other(connection: psycopg.Connection, role: str) -> None:
    connection.execute("create table t (id int primary key, owner text, v int default 0)")
    connection.execute("alter table t enable row level security; create policy p on t using (owner = current_user)")
    connection.execute(sql.SQL("grant all on t to {}").format(sql.Identifier(role)))
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, 'someone')")

    connection.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
    connection.execute("insert into t values (2, current_user)")
    connection.execute("update t set v = 1")
    connection.execute("truncate t")
    connection.execute("reset role")

    assert what(connection) == [
        ("insert", "1"), ("insert", "2"), ("update", "2"), ("delete", "1"), ("delete", "2")
    ]  # fmt: skip


def test_a_session_that_replicates_is_captured(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})
    connection.execute("set session_replication_role = replica")

    connection.execute("insert into t values (1)")
    connection.execute("truncate t")

    assert what(connection) == [("insert", "1"), ("delete", "1")]


# --- statements of all kinds ------------------------------------------------------------------------------------------


def test_upserts_merges_and_copies_are_captured(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id"})

    with connection.cursor() as cursor, cursor.copy("copy t from stdin") as copy:
        copy.write_row((1, 1))
        copy.write_row((2, 2))
    connection.execute("insert into t values (2, 20), (3, 30) on conflict (id) do update set v = excluded.v")
    connection.execute("insert into t values (2, 20) on conflict do nothing")
    connection.execute(
        "merge into t using (values (1), (2), (4)) s (id) on s.id = t.id when matched and t.id = 1 then delete"
        " when matched then update set v = 21 when not matched then insert values (s.id, 40)"
    )

    assert told(connection, "t") == rows(connection, t={"key": "id"})
    assert [operation for operation, key in what(connection) if key == "2"] == ["insert", "update", "update"]


def test_what_is_rolled_back_is_not_in_the_log(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id"})

    with connection.transaction():
        connection.execute("insert into t values (1, 1)")
        with connection.transaction() as savepoint:
            connection.execute("update t set v = 2; insert into t values (2, 2); delete from t where id = 1")
            raise psycopg.Rollback(savepoint)
        connection.execute("update t set v = 3")

    assert what(connection) == [("insert", "1"), ("update", "1")]
    assert told(connection, "t") == rows(connection, t={"key": "id"})


def test_a_before_trigger_has_its_say_first(connection: psycopg.Connection) -> None:
    connection.execute(
        "create table t (id int primary key, name text, slug text generated always as (lower(name)) stored)"
    )
    connection.execute(
        "create function shout() returns trigger language plpgsql as"
        " $$ begin new.name := upper(new.name); return new; end $$;"
        "create trigger zzz before insert or update on t for each row execute function shout()"
    )
    install(connection, t={"key": "id"})

    connection.execute("insert into t values (1, 'Ann')")

    assert changes(connection) == [("insert", "1", {"id": 1, "name": "ANN", "slug": "ann"})]


def test_deletes_that_cascade_are_captured(connection: psycopg.Connection) -> None:
    connection.execute("create table orders (id int primary key)")
    connection.execute("create table lines (id int primary key, order_id int references orders on delete cascade)")
    connection.execute("create table notes (id int primary key, order_id int references orders on delete set null)")
    install(connection, orders={"key": "id"}, lines={"key": "id"}, notes={"key": "id"})
    connection.execute(
        "insert into orders values (1); insert into lines values (7, 1); insert into notes values (8, 1)"
    )

    connection.execute("delete from orders")

    for stream in ("orders", "lines", "notes"):
        assert told(connection, stream) == rows(connection, **{stream: {"key": "id"}})
    assert told(connection, "notes") == {"8": {"id": 8, "order_id": None}}


def test_truncate_is_a_delete_of_every_row(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v text)")
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, 'a'), (2, 'b')")

    connection.execute("truncate t restart identity")

    assert changes(connection)[2:] == [("delete", "1", {"id": 1, "v": "a"}), ("delete", "2", {"id": 2, "v": "b"})]


def test_truncate_of_another_table_that_cascades_is_captured(connection: psycopg.Connection) -> None:
    connection.execute("create table orders (id int primary key)")
    connection.execute("create table lines (id int primary key, order_id int references orders)")
    install(connection, lines={"key": "id"})
    connection.execute("insert into orders values (1); insert into lines values (7, 1)")

    connection.execute("truncate orders cascade")

    assert what(connection) == [("insert", "7"), ("delete", "7")]


def test_truncate_is_refused_where_rows_would_go_unseen(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    """TRUNCATE also removes rows younger than a repeatable snapshot, in which we could not find them."""
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})
    old = another()
    old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    old.execute("select 1 from t")
    connection.execute("insert into t values (1)")

    with pytest.raises(
        psycopg.errors.FeatureNotSupported, match=r"TRUNCATE of public\.t in a REPEATABLE READ transaction"
    ):
        old.execute("truncate t")


# --- triggers of others -----------------------------------------------------------------------------------------------


def again(connection: psycopg.Connection, name: str, *, event: str, action: str) -> None:
    """Make a trigger *name* on t that does *action* after *event*."""
    connection.execute(
        sql.SQL(
            "create function {f}() returns trigger language plpgsql as $$ begin {action}; return null; end $$;"
            "create trigger {f} after {event} on t for each row execute function {f}()"
        ).format(f=sql.Identifier(name), action=sql.SQL(action), event=sql.SQL(event))
    )


@pytest.mark.parametrize("name", ["aaa", " sorts even before ours", "RI_ConstraintTrigger_a_1", "zzz"])
@pytest.mark.parametrize("exclude", [[], ["note"]])
def test_a_trigger_that_changes_the_row_again_does_not_overtake(
    connection: psycopg.Connection, name: str, exclude: list[str]
) -> None:
    config = {"key": "id", "exclude": exclude}
    connection.execute("create table t (id int primary key, v int, note text)")
    again(
        connection,
        name,
        event="insert or update",
        action="if new.v < 3 then update t set v = new.v + 1, note = 'x' where id = new.id; end if",
    )
    install(connection, t=config)

    connection.execute("insert into t values (1, 0), (2, 1)")
    connection.execute("update t set v = 1")

    assert told(connection, "t") == rows(connection, t=config)
    assert {row["v"] for row in told(connection, "t").values()} == {3}
    if name != " sorts even before ours":
        versions = [payload["v"] for _, key, payload in changes(connection) if key == "2"]
        assert versions == [1, 2, 3, 1, 2, 3], "every version, as it came about"


@pytest.mark.parametrize("statement", ["update t set v = 10", "update t set id = id + 100, v = 10"])
def test_a_trigger_that_changes_other_rows_of_the_statement_does_not_overtake(
    connection: psycopg.Connection, statement: str
) -> None:
    """Row 1's trigger changes row 3 before row 3's own change has been captured."""
    connection.execute("create table t (id int primary key, v int)")
    again(
        connection,
        "aaa",
        event="update",
        action="if pg_trigger_depth() = 1 then update t set v = v + 1 where id <> new.id; end if",
    )
    install(connection, t={"key": "id"})
    connection.execute("insert into t select generate_series(1, 4), 0")

    connection.execute(statement)

    assert told(connection, "t") == rows(connection, t={"key": "id"})


def test_a_trigger_that_deletes_other_rows_of_the_statement_leaves_them_deleted(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v int)")
    again(connection, "aaa", event="insert or update", action="delete from t where id > new.id")
    install(connection, t={"key": "id"})

    connection.execute("insert into t values (1, 1), (2, 2), (3, 3)")
    assert told(connection, "t") == rows(connection, t={"key": "id"}) == {"1": {"id": 1, "v": 1}}
    connection.execute("alter table t disable trigger aaa; insert into t values (2, 2), (3, 3)")
    connection.execute("alter table t enable trigger aaa; update t set v = 9")
    assert told(connection, "t") == rows(connection, t={"key": "id"}) == {"1": {"id": 1, "v": 9}}


def test_a_row_that_a_trigger_puts_back_stays(connection: psycopg.Connection) -> None:
    """Row 1's trigger inserts key 2 again before the delete of row 2 has been captured."""
    connection.execute("create table t (id int primary key, v int)")
    again(
        connection,
        "aaa",
        event="delete",
        action="if old.id = 1 then insert into t select id, 7 from generate_series(2, 3) id; end if",
    )
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, 1), (2, 2), (3, 3)")

    connection.execute("delete from t")

    assert told(connection, "t") == rows(connection, t={"key": "id"})
    assert set(told(connection, "t")) == {"2", "3"}


def test_a_tree_that_deletes_itself_is_gone(connection: psycopg.Connection) -> None:
    connection.execute(
        "create table t (id int primary key, parent int references t on delete cascade on update cascade)"
    )
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, null), (2, 1), (3, 2), (4, 1)")

    connection.execute("update t set id = id + 10")
    assert told(connection, "t") == rows(connection, t={"key": "id"})
    connection.execute("delete from t where id in (11, 12)")
    assert told(connection, "t") == rows(connection, t={"key": "id"}) == {}


statement = st.sampled_from(
    [
        "insert into t select i, i, 'n' from generate_series({a}, {b}) i on conflict (id) do update set v = t.v + 1",
        "update t set v = {b} where id between {a} and {b}",
        "update t set v = v + 1",
        "update t set note = 'm' where id >= {a}",
        "update t set id = id + 100 where id = {a}",
        "update t set id = id + 1",
        "update t set id = id - 100 where id > 100",
        "delete from t where id between {a} and {b}",
        "with gone as (delete from t where id = {a} returning *) insert into t select id, v + 5, note from gone",
        "truncate t",
        "savepoint s",
        "rollback to savepoint s",
        "commit; begin; savepoint s",
    ]
)


@given(st.lists(st.tuples(statement, st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_of_statements_ends_with_target_and_table_equal(
    meddled_table: psycopg.Connection, script: list[tuple[str, int, int]]
) -> None:
    """Over a table whose own triggers change, delete and put back other rows."""
    connection = meddled_table
    connection.execute("truncate t; truncate distributary.change_log")
    connection.execute("insert into t select i, i, 'n' from generate_series(1, 6) i")

    connection.execute("begin; savepoint s")
    for text, a, b in script:
        if "savepoint" in text:
            connection.execute(text)
            continue
        # What fails is undone, and so must be what was captured of it.
        with suppress(psycopg.errors.IntegrityError), connection.transaction():
            connection.execute(text.format(a=a, b=b))
    connection.execute("commit")

    assert told(connection, "t") == rows(connection, t={"key": "id", "exclude": ["note"]})


@pytest.fixture
def meddled_table(connection: psycopg.Connection) -> psycopg.Connection:
    connection.execute("create table t (id int primary key, v int, note text)")
    again(connection, " early", event="update", action="update t set v = v + 1 where id = new.id and v % 3 = 0")
    again(
        connection,
        "meddling",
        event="insert or update",
        action="if pg_trigger_depth() < 3 then update t set v = v + 1, note = 'meddled' where id = new.id + 1;"
        " delete from t where id = new.id + 2 and v % 5 = 0; end if",
    )
    again(
        connection,
        "undertaking",
        event="delete",
        action="if pg_trigger_depth() < 3 then"
        " insert into t values (old.id + 1, 50, 'back') on conflict do nothing; end if",
    )
    install(connection, t={"key": "id", "exclude": ["note"]})
    return connection


# --- tables that change -----------------------------------------------------------------------------------------------


def test_a_column_added_later_is_captured_at_once(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    """Also in sessions that have the function's plans already, and so with every other change of the table."""
    connection.execute("create table t (id int primary key, v int, gone int)")
    install(connection, t={"key": "id", "exclude": ["gone"]})
    writer = another(autocommit=True)
    writer.execute("insert into t values (1, 1, 1)")

    connection.execute("alter table t add column added text default 'x'")
    writer.execute("update t set v = 2")
    connection.execute("alter table t alter column id type bigint, alter column v type text")
    writer.execute("update t set v = '3'")
    connection.execute("alter table t drop column gone")
    writer.execute("update t set v = '4'")
    writer.execute("delete from t")

    assert changes(connection)[1:] == [
        ("update", "1", {"id": 1, "v": 2, "added": "x"}),
        ("update", "1", {"id": 1, "v": "3", "added": "x"}),
        ("update", "1", {"id": 1, "v": "4", "added": "x"}),
        ("delete", "1", {"id": 1, "v": "4", "added": "x"}),
    ]


def test_renamed_columns_stay_key_and_stay_excluded(connection: psycopg.Connection) -> None:
    """No write fails and no secret leaks before the next migration; and templates may still call the key as it was."""
    connection.execute("create table t (a int, b int, v int, secret text, primary key (a, b))")
    install(connection, t={"key": ["a", "b"], "exclude": ["secret"]})
    connection.execute("insert into t values (1, 2, 3, 'secret')")

    connection.execute("alter table t rename column a to first; alter table t rename column secret to passphrase")
    connection.execute("update t set v = 4, passphrase = 'more secret'")
    connection.execute("update t set passphrase = 'another secret'")
    connection.execute("truncate t")

    row = {"a": 1, "first": 1, "b": 2, "v": 4}
    assert changes(connection)[1:] == [("update", "[1, 2]", row), ("delete", "[1, 2]", row)]


def test_a_table_without_its_key_takes_no_change_that_would_be_lost(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id"})
    connection.execute("alter table t drop column id")

    with pytest.raises(psycopg.errors.NotNullViolation, match=r"a row of public.t has no key \(id\)"):
        connection.execute("insert into t values (1)")


def test_a_value_that_the_log_cannot_hold_is_not_written_to_the_table_either(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key, j json)")
    install(connection, t={"key": "id"})

    with pytest.raises(psycopg.errors.UntranslatableCharacter):
        connection.execute("""insert into t values (1, '"\\u0000"')""")

    assert connection.execute("select from t").fetchall() == []


def test_a_table_that_is_made_anew_is_captured_after_the_next_migration(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})
    connection.execute("drop table t; create table t (id int primary key)")

    assert install(connection, t={"key": "id"}) == ["t: capture installed"]
    connection.execute("insert into t values (1)")

    assert what(connection) == [("insert", "1")]


def test_of_two_tables_that_swapped_names_only_the_one_named_is_captured(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key); create table t_new (id int primary key)")
    install(connection, t={"key": "id"})
    connection.execute("alter table t rename to t_old; alter table t_new rename to t")

    assert install(connection, t={"key": "id"}) == ["t: capture changed"]
    connection.execute("insert into t values (1); insert into t_old values (2)")

    assert what(connection) == [("insert", "1")]


def test_a_table_that_was_renamed_and_replaced_is_captured_all_the_while(connection: psycopg.Connection) -> None:
    """Both are watched: until the old one's own trigger takes the place, it keeps the one that it has."""
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})
    connection.execute("alter table t rename to t_old; create table t (id int primary key)")
    numbers = iter(range(10))

    def write(_: object) -> None:
        connection.execute("insert into t_old values (%s)", [next(numbers)])

    install_capture(connection, source(t={"key": "id"}, t_old={"key": "id"}), report=write)

    assert [key for _, key in what(connection)] == ["0", "1"]
    assert install(connection, t={"key": "id"}, t_old={"key": "id"}) == ["t: unchanged", "t_old: unchanged"]


def test_a_renamed_table_goes_on_as_another_stream(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key)")
    install(connection, t={"key": "id"})
    connection.execute("alter table t rename to things")

    assert install(connection, things={"key": "id"}) == ["things: capture installed", "t: capture removed"]
    connection.execute("insert into things values (1)")

    assert len(changes(connection, "things")) == len(changes(connection)) == 1


# --- partitions and inheritance ---------------------------------------------------------------------------------------


@pytest.fixture
def partitioned(connection: psycopg.Connection) -> psycopg.Connection:
    """A table in three levels: (0, 10) apart; (10, 20) of two leaves with other column numbers."""
    connection.execute(
        "create table p (region int, id int, v text, secret text, primary key (region, id)) partition by range (region)"
    )
    connection.execute("create table p_low partition of p for values from (0) to (10)")
    connection.execute(
        "create table p_mid (v text, secret text, id int not null, region int not null) partition by list (region)"
    )
    connection.execute("alter table p attach partition p_mid for values from (10) to (20)")
    connection.execute("create table p_10 partition of p_mid for values in (10)")
    connection.execute("create table p_11 partition of p_mid for values in (11)")
    install(connection, p={"key": ["region", "id"], "exclude": ["secret"]})
    return connection


def test_every_partition_is_captured_as_the_whole_table(partitioned: psycopg.Connection) -> None:
    config = {"key": ["region", "id"], "exclude": ["secret"]}
    assert install(partitioned, p=config) == ["p: unchanged"]

    partitioned.execute("insert into p values (1, 1, 'a', 's'), (10, 2, 'b', 's'), (11, 3, 'c', 's')")
    partitioned.execute("update p set v = upper(v)")
    partitioned.execute("update p set region = 11 where region = 1")
    partitioned.execute("delete from p_10")

    assert told(partitioned, "p") == rows(partitioned, p=config)
    assert changes(partitioned)[6:] == [
        ("delete", "[1, 1]", {"region": 1, "id": 1, "v": "A"}),
        ("insert", "[11, 1]", {"region": 11, "id": 1, "v": "A"}),
        ("delete", "[10, 2]", {"region": 10, "id": 2, "v": "B"}),
    ]


@pytest.mark.parametrize("truncated", ["p", "p_mid", "p_low, p_10, p_11", "p, p_10"])
def test_truncate_of_partitions_is_captured_once_per_row(partitioned: psycopg.Connection, truncated: str) -> None:
    partitioned.execute("insert into p values (1, 1), (10, 2), (11, 3)")

    partitioned.execute(f"truncate {truncated}")

    deletes = [key for operation, key in what(partitioned) if operation == "delete"]
    assert len(deletes) == len(set(deletes)) == (2 if truncated == "p_mid" else 3)
    assert told(partitioned, "p") == rows(partitioned, p={"key": ["region", "id"], "exclude": ["secret"]})


def test_a_partition_made_later_is_captured(partitioned: psycopg.Connection) -> None:
    """At once, but for a TRUNCATE that names it alone: that is from the next migration on."""
    config = {"key": ["region", "id"], "exclude": ["secret"]}
    partitioned.execute("create table p_high partition of p for values from (20) to (30)")
    partitioned.execute("insert into p values (1, 1), (25, 2)")
    partitioned.execute("alter table p rename column secret to passphrase; update p set passphrase = 'secret', v = 'x'")
    partitioned.execute("set session_replication_role = replica; update p set v = 'y'; reset session_replication_role")
    partitioned.execute("truncate p")
    assert told(partitioned, "p") == {}
    assert len(changes(partitioned)) == 2 + 2 + 2 + 2
    assert "secret" not in json.dumps(changes(partitioned))

    partitioned.execute("alter table p rename column passphrase to secret")
    assert install(partitioned, p=config) == ["p: capture repaired"]
    partitioned.execute("insert into p values (25, 2); truncate p_high")
    assert told(partitioned, "p") == {}


def test_a_partition_that_was_detached_is_captured_no_more(partitioned: psycopg.Connection) -> None:
    config = {"key": ["region", "id"], "exclude": ["secret"]}
    partitioned.execute("insert into p values (1, 1)")
    partitioned.execute("alter table p detach partition p_low")

    assert install(partitioned, p=config) == ["p: capture repaired"]
    partitioned.execute("insert into p_low values (2, 2); truncate p_low")

    assert what(partitioned) == [("insert", "[1, 1]")]


def test_removing_a_partitioned_table_removes_the_triggers_of_all_partitions(partitioned: psycopg.Connection) -> None:
    assert install(partitioned) == ["p: capture removed"]
    assert our_triggers(partitioned) == []


@pytest.mark.parametrize(
    ("ddl", "stream", "sentence"),
    [
        ("create view v as select 1 as id", "v", "is a view"),
        ("create materialized view v as select 1 as id", "v", "is a materialized view"),
        ("create unlogged table v (id int primary key)", "v", "UNLOGGED.*ALTER TABLE v SET LOGGED"),
        ("create table w (id int primary key); create table v () inherits (w)", "w", "other tables inherit from it"),
        (
            "create table w (id int primary key) partition by list (id); create table v partition of w default",
            "v",
            "is a partition; name the whole table, w",
        ),
        ("create sequence v", "v", "is not a table"),
        ("select 1", "pg_catalog.pg_class", "those of the system"),
        ("select 1", "distributary.change_log", "Distributary itself, cannot be watched"),
        (
            "create foreign data wrapper f; create server s foreign data wrapper f;"
            "create foreign table v (id int) server s",
            "v",
            "is a foreign table",
        ),
        (
            "create foreign data wrapper f; create server s foreign data wrapper f;"
            "create table v (id int not null) partition by list (id);"
            "create foreign table w partition of v default server s",
            "v",
            "its partition w is a foreign table",
        ),
    ],
)
def test_what_triggers_do_not_see_is_refused(undone: psycopg.Connection, ddl: str, stream: str, sentence: str) -> None:
    undone.execute(ddl)

    with pytest.raises(CaptureRefused, match=f"^{stream}: .*{sentence}"):
        find_tables(undone, source(**{stream: {"key": "id"}}))


def test_a_table_that_inherits_is_captured_through_its_parent(connection: psycopg.Connection) -> None:
    connection.execute("create table parent (id int, v int); create table child (primary key (id)) inherits (parent)")
    install(connection, child={"key": "id"})
    connection.execute("insert into child values (1, 1)")

    connection.execute("update parent set v = 2; truncate parent")

    assert what(connection) == [("insert", "1"), ("update", "1"), ("delete", "1")]


# --- names ------------------------------------------------------------------------------------------------------------


ODD = "Odd \"table\" % {0} $body$ 'x' ü; --"


def test_names_may_be_anything(connection: psycopg.Connection) -> None:
    column, excluded = 'K "e" % {k} y\'s', "$1 {} %s"
    connection.execute(
        sql.SQL("create table {} ({} numeric primary key, {} text, v int)").format(
            sql.Identifier(ODD), sql.Identifier(column), sql.Identifier(excluded)
        )
    )
    config = {ODD: {"key": column, "exclude": [excluded]}}
    assert install(connection, **config) == [f"{ODD}: capture installed"]
    assert install(connection, **config) == [f"{ODD}: unchanged"]

    name = sql.Identifier(ODD)
    connection.execute(sql.SQL("insert into {} values (1.0, 'secret', 1)").format(name))
    connection.execute(sql.SQL("update {} set v = 2").format(name))
    connection.execute(sql.SQL("truncate {}").format(name))

    assert changes(connection, ODD) == [
        ("insert", "1", {column: 1.0, "v": 1}),
        ("update", "1", {column: 1.0, "v": 2}),
        ("delete", "1", {column: 1.0, "v": 2}),
    ]
    assert install(connection) == [f"{ODD}: capture removed"]


def test_a_table_may_be_in_any_schema_and_be_called_by_a_reserved_word(connection: psycopg.Connection) -> None:
    connection.execute('create schema "select"; create table "select"."order" (id int primary key)')
    connection.execute('create table "order" (id int primary key); create table "a.b" (id int primary key)')
    install(
        connection,
        **{"select.order": {"key": "id"}, "order": {"key": "id"}, "a.b": {"key": "id", "schema": "public"}},
    )

    connection.execute(
        'insert into "select"."order" values (1); insert into "order" values (2); insert into "a.b" values (3)'
    )

    streams = connection.execute("select stream, key from distributary.change_log order by change_id").fetchall()
    assert streams == [("select.order", "1"), ("order", "2"), ("a.b", "3")]


def test_long_and_similar_names_get_functions_of_their_own() -> None:
    streams = ["x" * 63, "x" * 62 + "y", "X" * 63, "a.b", "a_b", "A.b", "ü", "ä", "."]
    functions = [function_name(stream) for stream in streams]

    assert len(set(functions)) == len(streams)
    assert max(len(name.encode()) for name in functions) <= 63
    assert function_name("orders").startswith("capture_orders_")


# --- installing -------------------------------------------------------------------------------------------------------


def test_installing_is_said_per_table_and_done_once(connection: psycopg.Connection) -> None:
    connection.execute("create table a (id int primary key, v int); create table b (id int primary key)")

    assert install(connection, a={"key": "id"}) == ["a: capture installed"]
    assert install(connection, a={"key": "id"}, b={"key": "id"}) == ["a: unchanged", "b: capture installed"]
    assert install(connection, a={"key": "id", "exclude": ["v"]}, b={"key": "id"}) == [
        "a: capture changed", "b: unchanged"
    ]  # fmt: skip
    assert install(connection, a={"key": "id", "operations": ["insert"]}) == [
        "a: capture changed",
        "b: capture removed",
    ]
    assert install(connection) == ["a: capture removed"]
    assert our_triggers(connection) == []
    assert connection.execute("select proname from pg_proc where proname ~ '^capture_'").fetchall() == []


def test_a_trigger_that_was_dropped_or_disabled_is_repaired(connection: psycopg.Connection) -> None:
    connection.execute("create table a (id int primary key)")
    install(connection, a={"key": "id"})

    for damage in (
        "alter table a disable trigger all",
        "alter table a enable trigger all",
        'drop trigger "!distributary_truncate" on a',
        'drop trigger "!distributary" on a',
    ):
        connection.execute(damage)
        assert install(connection, a={"key": "id"}) == ["a: capture repaired"], damage
    connection.execute("set session_replication_role = replica; insert into a values (1); truncate a")
    assert what(connection) == [("insert", "1"), ("delete", "1")]


def test_the_triggers_of_others_are_left_alone(connection: psycopg.Connection) -> None:
    connection.execute("create table t (id int primary key)")
    again(connection, "theirs", event="insert", action="null")
    install(connection, t={"key": "id"})

    install(connection)

    assert connection.execute("select tgname from pg_trigger where tgrelid = 't'::regclass").fetchall() == [("theirs",)]


def test_all_that_is_wrong_is_said_before_anything_is_changed(connection: psycopg.Connection) -> None:
    connection.execute("create table good (id int primary key); create table customers (id int)")

    with pytest.raises(CaptureRefused) as refusal:
        install(connection, good={"key": "id"}, costumers={"key": "id"}, customers={"key": "id"})

    assert str(refusal.value).splitlines() == [
        "costumers: there is no table costumers; did you mean customers?",
        "customers: the key (id) does not tell the rows apart: it has no unique index on just these columns; make one"
        " that is usable.",
    ]
    assert our_triggers(connection) == []


def test_a_table_in_another_schema_is_hinted_at(undone: psycopg.Connection) -> None:
    undone.execute("create schema sales; create table sales.orders (id int primary key)")

    with pytest.raises(CaptureRefused, match=r"^orders: there is no table orders; did you mean sales\.orders\?$"):
        find_tables(undone, source(orders={"key": "id"}))


@pytest.fixture
def role(connection: psycopg.Connection) -> Iterator[str]:
    """A role that may do nothing; gone afterwards."""
    row = connection.execute("select 'role_of_' || current_database()").fetchone()
    assert row is not None
    connection.execute(sql.SQL("create role {}").format(sql.Identifier(row[0])))
    yield row[0]
    connection.execute("reset role")
    connection.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(row[0])))


def test_a_role_that_does_not_own_the_table_is_told_so(connection: psycopg.Connection, role: str) -> None:
    connection.execute("create table t (id int primary key)")
    connection.execute(sql.SQL("grant all on t to {0}; set role {0}").format(sql.Identifier(role)))

    with pytest.raises(
        CaptureRefused, match=r"^t: installing triggers needs the rights of the table's owner.*run this as"
    ):
        install(connection, t={"key": "id"})


def test_an_owner_who_is_no_superuser_can_install(connection: psycopg.Connection, role: str) -> None:
    connection.execute(
        sql.SQL(
            "create table t (id int primary key, v int); alter table t owner to {0};"
            "grant all on schema distributary to {0};"
            "grant all on distributary.change_log to {0}; grant execute on function distributary.current_row to {0};"
            "alter table t enable row level security; set role {0}"
        ).format(sql.Identifier(role))
    )
    assert install(connection, t={"key": "id"}) == ["t: capture installed"]

    connection.execute("reset role; insert into t values (1, 1); truncate t; insert into t values (2, 2)")
    assert what(connection) == [("insert", "1"), ("delete", "1"), ("insert", "2")]

    connection.execute(sql.SQL("alter table t force row level security; set role {}").format(sql.Identifier(role)))
    with pytest.raises(CaptureRefused, match="FORCE ROW LEVEL SECURITY"):
        install(connection, t={"key": "id"})
    connection.execute("reset role")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        connection.execute("truncate t")  # better than deletes that are not seen


# --- others at the same time ------------------------------------------------------------------------------------------


def test_a_table_that_is_captured_as_asked_is_not_locked(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    connection.execute(
        "create table t (id int primary key); create table p (id int primary key) partition by list (id)"
    )
    connection.execute("create table p_1 partition of p default")
    tables = {"t": {"key": "id"}, "p": {"key": "id"}}
    install(connection, **tables)
    another().execute("lock table t, p, p_1 in access exclusive mode")

    connection.execute("set lock_timeout = '100ms'")
    assert install(connection, **tables) == ["t: unchanged", "p: unchanged"]


def test_another_way_of_capturing_takes_over_while_a_writer_is_busy(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    """A function is replaced without a lock, and an open transaction's next row is captured the new way."""
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id"})
    writer = another()
    writer.execute("insert into t values (1, 1)")

    assert install(connection, t={"key": "id", "exclude": ["v"]}) == ["t: capture changed"]
    writer.execute("insert into t values (2, 2)")
    writer.commit()

    assert [payload for _, _, payload in changes(connection)] == [{"id": 1, "v": 1}, {"id": 2}]


def test_a_busy_table_is_given_up_with_a_sentence_and_its_writers_do_not_wait(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("create table t (id int primary key)")
    monkeypatch.setattr(capture, "LOCK_TIMEOUT_MS", 20)
    holder, writer = another(application_name="nightly report"), another(autocommit=True)
    holder.execute("insert into t values (1)")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        writer.execute("insert into t values (%s)", [1 + len(naps)])

    with pytest.raises(CaptureBusy, match=r"^t: other transactions keep the table locked: pid \d+ \(nightly report"):
        install_capture(connection, source(t={"key": "id"}), sleep=nap)

    assert naps == [capture.LOCK_PAUSE_SECONDS] * (capture.LOCK_ATTEMPTS - 1)
    assert our_triggers(connection) == []


def test_a_busy_table_is_tried_again(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("create table t (id int primary key)")
    monkeypatch.setattr(capture, "LOCK_TIMEOUT_MS", 20)
    holder = another()
    holder.execute("insert into t values (1)")

    (action,) = install_capture(connection, source(t={"key": "id"}), sleep=lambda _: holder.commit())

    assert str(action) == "t: capture installed"


def test_writers_of_different_rows_do_not_wait_for_each_other(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id"})
    connection.execute("insert into t values (1, 1), (2, 2)")
    slow, quick = another(), another(autocommit=True)
    slow.execute("update t set v = 10 where id = 1")

    quick.execute("set lock_timeout = '1s'")
    quick.execute("update t set v = 20 where id = 2")
    slow.commit()

    assert told(connection, "t") == rows(connection, t={"key": "id"})


def test_many_writers_leave_each_keys_changes_in_the_order_in_which_they_happened(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    connection.execute("create table t (id int primary key, v int)")
    install(connection, t={"key": "id"})
    connection.execute("insert into t select generate_series(1, 3), 0")
    writers, rounds = 6, 40

    def write(writer: psycopg.Connection, number: int) -> None:
        for turn in range(rounds):
            with writer.transaction() as transaction:
                writer.execute("update t set v = v + 1 where id = %s", [1 + (number + turn) % 3])
                if turn % 7 == 0:
                    raise psycopg.Rollback(transaction)

    threads = [threading.Thread(target=write, args=(another(autocommit=True), number)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    seen: dict[str, list[int]] = {}
    for _, key, payload in changes(connection):
        seen.setdefault(key, []).append(payload["v"])
    assert all(versions == list(range(len(versions))) for versions in seen.values())
    assert sum(map(len, seen.values())) == 3 + writers * (rounds - 6)


def test_a_change_of_triggers_loses_nothing_of_what_is_written_meanwhile(
    connection: psycopg.Connection, another: Callable[..., psycopg.Connection]
) -> None:
    connection.execute("create table t (id int primary key, v int, note text)")
    install(connection, t={"key": "id"})
    stop = threading.Event()
    written: list[int] = []

    def write(writer: psycopg.Connection) -> None:
        while not stop.is_set():
            writer.execute("insert into t values (%s, 0)", [len(written)])
            written.append(len(written))

    thread = threading.Thread(target=write, args=(another(autocommit=True),))
    thread.start()
    for _ in range(5):
        install(connection, t={"key": "id", "operations": ["insert"]})
        install(connection, t={"key": "id", "exclude": ["note"]})
    stop.set()
    thread.join()

    assert [key for _, key in what(connection)] == [str(number) for number in written]
