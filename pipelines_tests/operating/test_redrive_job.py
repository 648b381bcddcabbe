"""`redrive_job` in one process, over a real database: what it says, what it does, and what the next delivery brings."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.jobs import delivery_job
from pipelines.operating.assets import dead_letters_asset
from pipelines.operating.jobs import redrive_job
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest
from resources.capture import install_capture
from resources.postgres_dead_letters import PostgresDeadLetters
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader
from resources.system_clock import SystemClock

SOURCE = SourceConfig.model_validate({"tables": {"people": {"key": "id"}}})
ONE_BY_ONE = {
    "people": {
        "upsert": {"path": "/people"},
        "delete": {"path": "/people/${_key}", "record": {"name": "$name", "gone": True}},
    }
}


class World:
    """A source with people, a target that refuses some of them, and Dagster in one process."""

    def __init__(self, url: str, connection: psycopg.Connection) -> None:
        self.refused: set[str] = set()
        self.target = ScriptedTarget(self._answer)
        self.connection = connection
        config = target_config("crm", routes=ONE_BY_ONE, dead_letter_guard=1)
        self.resources: dict[str, Any] = {
            "ledger": PostgresLedger(url),
            "targets": FakeTargetCatalog([config], clients={"crm": self.target}),
            "dead_letters": PostgresDeadLetters(url, SOURCE),
            "clock": SystemClock(),
            "loader": PostgresLoader(url, SOURCE),
        }

    def _answer(self, request: SentRequest) -> int:
        return 422 if request.body and json.loads(request.body)["name"] in self.refused else 200

    def write(self, key: str, name: str) -> None:
        self.connection.execute(
            "insert into people values (%s, %s) on conflict (id) do update set name = excluded.name", [key, name]
        )

    def deliver(self) -> list[tuple[str, bytes]]:
        """Run `delivery_job` and return what the target was sent: method, body."""
        before = len(self.target.sent)
        delivery_job.execute_in_process(resources=self.resources, raise_on_error=False)
        return [(request.request.method, request.body) for request in self.target.sent[before:]]

    def redrive(self, **config: Any) -> dg.ExecuteInProcessResult:
        return redrive_job.execute_in_process(
            run_config={"ops": {"redrive": {"config": config}}}, resources=self.resources, raise_on_error=False
        )

    def states(self) -> dict[str, str]:
        rows = self.connection.execute("select key, state from distributary.dead_letter order by change_id")
        return dict(rows.fetchall())


@pytest.fixture
def world(database: str) -> Iterator[World]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table people (id text primary key, name text)")
        install_capture(connection, SOURCE)
        yield World(database, connection)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    capsys.readouterr()
    return lambda: capsys.readouterr().out.splitlines()


def test_by_default_it_only_says_what_it_would_do(world: World, said: Callable[[], list[str]]) -> None:
    world.write("a", "Ada")
    world.refused = {"Ada"}
    world.deliver()
    said()

    result = world.redrive()

    assert result.success
    first, second = said()
    assert first.startswith("crm/people  1 x answered 422  oldest ")
    assert first.endswith(" ago, keys a")
    assert second == "1 would be redriven. To do it, launch this again with dry_run: false."
    assert world.states() == {"a": "open"}
    assert world.deliver() == []


def test_what_is_redriven_is_delivered_as_it_is_now(world: World, said: Callable[[], list[str]]) -> None:
    world.write("a", "Ada")
    world.write("b", "Bob")
    world.refused = {"Ada", "Bob"}
    world.deliver()
    world.refused = {"Bob"}
    said()

    result = world.redrive(dry_run=False, keys=["a"])

    assert result.success
    assert said()[-1] == "1 redriven; records to be delivered: 1."
    assert world.deliver() == [("POST", b'{"id": "a", "name": "Ada"}')]
    assert world.states() == {"a": "redriven", "b": "open"}


def test_of_a_record_that_is_gone_a_delete_goes_with_the_row_as_it_was(world: World) -> None:
    world.write("a", "Ada")
    world.refused = {"Ada"}
    world.deliver()
    world.connection.execute("alter table people disable trigger all")
    world.connection.execute("delete from people")
    world.refused = set()

    world.redrive(dry_run=False)

    assert world.deliver() == [("DELETE", b'{"name":"Ada","gone":true}')]


def test_what_is_refused_again_is_open_again(world: World) -> None:
    world.write("a", "Ada")
    world.refused = {"Ada"}
    world.deliver()

    world.redrive(dry_run=False)
    world.deliver()

    rows = world.connection.execute("select state from distributary.dead_letter order by change_id").fetchall()
    assert rows == [("redriven",), ("open",)]


def test_what_is_discarded_is_not_sent(world: World, said: Callable[[], list[str]]) -> None:
    world.write("a", "Ada")
    world.refused = {"Ada"}
    world.deliver()
    said()

    world.redrive(dry_run=False, discard="a test record")

    assert said()[-1] == "1 discarded: a test record"
    assert world.states() == {"a": "discarded"}
    assert world.deliver() == []


def test_a_time_that_is_none_is_told_with_its_field(world: World) -> None:
    result = world.redrive(since="yesterday")

    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "ops.redrive.config.since: 'yesterday' is no time" in str(failure.event_specific_data)


def test_the_asset_counts_what_is_open(world: World) -> None:
    world.write("a", "Ada")
    world.write("b", "Bob")
    world.refused = {"Ada", "Bob"}
    world.deliver()

    result = dg.materialize([dead_letters_asset], resources=world.resources)

    (materialization,) = result.asset_materializations_for_node("dead_letters")
    metadata = materialization.metadata
    assert metadata["open"].value == 2
    assert metadata["open at crm"].value == 2
    assert metadata["age of the oldest (h)"].value == 0
    (record,) = metadata["dead letters"].value.records  # type: ignore[union-attr]
    assert record.data["count"] == 2
    assert record.data["keys"] == "a, b"
