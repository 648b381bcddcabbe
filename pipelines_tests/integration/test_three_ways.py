"""What a person does all day, as docs/examples say it on the command line and as the UI does it: both for real."""

import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from pipelines.changes.config import SourceConfig
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import ROOT, Deployment
from pipelines_tests.integration.ui import dagster_up, wait_until
from resources.capture import install_capture

pytestmark = pytest.mark.integration

EXAMPLES = ROOT / "docs" / "examples"
SOURCE: Any = {"tables": {"customers": {"key": "id"}}, "retention_days": 30}


class Crm:
    """An API that refuses a customer named Nobody until it is mended."""

    def __init__(self, api: HttpApi) -> None:
        self.api = api
        self.mended = threading.Event()
        api.script(self._answer)

    def _answer(self, request: Request) -> Reply:
        refused = b"Nobody" in request.body and not self.mended.is_set()
        return Reply(status=422 if refused else 200)

    def held(self) -> dict[int, str]:
        """Return the name of each customer that it was last given."""
        return {record["id"]: record["name"] for request in self.api.applied for record in request.records}

    def given(self) -> list[int]:
        return sorted(record["id"] for request in self.api.applied for record in request.records)


@pytest.fixture
def source(deployment: Deployment) -> Iterator[psycopg.Connection]:
    """Return a connection to a source with customers, of whom the log knows nothing yet."""
    (deployment.folder / "config" / "source.yaml").write_text(yaml.safe_dump(SOURCE))
    with psycopg.connect(deployment.database, autocommit=True) as connection:
        connection.execute("create table customers (id int primary key, name text, email text)")
        connection.execute("insert into customers select n, 'C' || n, n || '@example.org' from generate_series(1, 5) n")
        install_capture(connection, SourceConfig.model_validate(SOURCE))
        yield connection


@pytest.fixture
def crm(deployment: Deployment) -> Iterator[Crm]:
    with HttpApi() as api:
        routes = {"customers": {"upsert": {"path": "/customers", "batch": {"max_records": 3}}}}
        deployment.write_target("crm", api.url, routes=routes, start="now", dead_letter_guard=1)
        yield Crm(api)


