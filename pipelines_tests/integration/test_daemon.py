"""The real daemon, code server and web server: changes are delivered with nobody's help, and the UI can show it."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import ROOT, Deployment, free_port

pytestmark = pytest.mark.integration

T = TypeVar("T")

WORKSPACE = ("-w", str(ROOT / "workspace.yaml"))

LOCATION = """{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
    ... on PythonError { message }
    ... on RepositoryLocation { repositories {
        jobs { name } sensors { name sensorState { status } } assetNodes { assetKey { path } } } } } } } } }"""
RUNS = "{ runsOrError { ... on Runs { results { runId status tags { key value } } } } }"
TERMINATE = """mutation($run: String!) { terminateRun(runId: $run) {
    __typename ... on TerminateRunFailure { message } ... on PythonError { message } } }"""
MATERIALIZATIONS = """{ assetOrError(assetKey: {path: ["crm", "people"]}) { ... on Asset {
    assetMaterializations { partition metadataEntries { label ... on IntMetadataEntry { intValue } } } } } }"""


def wait_until(found: Callable[[], T | None], what: str, log: Path, *, seconds: float = 20.0) -> T:
    """Return what *found* returns once that is something; fails the test, with the end of *log*, if it never is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found_now := found():
            return found_now
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds:g} s\n{log.read_text()[-3000:]}")


class Ui:
    """Asks the web server as its pages do."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/graphql"

    def ask(self, query: str, **variables: Any) -> Any:
        """Return the data of the answer, None if there is no answer yet."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                answer = json.load(response)
        except (urllib.error.URLError, ConnectionError):
            return None
        assert "errors" not in answer, answer["errors"]
        return answer["data"]


def test_changes_are_delivered_with_nobodys_help(deployment: Deployment):
    """The sensor wakes a run; the run lingers for the next change; the UI shows it; and cancelled, it ends in order."""
    answer_now = threading.Event()

    def answer(request: Request) -> Reply:
        return Reply(hold=answer_now) if request.number == 2 else Reply()

    port = free_port()
    with ExitStack() as stack:
        crm = stack.enter_context(HttpApi(answer))
        deployment.write_target("crm", crm.url)
        _, daemon_log = stack.enter_context(deployment.started("dagster-daemon", "run", *WORKSPACE))
        web_server = deployment.started("dagster-webserver", "-h", "127.0.0.1", "-p", str(port), *WORKSPACE)
        _, ui_log = stack.enter_context(web_server)
        ui = Ui(port)

        deployment.insert(1)
        wait_until(lambda: len(crm.applied) == 1, "the first change", daemon_log, seconds=40)
        deployment.insert(1)
        wait_until(lambda: len(crm.applied) == 2, "the second change, by the same run", daemon_log, seconds=10)

        data = wait_until(lambda: ui.ask(LOCATION), "the web server", ui_log)
        (location,) = data["workspaceOrError"]["locationEntries"]
        assert location["name"] == "distributary"
        (repository,) = location["locationOrLoadError"]["repositories"]
        assert "delivery_job" in [job["name"] for job in repository["jobs"]]
        assert repository["sensors"] == [{"name": "change_sensor", "sensorState": {"status": "RUNNING"}}]
        assert {"assetKey": {"path": ["crm", "people"]}} in repository["assetNodes"]

        deployment.insert(1)
        crm.wait_for(3)
        (run,) = ui.ask(RUNS)["runsOrError"]["results"]
        assert run["status"] == "STARTED"
        assert {"key": "distributary/targets", "value": "crm"} in run["tags"]
        assert ui.ask(TERMINATE, run=run["runId"])["terminateRun"] == {"__typename": "TerminateRunSuccess"}
        time.sleep(1)  # the request is held meanwhile: the drain must not be cut off
        assert deployment.accepted() == {"crm": 2}
        answer_now.set()

        wait_until(lambda: deployment.accepted() == {"crm": 3}, "what was in flight is settled", daemon_log)
        (run,) = wait_until(
            lambda: [one for one in ui.ask(RUNS)["runsOrError"]["results"] if one["status"] == "CANCELED"],
            "the run is cancelled",
            daemon_log,
        )
        assert deployment.query("select distinct run_id from distributary.batch") == [(run["runId"],)]
        assert deployment.query("select status, claimed::text from distributary.target_state") == [("active", "{}")]
        days = "select distinct ((changed_at at time zone 'UTC')::date)::text from distributary.change_log order by 1"
        shown = ui.ask(MATERIALIZATIONS)["assetOrError"]["assetMaterializations"]
        assert sorted((one["partition"],) for one in shown) == deployment.query(days)
        numbers = [{entry["label"]: entry.get("intValue") for entry in one["metadataEntries"]} for one in shown]
        assert sum(number["delivered"] for number in numbers) == 3
