"""Rows are appended as the triggers would write them, and never so that an older state comes after a newer one."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from resources.capture import install_capture
from resources.captured_table import find_tables
from resources.source_rows import SourceBusy, SourceRows


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def watch(connection: psycopg.Connection, table: str, ddl: str, key: str | list[str] = "id", **more: Any) -> SourceRows:
    """Make a table, capture it, and return its rows."""
    connection.execute(ddl)  # type: ignore[call-overload]
    source = SourceConfig.model_validate({"tables": {table: {"key": key, **more}}})
    install_capture(connection, source)
    (found,) = find_tables(connection, source)
    return SourceRows(connection, found)


def log(connection: psycopg.Connection, *, target: str | None = None) -> list[tuple[str, str, Any]]:
    """Return what is in the log, for all or addressed to a target, in order: operation, key, payload."""
    rows = connection.execute(
        "select operation, key, payload from distributary.change_log where target is not distinct from %s"
        " order by change_id",
        [target],
    )
    return rows.fetchall()


KEYS: Any = [
    ("id integer primary key", "id", "(1), (2), (10), (-3)"),
    ("id text primary key", "id", "('b'), ('a'), ('é'), ('it''s \"quoted\"')"),
    ("id numeric primary key", "id", "(1.50), (2), (-0.10)"),
    ("id uuid primary key", "id", "(gen_random_uuid()), (gen_random_uuid())"),
    ("id timestamptz primary key", "id", "('2026-01-01T00:00:00+02'), ('2025-06-01T12:30:00.123456Z')"),
    ("id bytea primary key", "id", "('\\x00ff'), ('\\x01')"),
    ("id bpchar(5) primary key", "id", "('ab'), ('b')"),
    ("id mood primary key", "id", "('sad'), ('happy')"),
    ("a integer, b text, primary key (b, a)", ["a", "b"], "(1, 'x'), (2, 'x'), (1, 'y')"),
    ("a numeric, b timestamptz, primary key (a, b)", ["a", "b"], "(1.0, '2026-01-01Z'), (1.00, '2026-01-02Z')"),
]


@pytest.mark.parametrize(("columns", "key", "rows"), KEYS)
def test_rows_are_appended_under_the_keys_and_with_the_payloads_that_triggers_write(
    connection: psycopg.Connection, columns: str, key: Any, rows: str
) -> None:
    """For every kind of key: all at once, and one by one."""
    connection.execute("create type mood as enum ('sad', 'happy')")
    names = ", ".join(key if isinstance(key, list) else [key])
    table = watch(connection, "things", f"create table things ({columns}, note text default 'n')", key)
    connection.execute(f"insert into things ({names}) values {rows}")  # type: ignore[call-overload]
    captured = {(key, json.dumps(payload)) for _, key, payload in log(connection)}

    whole = [one.key for one in table.next_keys(after=None, limit=100)]
    singly, after = [], None
    while found := table.next_keys(after=after, limit=1):
        singly += [one.key for one in found]
        after = found[0].position
    present = table.append_present(target="at_once", keys=[key for key, _ in captured])
    for key in whole:
        assert table.append_one(target="singly", key=key)

    assert singly == whole
    assert sorted(whole) == sorted(key for key, _ in captured)
    assert present == set(whole)
    for target in ("at_once", "singly"):
        appended = log(connection, target=target)
        assert {operation for operation, _, _ in appended} == {"snapshot"}
        assert {(key, json.dumps(payload)) for _, key, payload in appended} == captured
        assert len(appended) == len(captured)


def test_excluded_columns_stay_out(connection: psycopg.Connection) -> None:
    table = watch(connection, "people", "create table people (id int primary key, secret text)", exclude=["secret"])
    connection.execute("insert into people values (1, 'x')")

    table.append_one(target="crm", key="1")
    list(table.append_states(target="crm", keys=["1"]))

    assert [payload for _, _, payload in log(connection, target="crm")] == [{"id": 1}, {"id": 1}]


@pytest.mark.parametrize(("columns", "key", "rows"), KEYS)
def test_what_has_no_row_is_appended_as_a_delete(
    connection: psycopg.Connection, columns: str, key: Any, rows: str
) -> None:
    connection.execute("create type mood as enum ('sad', 'happy')")
    names = ", ".join(key if isinstance(key, list) else [key])
    table = watch(connection, "things", f"create table things ({columns})", key)
    connection.execute(f"insert into things ({names}) values {rows}")  # type: ignore[call-overload]
    captured = {key: payload for _, key, payload in log(connection)}
    keys = list(captured)
    connection.execute("alter table things disable trigger all")
    connection.execute(f"delete from things where ({names}) = (select {names} from things order by 1 limit 1)")  # type: ignore[call-overload]

    list(table.append_states(target="crm", keys=keys))

    appended = {key: (operation, payload) for operation, key, payload in log(connection, target="crm")}
    assert set(appended) == set(keys)
    assert sorted(operation for operation, _ in appended.values()) == ["delete"] + ["snapshot"] * (len(keys) - 1)
    for one, (_, payload) in appended.items():
        assert payload == captured[one]


def test_what_a_delete_is_to_hold_may_be_given(connection: psycopg.Connection) -> None:
    table = watch(connection, "people", "create table people (id int primary key, name text)")

    absent = table.append_absent(target="crm", keys=["1", "2"], payloads={"1": {"id": 1, "name": "Ada"}})

    assert absent == {"1", "2"}
    assert log(connection, target="crm") == [("delete", "1", {"id": 1, "name": "Ada"}), ("delete", "2", {"id": 2})]


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], object]], Callable[[], object]]]:
    threads: list[threading.Thread] = []

    def start(function: Callable[[], object]) -> Callable[[], object]:
        found: list[object] = []
        threads.append(threading.Thread(target=lambda: found.append(function()), daemon=True))
        threads[-1].start()

        def result() -> object:
            threads[-1].join(30)
            return found[0]

        return result

    yield start
    for thread in threads:
        thread.join(30)


def waits(connection: psycopg.Connection) -> bool:
    """Wait until some session of this database waits for a lock."""
    query = (
        "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')"
    )
    for _ in range(2000):
        row = connection.execute(query).fetchone()
        if row is not None and row[0]:
            return True
    return False


def test_a_row_that_is_being_changed_is_left_to_be_waited_for_alone(
    connection: psycopg.Connection, database: str, in_background: Any
) -> None:
    """The snapshot holds the new state, and its id comes after that change's."""
    table = watch(connection, "people", "create table people (id int primary key, n int)")
    connection.execute("insert into people values (1, 1), (2, 2)")
    with psycopg.connect(database) as writer, psycopg.connect(database, autocommit=True) as other:
        writer.execute("update people set n = 3 where id = 1")
        assert table.append_present(target="crm", keys=["1", "2"]) == {"2"}
        appended = in_background(lambda: table.append_one(target="crm", key="1"))
        assert waits(other)
        writer.commit()

        assert appended() is True
        everything = other.execute("select operation, payload ->> 'n' from distributary.change_log order by change_id")
        assert everything.fetchall() == [
            ("insert", "1"),
            ("insert", "2"),
            ("update", "3"),
            ("snapshot", "2"),
            ("snapshot", "3"),
        ]


