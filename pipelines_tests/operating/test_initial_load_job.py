"""`initial_load_job` in one process, over a real database: every row, to whom it was asked for, resumable."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.jobs import delivery_job
from pipelines.operating.jobs import initial_load_job
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from resources.capture import install_capture
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader
from resources.system_clock import SystemClock

SOURCE = SourceConfig.model_validate({"tables": {"people": {"key": "id"}, "pets": {"key": "id"}}})


class World:
    """A source with thirty people and a pet, and two targets that know nothing of them yet."""

    def __init__(self, url: str, connection: psycopg.Connection) -> None:
        self.connection = connection
        self.catalog = FakeTargetCatalog(
            [target_config("crm", start="now", streams=["people", "pets"]), target_config("email", start="now")]
        )
        self.resources: dict[str, Any] = {
            "ledger": PostgresLedger(url),
            "targets": self.catalog,
            "loader": PostgresLoader(url, SOURCE),
            "clock": SystemClock(),
        }

    def load(self, **config: Any) -> dg.ExecuteInProcessResult:
        return initial_load_job.execute_in_process(
            run_config={"ops": {"load_rows": {"config": config}}}, resources=self.resources, raise_on_error=False
        )

    def delivered(self, target: str) -> int:
        """Deliver, and return how many records the target was sent in all."""
        delivery_job.execute_in_process(resources=self.resources)
        return sum(request.body.count(b'"id"') for request in self.catalog.client(target).sent)


@pytest.fixture
def world(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("resources.postgres_loader._ROWS_AT_ONCE", 10)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table people (id int primary key)")
        connection.execute("create table pets (id int primary key)")
        connection.execute("insert into people select generate_series(1, 30)")
        connection.execute("insert into pets values (1)")
        install_capture(connection, SOURCE)
        yield World(database, connection)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    return lambda: capsys.readouterr().out.splitlines()


def test_every_row_is_loaded_for_every_target(world: World, said: Callable[[], list[str]]) -> None:
    assert world.load().success

    assert said() == ["crm/people  30 rows appended", "crm/pets  1 rows appended", "email/people  30 rows appended"]
    assert (world.delivered("crm"), world.delivered("email")) == (31, 30)


def test_a_load_can_be_kept_to_a_target_and_a_stream(world: World, said: Callable[[], list[str]]) -> None:
    world.load(targets=["crm"], streams=["pets"])

    assert said() == ["crm/pets  1 rows appended"]
    assert (world.delivered("crm"), world.delivered("email")) == (1, 0)


def test_what_is_loaded_is_loaded_again_only_if_it_is_asked_for(world: World, said: Callable[[], list[str]]) -> None:
    world.load(targets=["email"])
    assert world.delivered("email") == 30
    said()
    world.load(targets=["email"])
    assert said() == ["email/people  loaded before (30 rows); to load it again, set again: true"]

    world.load(targets=["email"], again=True)

    assert said() == ["email/people  30 rows appended"]
    assert world.delivered("email") == 60


def test_a_load_that_was_interrupted_is_finished_by_the_next_delivery(world: World) -> None:
    loader: PostgresLoader = world.resources["loader"]
    PostgresLedger.register(world.resources["ledger"], {"email": "now"})
    loader.begin("email", ["people"])
    run = loader.run("email", "people", run_id="killed")
    next(run)
    run.close()  # type: ignore[attr-defined]

    assert world.delivered("email") == 30


def test_a_target_whose_file_says_to_leave_it_alone_is_named(world: World, said: Callable[[], list[str]]) -> None:
    configs = [target_config("crm", start="now", status="paused"), target_config("email", start="now")]
    world.resources["targets"] = FakeTargetCatalog(configs)

    world.load()

    assert said() == ["crm  left alone: its file has status: paused", "email/people  30 rows appended"]


def test_a_target_that_is_not_there_is_named(world: World) -> None:
    result = world.load(targets=["crn"])

    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "there is no target crn; configured are: crm, email" in str(failure.event_specific_data)


def test_a_stream_without_a_table_fails_the_run_and_hinders_no_other(
    world: World, said: Callable[[], list[str]]
) -> None:
    world.connection.execute("drop table people")

    result = world.load()

    assert not result.success
    assert said() == ["crm/pets  1 rows appended"]