def example(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    return found


def test_on_the_command_line(deployment: Deployment, source: psycopg.Connection, crm: Crm):
    """Each example as it stands: preview, load, deliver, discard, redrive, send a day again, prune."""

    def execute(job: str, config: str | None = None) -> str:
        arguments = ["job", "execute", "-m", "pipelines.definitions", "-j", job]
        done = deployment.run(*arguments, *(["-c", str(EXAMPLES / f"{config}.yaml")] if config else []))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert execute("initial_load_job", "initial_load") == "crm/customers  5 rows appended\n"
    source.execute("insert into customers select n, 'Nobody', 'secret@example.org' from generate_series(6, 7) n")
    shown = execute("preview_job", "preview")
    assert "crm: of 7 changes that are owed\n  customers upsert: 7 in " in shown
    assert "example.org" not in shown
    assert crm.api.requests == []

    delivered = deployment.run("job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job")
    assert delivered.returncode == 1  # for the one that is refused
    assert crm.given() == [1, 2, 3, 4, 5]

    crm.mended.set()
    assert "2 would be redriven." in execute("redrive_job")
    assert "1 discarded: a test record" in execute("redrive_job", "discard")
    assert "1 redriven; records to be delivered: 1." in execute("redrive_job", "redrive")
    execute("delivery_job")
    assert crm.given() == [1, 2, 3, 4, 5, 6]
    assert crm.held()[6] == "Nobody"

    today = datetime.now(UTC).date().isoformat()
    days = f"{datetime.now(UTC).date().replace(day=1).isoformat()}...{today}"
    selection = ["--select", "crm/customers", "--partition-range", days]
    done = deployment.run("asset", "materialize", "-m", "pipelines.definitions", *selection)
    assert done.returncode == 0, done.stderr[-3000:]
    assert crm.given() == sorted([*range(1, 7), *range(1, 8)])

    source.execute("update distributary.change_log set changed_at = changed_at - interval '40 days'")
    source.execute("update distributary.batch set finished_at = finished_at - interval '40 days'")
    assert "older than 30 days removed." in execute("prune_job", "prune")
    assert deployment.query("select count(*) from distributary.change_log") == [(0,)]


@pytest.mark.timeout(300)  # the daemon looks for backfills every half minute
def test_in_the_ui(deployment: Deployment, source: psycopg.Connection, crm: Crm):
    """The same, launched as the pages launch it, with the daemon and the sensor at work."""
    with dagster_up(deployment) as (ui, daemon_log):

        def ran(run: str) -> dict[tuple[str, str | None], dict[str, Any]]:
            """Return the metadata of what a run materialized, by asset and partition, once it has succeeded."""
            ended = ui.wait_for_run(run)
            assert ended["status"] == "SUCCESS", daemon_log.read_text()[-3000:]
            return {
                ("/".join(one["assetKey"]["path"]), one["partition"]): {
                    entry["label"]: entry.get("intValue", entry.get("text")) for entry in one["metadataEntries"]
                }
                for one in ended["assetMaterializations"]
            }

        ran(ui.launch("initial_load_job", example("initial_load")))
        wait_until(lambda: crm.given() == [1, 2, 3, 4, 5], "the rows are delivered", daemon_log, seconds=60)

        source.execute("insert into customers values (6, 'Nobody', 'x@example.org')")
        dead = "select count(*) from distributary.dead_letter where state = 'open'"
        wait_until(lambda: deployment.query(dead) == [(1,)], "one is refused", daemon_log, seconds=60)
        assert ran(ui.materialize("dead_letters"))[("dead_letters", None)]["open"] == 1

        crm.mended.set()
        ran(ui.launch("redrive_job", example("redrive")))
        wait_until(lambda: crm.held().get(6) == "Nobody", "it is delivered", daemon_log, seconds=60)

        ran(ui.launch("preview_job", example("preview")))
        ran(ui.launch("prune_job"))

        now = datetime.now(UTC)
        yesterday, today = (now - timedelta(days=1)).date().isoformat(), now.date().isoformat()
        source.execute("update customers set name = 'newer' where id = 1")
        run = ui.run_of_backfill(ui.backfill("crm", "customers", days=[yesterday, today]))
        told = ran(run)
        days = [told[("crm/customers", day)] for day in (yesterday, today)]
        assert sum(day["sent again"] for day in days) == 6
        assert [day["sent again by this run"] for day in days] == [6, 6]
        everybody = set(range(1, 7))
        wait_until(
            lambda: {n for n in everybody if crm.given().count(n) > 1} == everybody,
            "the day is sent again",
            daemon_log,
            seconds=60,
        )
        assert crm.held() == {**{n: f"C{n}" for n in range(2, 6)}, 1: "newer", 6: "Nobody"}


@pytest.mark.timeout(300)
def test_dead_letters_in_the_ui(deployment: Deployment, source: psycopg.Connection, crm: Crm):
    """A redrive tried dry, one discarded with a reason, one redriven; by whoever has read what the run's page says."""

    def ledger() -> list[list[tuple[Any, ...]]]:
        """Return all that is in the ledger, and which transaction wrote each row."""
        tables = deployment.query("select tablename from pg_tables where schemaname = 'distributary' order by 1")
        return [
            deployment.query(f"select t::text, t.xmin::text from distributary.{table} t order by 1")
            for (table,) in tables
        ]

    def letters() -> list[tuple[Any, ...]]:
        return deployment.query("select key, state, note from distributary.dead_letter order by key::int")

    with dagster_up(deployment) as (ui, daemon_log):

        def said(job: str, run_config: dict[str, Any] | None = None, *, ends: str = "SUCCESS") -> list[str]:
            run = ui.launch(job, run_config)
            assert ui.wait_for_run(run)["status"] == ends, daemon_log.read_text()[-3000:]
            return ui.said(run)

        ui.stop_sensor("change_sensor")  # a delivery would be a change of the ledger too
        said("delivery_job")
        source.execute("insert into customers select n, 'Nobody', 'x@example.org' from generate_series(6, 8) n")
        said("delivery_job", ends="FAILURE")
        crm.mended.set()
        before = ledger()
        asked = len(crm.api.requests)

        which, would = said("redrive_job")  # as the launchpad opens

        assert re.fullmatch(r"crm/customers  3 x answered 422  oldest \d+ (s|min) ago, keys 6, 7, 8", which)
        assert would == "3 would be redriven. To do it, launch this again with dry_run: false."
        discard = example("discard")
        discard["ops"]["redrive"]["config"]["dry_run"] = True
        assert said("redrive_job", discard)[-1].startswith("1 would be discarded.")
        assert (ledger(), len(crm.api.requests)) == (before, asked)

        assert said("redrive_job", example("discard"))[-1] == "1 discarded: a test record"
        assert letters() == [("6", "open", None), ("7", "discarded", "a test record"), ("8", "open", None)]

        assert said("redrive_job", example("redrive"))[-1] == "2 redriven; records to be delivered: 2."
        said("delivery_job")
        assert letters() == [("6", "redriven", None), ("7", "discarded", "a test record"), ("8", "redriven", None)]
        assert crm.given() == [6, 8]


def test_the_examples_are_all_tried_here():
    tried = {"initial_load", "preview", "discard", "redrive", "prune"}
    others = {"reconciliation"}  # in test_reconciliation.py

    assert {path.stem for path in Path(EXAMPLES).glob("*.yaml")} - others == tried