def test_a_change_waits_until_the_rows_record_is_committed(
    database: str, connection: psycopg.Connection, in_background: Any
) -> None:
    with psycopg.connect(database) as loader, psycopg.connect(database, autocommit=True) as other:
        watch(connection, "people", "create table people (id int primary key, n int)")
        connection.execute("insert into people values (1, 1)")
        (found,) = find_tables(loader, SourceConfig.model_validate({"tables": {"people": {"key": "id"}}}))
        loader.commit()
        with loader.transaction():
            SourceRows(loader, found).append_present(target="crm", keys=["1"])
            updated = in_background(lambda: connection.execute("update people set n = 2"))
            assert waits(other)
        updated()

        everything = other.execute("select operation, payload ->> 'n' from distributary.change_log order by change_id")
        assert everything.fetchall() == [("insert", "1"), ("snapshot", "1"), ("update", "2")]


def test_a_delete_waits_for_an_insert_that_is_not_committed(
    connection: psycopg.Connection, database: str, in_background: Any
) -> None:
    """Else the target could be told of the delete after the insert, which has the older change id."""
    table = watch(connection, "people", "create table people (id int primary key)")
    with psycopg.connect(database) as writer, psycopg.connect(database, autocommit=True) as other:
        writer.execute("insert into people values (1)")
        appended = in_background(lambda: table.append_absent(target="crm", keys=["1"]))
        assert waits(other)
        writer.commit()

        assert appended() == set()
        assert log(other, target="crm") == []


