"""A load appends every row once, in chunks; interrupted, it goes on where it was; one run at a time has it."""

from collections.abc import Iterator

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.loading import CannotLoad
from pipelines_tests.fakes.catalog import target_config
from resources.capture import install_capture
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader

SOURCE = SourceConfig.model_validate({"tables": {"people": {"key": "id"}, "pets": {"key": "id"}}})


@pytest.fixture
def connection(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection]:
    monkeypatch.setattr("resources.postgres_loader._ROWS_AT_ONCE", 10)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table people (id int primary key, name text)")
        connection.execute("create table pets (id int primary key)")
        connection.execute("insert into people select n, 'p' || n from generate_series(1, 35) n")
        install_capture(connection, SOURCE)
        yield connection


@pytest.fixture
def loader(database: str, connection: psycopg.Connection) -> PostgresLoader:
    PostgresLedger(database).register({"crm": "now", "email": "now"})
    return PostgresLoader(database, SOURCE)


def appended(connection: psycopg.Connection, target: str = "crm") -> list[int]:
    rows = connection.execute(
        "select (payload ->> 'id')::int from distributary.change_log where target = %s order by change_id", [target]
    )
    return [number for (number,) in rows]


def test_every_row_is_appended_once_in_chunks(connection: psycopg.Connection, loader: PostgresLoader) -> None:
    assert loader.begin("crm", ["people", "pets"]) == ["people", "pets"]
    connection.execute("analyze people")

    progress = list(loader.run("crm", "people", run_id="run"))

    assert [(one.rows, one.done, one.chunk) for one in progress] == [
        (10, False, 1),
        (20, False, 2),
        (30, False, 3),
        (35, True, 4),
    ]
    assert {one.of_about for one in progress} == {35}
    assert sorted(appended(connection)) == list(range(1, 36))
    assert [(load.stream, load.rows, load.done) for load in loader.loads(["crm", "email"])] == [
        ("people", 35, True),
        ("pets", 0, False),
    ]


def test_a_table_whose_last_chunk_is_just_full_is_done_with_an_empty_one(
    connection: psycopg.Connection, loader: PostgresLoader
) -> None:
    connection.execute("delete from people where id > 20")
    loader.begin("crm", ["people"])

    assert [(one.rows, one.done) for one in loader.run("crm", "people", run_id="run")][-2:] == [(20, False), (20, True)]
    assert sorted(appended(connection)) == list(range(1, 21))


def test_an_interrupted_load_goes_on_without_a_gap_and_without_a_repeat(
    connection: psycopg.Connection, loader: PostgresLoader
) -> None:
    loader.begin("crm", ["people"])
    first = loader.run("crm", "people", run_id="first")
    next(first)
    next(first)
    first.close()  # type: ignore[attr-defined]
    assert sorted(appended(connection)) == list(range(1, 21))
    assert loader.begin("crm", ["people"]) == []

    list(loader.run("crm", "people", run_id="second"))

    assert sorted(appended(connection)) == list(range(1, 36))


def test_a_chunk_that_cannot_be_committed_is_not_half_there(
    connection: psycopg.Connection, loader: PostgresLoader
) -> None:
    loader.begin("crm", ["people"])
    connection.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise 'disk full'; end $$"
    )
    connection.execute(
        "create constraint trigger refuse after update on distributary.load deferrable initially deferred"
        " for each row execute function refuse()"
    )
    with pytest.raises(psycopg.errors.RaiseException, match="disk full"):
        list(loader.run("crm", "people", run_id="run"))
    assert appended(connection) == []
    connection.execute("drop trigger refuse on distributary.load")

    list(loader.run("crm", "people", run_id="run"))

    assert sorted(appended(connection)) == list(range(1, 36))


def test_one_run_at_a_time_has_a_load(connection: psycopg.Connection, loader: PostgresLoader, database: str) -> None:
    loader.begin("crm", ["people"])
    with psycopg.connect(database) as other:
        held = "select pg_advisory_lock(hashtextextended('distributary load crm/people', 0))"
        other.execute(held)

        assert list(loader.run("crm", "people", run_id="run")) == []

    assert appended(connection) == []


