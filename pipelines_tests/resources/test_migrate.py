"""A database is brought up to date by one command, at any time, by anyone who may, and says in a sentence why not."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from resources import capture, migrate
from resources.capture import CaptureBusy, exclusively
from resources.migrate import MIGRATIONS, CachedSequence, MigrationRefused, apply_migrations, check_sequence

ALL = [path.stem for path in sorted(MIGRATIONS.glob("*.sql"))]


@pytest.fixture
def empty_database(postgres_url: str) -> Iterator[str]:
    """Return the URL of a database with nothing in it."""
    name = f"empty_{uuid4().hex[:12]}"
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        yield urlsplit(postgres_url)._replace(path=f"/{name}").geturl()
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def connection(empty_database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(empty_database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the migrations, to be tampered with."""
    return Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))


@pytest.fixture
def migrate_with(
    empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, list[str], list[str]]]:
    """Return what runs the command over a source.yaml of that text, and returns its status and what it said."""
    monkeypatch.setenv("DATABASE_URL", empty_database)
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", str(tmp_path))

    def run(text: str) -> tuple[int, list[str], list[str]]:
        (tmp_path / "source.yaml").write_text(text)
        status = migrate.main([])
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


# --- the schema -------------------------------------------------------------------------------------------------------


def test_migrations_are_applied_once(connection: psycopg.Connection) -> None:
    assert apply_migrations(connection) == ALL
    assert apply_migrations(connection) == []
    assert connection.execute("select name from distributary.migration order by name").fetchall() == [
        (name,) for name in ALL
    ]


def test_a_new_migration_is_applied_alone(connection: psycopg.Connection, folder: Path) -> None:
    apply_migrations(connection, folder)
    (folder / "9999_more.sql").write_text("create table distributary.more (share text default '100 %')")

    assert apply_migrations(connection, folder) == ["9999_more"]


def test_a_migration_that_fails_leaves_nothing_behind(connection: psycopg.Connection, folder: Path) -> None:
    (folder / "9998_good.sql").write_text("create table distributary.good ()")
    (folder / "9999_bad.sql").write_text("create table distributary.bad (); select 1 / 0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        apply_migrations(connection, folder)

    assert connection.execute("select to_regnamespace('distributary')").fetchone() == (None,)


def test_a_migration_that_was_changed_after_it_was_applied_is_refused(
    connection: psycopg.Connection, folder: Path
) -> None:
    apply_migrations(connection, folder)
    changed = folder / f"{ALL[0]}.sql"
    changed.write_text(changed.read_text() + "-- a word more")

    with pytest.raises(MigrationRefused, match=f"'{ALL[0]}' was changed after this database had it: restore the file"):
        apply_migrations(connection, folder)


def test_other_line_ends_are_no_change(connection: psycopg.Connection, folder: Path) -> None:
    apply_migrations(connection, folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))

    assert apply_migrations(connection, folder) == []


def test_a_migration_that_comes_late_is_refused(connection: psycopg.Connection, folder: Path) -> None:
    """Where it had been missing, it would run after its successors; elsewhere before them."""
    apply_migrations(connection, folder)
    (folder / f"{ALL[0]}_and_a_half.sql").write_text("select 1")

    with pytest.raises(MigrationRefused, match=f"'{ALL[0]}_and_a_half' comes before '{ALL[-1]}'"):
        apply_migrations(connection, folder)


def test_a_database_of_a_newer_version_is_refused(connection: psycopg.Connection, folder: Path) -> None:
    (folder / "9999_of_the_future.sql").write_text("select 1")
    apply_migrations(connection, folder)

    with pytest.raises(MigrationRefused, match="'9999_of_the_future', which this version does not know"):
        apply_migrations(connection)