def test_a_writer_that_never_ends_makes_it_give_up_and_not_the_application(
    connection: psycopg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resources.source_rows._LOCK_TIMEOUT", "50ms")
    table = watch(connection, "people", "create table people (id int primary key)")
    with psycopg.connect(database) as writer:
        writer.execute("insert into people values (1)")

        with pytest.raises(SourceBusy, match="people: canceling statement due to lock timeout"):
            table.append_absent(target="crm", keys=["1", "2"])

    assert log(connection, target="crm") == []


def test_what_waits_for_others_repeats_nothing_that_is_done(
    connection: psycopg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it finds them at it: each key is appended once, the one that was waited for last."""
    monkeypatch.setattr("resources.source_rows._LOCK_TIMEOUT", "50ms")
    table = watch(connection, "people", "create table people (id int primary key)")
    connection.execute("insert into people values (1), (2), (3)")
    with psycopg.connect(database) as writer:
        writer.execute("update people set id = id where id = 2")
        steps = table.append_states(target="crm", keys=["1", "2", "3"])

        assert [next(steps) for _ in range(4)] == [{"1", "3"}, set(), set(), set()]
        writer.commit()
        assert list(steps) == [{"2"}]

        writer.execute("insert into people values (9)")
        steps = table.append_states(target="crm", keys=["9", "1"])
        assert [next(steps) for _ in range(3)] == [set()] * 3
        writer.rollback()
        assert list(steps) == [{"9"}, {"1"}]

    told = [(operation, key) for operation, key, _ in log(connection, target="crm")]
    assert sorted(told[:2]) == [("snapshot", "1"), ("snapshot", "3")]
    assert told[2:] == [("snapshot", "2"), ("delete", "9"), ("snapshot", "1")]


def test_beside_writers_no_older_state_ever_comes_after_a_newer_one(
    connection: psycopg.Connection, database: str
) -> None:
    """Rows are updated, deleted and made anew while they are loaded and appended by key."""
    table = watch(connection, "people", "create table people (id int primary key, version int)")
    connection.execute("insert into people select n, 0 from generate_series(1, 40) n")
    connection.execute("create sequence versions")
    done = threading.Event()

    def write(seed: int) -> None:
        with psycopg.connect(database, autocommit=True) as writer:
            n = seed
            while not done.is_set():
                n = (n * 7919 + seed) % 40 + 1
                if n % 5 == 0:
                    writer.execute("delete from people where id = %s", [n])
                    writer.execute("insert into people values (%s, nextval('versions')) on conflict do nothing", [n])
                else:
                    writer.execute("update people set version = nextval('versions') where id = %s", [n])

    writers = [threading.Thread(target=write, args=[seed], daemon=True) for seed in (3, 11)]
    for thread in writers:
        thread.start()
    try:
        for _ in range(6):
            after: Sequence[str | None] | None = None
            while found := table.next_keys(after=after, limit=7):
                after = found[-1].position
                list(table.append_states(target="crm", keys=[one.key for one in found]))
            list(table.append_states(target="crm", keys=[str(n) for n in range(1, 46)]))
    finally:
        done.set()
        for thread in writers:
            thread.join(30)

    history = connection.execute(
        "select key, operation, (payload ->> 'version')::int from distributary.change_log order by change_id"
    ).fetchall()
    state: dict[str, int | None] = {}
    for key, operation, version in history:
        known = state.get(key)
        if operation == "delete":
            state[key] = None
        else:
            # `known` is None when it was deleted: then only a new row may follow, and that has a newer version.
            assert known is None or version >= known, (key, version, known)
            state[key] = version
    rows = dict(connection.execute("select id::text, version from people").fetchall())
    assert {key: version for key, version in state.items() if version is not None} == rows


def test_writers_of_many_rows_and_we_never_wait_for_each_other_in_a_circle(
    connection: psycopg.Connection, database: str
) -> None:
    """They take rows in orders of their own; Postgres would end one of us, and it might be the application."""
    table = watch(connection, "people", "create table people (id int primary key, version int)")
    connection.execute("insert into people select n, 0 from generate_series(1, 60) n")
    keys = [str(n) for n in range(1, 61)]
    failed: list[Exception] = []
    done = threading.Event()

    def write() -> None:
        with psycopg.connect(database, autocommit=True) as writer:
            while not done.is_set():
                try:
                    with writer.transaction():
                        for key in reversed(keys):
                            writer.execute("update people set version = version + 1 where id = %s", [int(key)])
                except psycopg.Error as error:
                    failed.append(error)

    # One alone, or writers would lock each other out.
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        for _ in range(60):
            list(table.append_states(target="crm", keys=keys))
    finally:
        done.set()
        writer.join(30)

    assert failed == []
    assert len(log(connection, target="crm")) == 60 * 60
