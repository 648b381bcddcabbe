"""Reconciliation on the command line, as the example says it, and as the UI launches it: assets, checks, the job."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
import yaml

from pipelines.changes.config import SourceConfig
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import ROOT, Deployment
from pipelines_tests.integration.ui import dagster_up, wait_until
from resources.capture import install_capture

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]  # several runs, each a process of its own

SOURCE: Any = {"tables": {"customers": {"key": "id"}}}
EXAMPLE = ROOT / "docs" / "examples" / "reconciliation.yaml"
CHECKS = ("nothing_missing", "nothing_stale", "nothing_extra")


class Crm:
    """An API that keeps customers, and lists them ten at a time."""

    def __init__(self, api: HttpApi) -> None:
        self.customers: dict[int, dict[str, Any]] = {}
        self.api = api
        self.withhold: threading.Event | None = None
        """Until it is set, the page after customer 31 does not come."""
        api.script(self._answer)

    def _answer(self, request: Request) -> Reply:
        if request.method != "GET":
            return self._change(request)
        after = int(parse_qs(urlsplit(request.path).query).get("after", ["0"])[0])
        left = [self.customers[number] for number in sorted(self.customers) if number > after]
        hold = self.withhold if after == 31 else None
        return Reply.json({"results": left[:10], "next": left[9]["id"] if len(left) > 10 else None}, hold=hold)

    @property
    def pages(self) -> list[str]:
        """Return what was asked for, page by page."""
        return [request.path for request in self.api.requests if request.method == "GET"]

    def _change(self, request: Request) -> Reply:
        if request.method == "DELETE":
            self.customers.pop(int(request.path.rpartition("/")[2]), None)
            return Reply()
        self.customers |= {record["id"]: record for record in json.loads(request.body)}
        return Reply()


@pytest.fixture
def source(deployment: Deployment) -> Iterator[psycopg.Connection]:
    (deployment.folder / "config" / "source.yaml").write_text(yaml.safe_dump(SOURCE))
    with psycopg.connect(deployment.database, autocommit=True) as connection:
        connection.execute("create table customers (id int primary key, name text)")
        install_capture(connection, SourceConfig.model_validate(SOURCE))
        connection.execute("insert into customers select n, 'C' || n from generate_series(1, 60) n")
        yield connection


@pytest.fixture
def crm(deployment: Deployment) -> Iterator[Crm]:
    with HttpApi() as api:
        route = {
            "upsert": {"path": "/customers", "batch": {"max_records": 20}},
            "delete": {"path": "/customers/${id}"},
            "read": {
                "path": "/customers",
                "items": "$.results",
                "key": "id",
                "page": {"style": "cursor", "parameter": "after", "next": "$.next"},
            },
            "reconcile": {"cron": "0 * * * *"},
        }
        deployment.write_target("crm", api.url, routes={"customers": route})
        yield Crm(api)


def meddle(crm: Crm) -> None:
    """Do to the CRM what nobody told us of: one deleted, one altered, one made."""
    del crm.customers[7]
    crm.customers[8]["name"] = "other"
    crm.customers[99] = {"id": 99, "name": "nobody"}


def test_on_the_command_line(deployment: Deployment, source: psycopg.Connection, crm: Crm) -> None:
    def execute(job: str, *arguments: str) -> list[str]:
        done = deployment.run("job", "execute", "-m", "pipelines.definitions", "-j", job, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    def with_config(**changed: Any) -> tuple[str, str]:
        document = yaml.safe_load(EXAMPLE.read_text())
        document["ops"]["reconcile_crm"]["config"].update(changed)
        path = deployment.folder / "run.yaml"
        path.write_text(yaml.safe_dump(document))
        return "-c", str(path)

    execute("delivery_job")
    meddle(crm)

    assert execute("reconciliation_job", "-c", str(EXAMPLE)) == [
        "crm/customers  60 rows, 60 records: 1 missing, 1 stale, 1 extra; dry_run: nothing is repaired"
    ]
    assert execute("reconciliation_job", *with_config(dry_run=False, delete_extra=True)) == [
        "crm/customers  60 rows, 60 records: 1 missing, 1 stale, 1 extra; to be repaired: 3"
    ]
    execute("delivery_job")

    assert execute("reconciliation_job") == ["crm/customers  60 rows, 60 records: they agree"]
    assert crm.customers == {n: {"id": n, "name": f"C{n}"} for n in range(1, 61)}


def test_a_run_that_was_killed_is_taken_up_at_its_last_page(
    deployment: Deployment, source: psycopg.Connection, crm: Crm
) -> None:
    execute = ("job", "execute", "-m", "pipelines.definitions", "-j")
    assert deployment.run(*execute, "delivery_job").returncode == 0
    meddle(crm)
    crm.withhold = threading.Event()
    with deployment.started("dagster", *execute, "reconciliation_job") as (process, log):
        wait_until(lambda: "/customers?after=31" in crm.pages, "the fourth page is asked for", log, seconds=120)
        os.killpg(process.pid, signal.SIGKILL)
    crm.withhold.set()
    before = len(crm.pages)

    done = deployment.run(*execute, "reconciliation_job")

    assert done.stdout.splitlines() == ["crm/customers  60 rows, 60 records: 1 missing, 1 stale, 1 extra"]
    assert crm.pages[before:] == ["/customers?after=31", "/customers?after=41", "/customers?after=51"]


def test_in_the_ui(deployment: Deployment, source: psycopg.Connection, crm: Crm) -> None:
    asset = ("reconciliation", "crm", "customers")
    with dagster_up(deployment) as (ui, daemon_log):

        def ran(run: str) -> dict[str, dict[str, Any]]:
            ended = ui.wait_for_run(run, seconds=180)
            assert ended["status"] == "SUCCESS", daemon_log.read_text()[-3000:]
            return {
                "/".join(one["assetKey"]["path"]): {
                    entry["label"]: entry.get("intValue", entry.get("text")) for entry in one["metadataEntries"]
                }
                for one in ended["assetMaterializations"]
            }

        wait_until(lambda: len(crm.customers) == 60, "the rows are delivered", daemon_log, seconds=60)
        # The answer is there before it is written down.
        settled = "select accepted from distributary.target_state where target = 'crm'"
        wait_until(lambda: deployment.query(settled) == [(60,)], "the rows are settled", daemon_log, seconds=60)
        meddle(crm)

        told = ran(ui.materialize(*asset, checks=CHECKS))
        assert list(told) == ["/".join(asset)]
        assert {name: told["/".join(asset)][name] for name in ("missing", "stale", "extra", "matched")} == {
            "missing": 1,
            "stale": 1,
            "extra": 1,
            "matched": 58,
        }
        for check in CHECKS:
            assert ui.checked(*asset, check=check)["status"] == "FAILED"

        alone = ui.check(*asset, checks=["nothing_stale"])
        assert ran(alone) == {}
        last = ui.checked(*asset, check="nothing_stale")
        assert (last["runId"], last["evaluation"]["success"], last["evaluation"]["severity"]) == (alone, False, "ERROR")
        assert "they differ in name (1)" in last["evaluation"]["description"]
        told_to = {entry["label"]: entry.get("text") for entry in last["evaluation"]["metadataEntries"]}
        assert "repair: stale" in told_to["what to do"]

        config = {"ops": {"reconcile_crm": {"config": {"repair": "all", "delete_extra": True}}}}
        told = ran(ui.launch("reconciliation_job", config))
        assert sorted(told) == ["reconciliation/crm", "reconciliation/crm/customers"]
        assert told["reconciliation/crm/customers"]["repaired"] == 3
        assert ui.checked("reconciliation", "crm", check="conservation")["status"] == "SUCCEEDED"

        def is_mended() -> bool:
            return crm.customers == {n: {"id": n, "name": f"C{n}"} for n in range(1, 61)}

        wait_until(is_mended, "the repair is delivered by the sensor", daemon_log, seconds=60)
        wait_until(lambda: deployment.query(settled) == [(63,)], "the repair is settled", daemon_log, seconds=60)
        ran(ui.launch("reconciliation_job"))
        for check in CHECKS:
            assert ui.checked(*asset, check=check)["status"] == "SUCCEEDED"
