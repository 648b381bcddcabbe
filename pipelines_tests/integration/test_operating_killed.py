"""A load, a redrive and a backfill whose run is killed in the midst: launched again they go on, with no gap.

The run is Dagster's own, in a session of its own, and all of it gets SIGKILL while Postgres has a step of it half done:
a trigger makes the append of one key's record wait. Meanwhile the source changes; what the target holds at last is what
the source holds.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import yaml

from pipelines.changes.config import SourceConfig
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import ROOT, Deployment
from pipelines_tests.integration.ui import wait_until
from resources.capture import install_capture

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SOURCE: Any = {"tables": {"customers": {"key": "id"}}}
RECORD = {"id": "$id", "name": "$name", "change": "$_change_id"}
EXECUTE = ("job", "execute", "-m", "pipelines.definitions", "-j")


class World:
    """A source with customers, and a target that takes or refuses them all."""

    def __init__(self, deployment: Deployment, source: psycopg.Connection, api: HttpApi) -> None:
        self.deployment, self.source, self.api = deployment, source, api

    def write_target(self, *, mode: str) -> None:
        routes = {
            "customers": {
                "mode": mode,
                "record": RECORD,
                "upsert": {"path": "/customers", "batch": {"max_records": 100}},
                "delete": {"path": "/customers/${_key}", "record": RECORD},
            }
        }
        self.deployment.write_target(
            "crm", self.api.url, routes=routes, start="now", drop_on=[422], dead_letter_guard=1
        )

    def insert(self, count: int) -> None:
        self.source.execute("insert into customers select n, 'C' || n from generate_series(1, %s) n", [count])

    def change(self, *ids: int, deleted: int) -> None:
        """Change some customers, delete one, and make another."""
        self.source.execute("update customers set name = 'newer' where id = any(%s)", [list(ids)])
        self.source.execute("delete from customers where id = %s", [deleted])
        self.source.execute("insert into customers values (100000, 'new')")

    def rows(self) -> dict[str, str]:
        return {str(key): name for key, name in self.source.execute("select id, name from customers").fetchall()}

    def held(self) -> dict[str, str]:
        """Return what the target holds, if it passes over the changes of a key that are none newer than it knows."""
        rows: dict[str, str] = {}
        known: dict[str, int] = {}
        for request in self.api.applied:
            for record in request.records:
                key = str(record["id"])
                if record["change"] <= known.get(key, 0):
                    continue
                known[key] = record["change"]
                if request.method == "DELETE":
                    rows.pop(key, None)
                else:
                    rows[key] = record["name"]
        return rows

    def given(self) -> Counter[int]:
        """Return how often the target was given each change."""
        return Counter(record["change"] for request in self.api.applied for record in request.records)

    def execute(self, *arguments: str, expect: int = 0) -> str:
        done = self.deployment.run(*arguments)
        assert done.returncode == expect, done.stderr[-3000:]
        return done.stdout

    def deliver(self, *, expect: int = 0) -> None:
        self.execute(*EXECUTE, "delivery_job", expect=expect)

    def addressed(self) -> Counter[str]:
        """Return how many records of each key were appended for the target alone."""
        rows = self.source.execute("select key from distributary.change_log where target = 'crm'").fetchall()
        return Counter(key for (key,) in rows)

    def kill(self, *arguments: str, at: str) -> None:
        """Launch a run, and kill it while the record of the key *at* is being appended."""
        with self.deployment.pinned(at) as is_there, self.deployment.started("dagster", *arguments) as (process, log):
            wait_until(is_there, f"the record of {at} is appended", log, seconds=60)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # Postgres finishes the statement, finds nobody there any more and undoes what was not committed.
        there = (
            "select application_name from pg_stat_activity"
            " where datname = current_database() and application_name like 'distributary%'"
        )
        wait_until(lambda: self.deployment.query(there) == [], "the run's connections are gone", log)


@pytest.fixture
def world(deployment: Deployment) -> Iterator[World]:
    (deployment.folder / "config" / "source.yaml").write_text(yaml.safe_dump(SOURCE))
    with psycopg.connect(deployment.database, autocommit=True) as source, HttpApi() as api:
        source.execute("create table customers (id int primary key, name text)")
        yield World(deployment, source, api)


def capture(world: World) -> None:
    install_capture(world.source, SourceConfig.model_validate(SOURCE))


def test_a_load(world: World) -> None:
    """Chunks of 2000 rows: the second is undone, and appended again; the first is not."""
    world.insert(4500)
    capture(world)
    world.write_target(mode="state")
    load = (*EXECUTE, "initial_load_job", "-c", str(ROOT / "docs" / "examples" / "initial_load.yaml"))
    world.kill(*load, at="3000")
    assert world.addressed() == dict.fromkeys(map(str, range(1, 2001)), 1)
    world.change(1, 2500, 4400, deleted=4450)

    world.execute(*load)
    world.deliver()

    assert set(world.addressed().values()) == {1}
    assert world.addressed().keys() == {*map(str, range(1, 4501)), "100000"} - {"4450"}
    assert world.held() == world.rows()


def test_a_load_is_finished_by_the_next_delivery_too(world: World) -> None:
    world.insert(2500)
    capture(world)
    world.write_target(mode="state")
    world.kill(*EXECUTE, "initial_load_job", at="2200")
    world.change(1, 2300, deleted=2250)

    world.deliver()

    assert world.held() == world.rows()


@pytest.mark.parametrize("mode", ["state", "event"])
def test_a_backfill(world: World, mode: str) -> None:
    """Steps of 1000; the second is undone, and appended again; the first is not."""
    capture(world)
    world.write_target(mode=mode)
    world.deliver()  # makes the target known: what is changed from now on is for it
    world.insert(2500)
    world.deliver()
    month = f"{datetime.now(UTC).date().replace(day=1).isoformat()}...{datetime.now(UTC).date().isoformat()}"
    backfill = ("asset", "materialize", "-m", "pipelines.definitions", "--select", "crm/customers")
    originals = world.given()
    assert set(originals.values()) == {1}
    world.kill(*backfill, "--partition-range", month, at="2000")
    first_step = world.addressed()
    assert first_step.total() == 1000
    world.change(1, 2400, deleted=2450)

    world.execute(*backfill, "--partition-range", month)

    assert world.held() == world.rows()
    each = Counter(map(str, range(1, 2501)))
    if mode == "state":
        assert world.addressed() == each
    else:
        meanwhile = ("1", "2400", "2450", "100000")  # events of today too
        assert world.addressed() == each + Counter(meanwhile)
        assert all(world.given()[change] == 2 for change in originals)


@pytest.mark.parametrize("mode", ["state", "event"])
def test_a_redrive(world: World, mode: str) -> None:
    """Steps of 500 keys, each with the closing of its letters in one transaction: each letter goes once."""
    capture(world)
    world.write_target(mode=mode)
    world.deliver()
    world.insert(1200)
    world.api.script(refuse)
    world.deliver(expect=1)
    letters = "select state, count(*) from distributary.dead_letter group by state"
    assert world.deployment.query(letters) == [("open", 1200)]
    world.api.script(Reply())
    redrive = (*EXECUTE, "redrive_job", "-c", str(ROOT / "docs" / "examples" / "redrive.yaml"))
    world.kill(*redrive, at="5")
    assert dict(world.deployment.query(letters)) == {"redriven": 500, "open": 700}
    assert world.addressed().total() == 500
    world.change(1, 1100, deleted=900)

    told = world.execute(*redrive)
    world.deliver()

    assert told.splitlines()[-1].startswith("700 redriven; records to be delivered: 700")
    assert world.deployment.query(letters) == [("redriven", 1200)]
    assert world.addressed() == dict.fromkeys(map(str, range(1, 1201)), 1)
    assert world.held() == world.rows()


def refuse(_: Request) -> Reply:
    return Reply(status=422)
