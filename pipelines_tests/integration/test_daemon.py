"""The real daemon, code server and web server: changes are delivered with nobody's help, and the UI can show it."""

import threading
import time
from contextlib import ExitStack

import pytest

from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import Deployment
from pipelines_tests.integration.ui import dagster_up, wait_until

pytestmark = pytest.mark.integration

LOCATION = """{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
    ... on PythonError { message }
    ... on RepositoryLocation { repositories {
        jobs { name } sensors { name sensorState { status } } assetNodes { assetKey { path } } } } } } } } }"""
RUNS = "{ runsOrError { ... on Runs { results { runId status tags { key value } } } } }"
TERMINATE = """mutation($run: String!) { terminateRun(runId: $run) {
    __typename ... on TerminateRunFailure { message } ... on PythonError { message } } }"""
MATERIALIZATIONS = """{ assetOrError(assetKey: {path: ["crm", "people"]}) { ... on Asset {
    assetMaterializations { partition metadataEntries { label ... on IntMetadataEntry { intValue } } } } } }"""


def test_changes_are_delivered_with_nobodys_help(deployment: Deployment):
    """The sensor wakes a run; the run lingers for the next change; the UI shows it; and cancelled, it ends in order."""
    answer_now = threading.Event()

    def answer(request: Request) -> Reply:
        return Reply(hold=answer_now) if request.number == 2 else Reply()

    with ExitStack() as stack:
        crm = stack.enter_context(HttpApi(answer))
        deployment.write_target("crm", crm.url)
        ui, daemon_log = stack.enter_context(dagster_up(deployment))

        deployment.insert(1)
        wait_until(lambda: len(crm.applied) == 1, "the first change", daemon_log, seconds=40)
        deployment.insert(1)
        wait_until(lambda: len(crm.applied) == 2, "the second change, by the same run", daemon_log, seconds=10)

        (location,) = ui.ask(LOCATION)["workspaceOrError"]["locationEntries"]
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