def test_two_migrators_at_once_do_the_work_once(empty_database: str) -> None:
    together = threading.Barrier(4)
    done: list[list[str]] = []

    def work() -> None:
        with psycopg.connect(empty_database, autocommit=True) as connection:
            together.wait()
            done.append(apply_migrations(connection))

    threads = [threading.Thread(target=work) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(done) == [[], [], [], ALL]


def test_a_migrator_that_never_ends_is_not_waited_for(
    connection: psycopg.Connection, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_OTHER_MIGRATOR_TIMEOUT_MS", 20)

    with (
        psycopg.connect(empty_database) as other,
        exclusively(other),
        pytest.raises(CaptureBusy, match="Another migration of this database is still at work"),
    ):
        apply_migrations(connection)
    assert apply_migrations(connection) == ALL


def test_a_migration_of_a_busy_log_is_given_up_with_a_sentence_and_its_writers_do_not_wait(
    connection: psycopg.Connection, empty_database: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_migrations(connection, folder)
    (folder / "9998_good.sql").write_text("create table distributary.good ()")
    (folder / "9999_wide.sql").write_text("alter table distributary.change_log add column wide int")
    monkeypatch.setattr(capture, "LOCK_TIMEOUT_MS", 20)
    append = "insert into distributary.change_log (stream, key, operation, payload) values ('s', '1', 'insert', '{}')"
    naps: list[float] = []
    with (
        psycopg.connect(empty_database, application_name="nightly report") as holder,
        psycopg.connect(empty_database, autocommit=True) as writer,
    ):
        holder.execute(append)

        def nap(seconds: float) -> None:
            naps.append(seconds)
            writer.execute(append)

        busy = r"^The schema 'distributary': other .* locked: pid \d+ \(nightly report.*; it is as it was; end those "
        with pytest.raises(CaptureBusy, match=busy):
            apply_migrations(connection, folder, sleep=nap)

        assert naps == [capture.LOCK_PAUSE_SECONDS] * (capture.LOCK_ATTEMPTS - 1)
        assert connection.execute("select to_regclass('distributary.good')").fetchone() == (None,)

        assert apply_migrations(connection, folder, sleep=lambda _: holder.commit()) == ["9998_good", "9999_wide"]


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("insert into {}.change_log (stream, key, operation, payload) values ('s', '1', 'erase', '{{}}')", "operation"),
        ("update {}.target_state set status = 'asleep'", "status"),
        ("update {}.batch set state = 'lost', finished_at = now()", "state"),
        ("update {}.batch set operation = 'erase'", "operation"),
    ],
)
def test_words_that_nobody_knows_are_not_written(
    connection: psycopg.Connection, statement: str, constraint: str
) -> None:
    apply_migrations(connection)
    connection.execute("insert into distributary.target_state (target) values ('crm')")
    connection.execute(
        "insert into distributary.batch (target, lane, stream, operation, change_ids, idempotency_key)"
        " values ('crm', 0, 's', 'upsert', '{1}', gen_random_uuid())"
    )

    with pytest.raises(psycopg.errors.CheckViolation, match=f"_{constraint}_check"):
        connection.execute(statement.format("distributary"))


def test_what_each_statement_checks_is_made_of_constants(connection: psycopg.Connection) -> None:
    """`in (…)` has every statement put an array together before it writes a row, a captured one of the users' too."""
    apply_migrations(connection)

    found = connection.execute(
        "select conname, pg_get_constraintdef(oid) from pg_constraint where contype = 'c' and conrelid = any"
        " ('{distributary.change_log,distributary.target_state,distributary.batch}'::regclass[])"
    ).fetchall()

    assert len(found) >= 7
    assert [name for name, definition in found if "ARRAY[" in definition] == []


def test_the_transaction_id_is_the_first_column_of_the_log(connection: psycopg.Connection) -> None:
    """Gaps can only be closed if it is drawn before the change id."""
    apply_migrations(connection)

    first = connection.execute(
        "select column_name, column_default from information_schema.columns"
        " where table_schema = 'distributary' and table_name = 'change_log' and ordinal_position = 1"
    ).fetchone()
    assert first == ("xid", "pg_current_xact_id()")


def test_change_ids_must_not_be_drawn_in_advance(connection: psycopg.Connection) -> None:
    apply_migrations(connection)
    check_sequence(connection)
    connection.execute("alter table distributary.change_log alter column change_id set cache 20")

    with pytest.raises(CachedSequence, match="has CACHE 20") as refusal:
        check_sequence(connection)

    advice = str(refusal.value).rpartition("run ")[2]
    connection.execute(sql.SQL(advice.rstrip(".")))
    check_sequence(connection)


def test_a_role_without_rights_is_told_which(connection: psycopg.Connection) -> None:
    role = sql.Identifier(f"{connection.info.dbname}_role")
    connection.execute(sql.SQL("create role {0}; set role {0}").format(role))
    with pytest.raises(
        MigrationRefused, match=r"may not create the schema 'distributary' in the database 'empty_.*GRANT CREATE"
    ):
        apply_migrations(connection)

    connection.execute(sql.SQL("reset role; create schema distributary authorization {0}; set role {0}").format(role))
    assert apply_migrations(connection) == ALL, "a schema that someone else made will do"

    connection.execute(sql.SQL("reset role; drop owned by {0} cascade; drop role {0}").format(role))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_a_line_for_all_that_it_does(
    connection: psycopg.Connection, migrate_with: Callable[[str], tuple[int, list[str], list[str]]]
) -> None:
    connection.execute("create table orders (id int primary key); create table customers (id int primary key)")
    tables = "tables:\n  orders: {key: id}\n"

    assert migrate_with(tables) == (0, [*(f"{name}: applied" for name in ALL), "orders: capture installed"], [])
    assert migrate_with(tables + "  customers: {key: id}\n") == (
        0,
        ["orders: unchanged", "customers: capture installed"],
        [],
    )
    assert migrate_with("tables: {}") == (0, ["customers: capture removed", "orders: capture removed"], [])


def test_a_table_that_is_not_there_is_said_in_a_line(
    connection: psycopg.Connection, migrate_with: Callable[[str], tuple[int, list[str], list[str]]]
) -> None:
    connection.execute("create table orders (id int primary key)")

    status, _, errors = migrate_with("tables:\n  order: {key: id}\n")

    assert (status, errors) == (2, ["order: there is no table order; did you mean orders?"])


def test_a_mistake_in_the_file_is_said_before_the_database_is_touched(
    connection: psycopg.Connection, migrate_with: Callable[[str], tuple[int, list[str], list[str]]]
) -> None:
    status, said, errors = migrate_with("tables:\n  orders: {kee: id}\n")

    assert (status, said) == (2, [])
    assert "source.yaml:2: tables.orders.kee: unknown key; did you mean 'key'?" in "\n".join(errors)
    assert connection.execute("select to_regnamespace('distributary')").fetchone() == (None,)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("alter table distributary.change_log alter column change_id set cache 5", "CACHE 5"),
        ("update distributary.migration set checksum = ''", "was changed after this database had it"),
        (
            "alter database {} set default_transaction_read_only = on",
            "takes no writes: point DATABASE_URL at the primary",
        ),
    ],
)
def test_a_database_that_cannot_be_migrated_is_one_sentence(
    connection: psycopg.Connection,
    migrate_with: Callable[[str], tuple[int, list[str], list[str]]],
    damage: str,
    sentence: str,
) -> None:
    connection.execute("create table orders (id int primary key)")
    migrate_with("tables: {}")
    connection.execute(damage.format(connection.info.dbname))

    status, _, errors = migrate_with("tables:\n  orders: {key: id}\n")

    assert status == 1
    assert len(errors) == 1
    assert sentence in errors[0]


def test_a_database_that_is_not_there_is_one_sentence(
    migrate_with: Callable[[str], tuple[int, list[str], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:9/nothing")

    status, said, errors = migrate_with("tables: {}")

    assert (status, said, len(errors)) == (1, [], 1)
    assert errors[0].startswith("Cannot reach the database 'nothing' at 127.0.0.1:9")