def test_rows_that_others_are_changing_are_waited_for_and_none_is_left_out(
    connection: psycopg.Connection, loader: PostgresLoader, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run can be stopped meanwhile: it is told now and then that nothing has moved."""
    monkeypatch.setattr("resources.source_rows._LOCK_TIMEOUT", "20ms")
    loader.begin("crm", ["people"])
    with psycopg.connect(database) as writer:
        writer.execute("update people set name = 'new' where id in (3, 7, 35)")
        load = loader.run("crm", "people", run_id="run")

        assert [(one.rows, one.done) for one in (next(load), next(load))] == [(8, False), (8, False)]
        writer.commit()

        assert [(one.rows, one.done) for one in load] == [(10, False), (20, False), (30, False), (35, True)]
    assert sorted(appended(connection)) == list(range(1, 36))


def test_a_load_that_is_interrupted_while_it_waits_for_a_row_leaves_no_gap(
    connection: psycopg.Connection, loader: PostgresLoader, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resources.source_rows._LOCK_TIMEOUT", "20ms")
    loader.begin("crm", ["people"])
    with psycopg.connect(database) as writer:
        writer.execute("update people set name = 'new' where id = 3")
        load = loader.run("crm", "people", run_id="first")
        next(load)
        load.close()  # type: ignore[attr-defined]

    list(loader.run("crm", "people", run_id="second"))

    assert set(appended(connection)) == set(range(1, 36))
    assert [load.rows for load in loader.loads(["crm"])] == [35]


def test_what_is_loaded_is_loaded_again_only_if_it_is_asked_for(
    connection: psycopg.Connection, loader: PostgresLoader
) -> None:
    loader.begin("crm", ["people"])
    list(loader.run("crm", "people", run_id="run"))

    assert loader.begin("crm", ["people"]) == []
    assert list(loader.run("crm", "people", run_id="run")) == []
    assert loader.begin("crm", ["people"], again=True) == ["people"]
    list(loader.run("crm", "people", run_id="run"))

    assert sorted(appended(connection)) == sorted([*range(1, 36), *range(1, 36)])


def test_one_targets_load_is_not_anothers(connection: psycopg.Connection, loader: PostgresLoader) -> None:
    loader.begin("crm", ["people"])
    loader.begin("email", ["people"])
    list(loader.run("email", "people", run_id="run"))

    assert appended(connection) == []
    assert len(appended(connection, "email")) == 35


def test_a_stream_without_a_table_is_named(loader: PostgresLoader) -> None:
    with pytest.raises(CannotLoad, match=r"source\.yaml: there is no table ghosts"):
        list(loader.run("crm", "ghosts", run_id="run"))


def test_a_table_that_is_gone_is_named(connection: psycopg.Connection, loader: PostgresLoader) -> None:
    connection.execute("drop table pets")
    with pytest.raises(CannotLoad, match=r"source\.yaml: tables\.pets: there is no table pets"):
        list(loader.run("crm", "pets", run_id="run"))


def test_a_new_target_of_the_configuration_gets_the_rows_of_its_routes(
    connection: psycopg.Connection, database: str, loader: PostgresLoader
) -> None:
    """Registered with 'snapshot', it is owed every row, once, and nothing of what the log had before."""
    config = target_config("late", start="snapshot")
    ledger = PostgresLedger(database)
    ledger.register({"late": config.start}, streams={"late": list(config.routes)})
    connection.execute("update people set name = 'new' where id = 7")

    (load,) = loader.loads(["late"])
    list(loader.run("late", load.stream, run_id="run"))

    with ledger.open_target("late", run_id="run") as late:
        assert late is not None
        pending = late.pending(max_records=100, max_bytes=10**6).records
    assert [change.operation for change in pending] == ["update"] + ["snapshot"] * 35
    assert [change.key for change in pending if b'"new"' in change.payload] == ["7", "7"]
    assert ledger.conservation("late").captured == 36
