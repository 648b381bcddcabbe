"""Dagster's own daemon and web server, driven as the UI's pages drive them: by GraphQL."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipelines_tests.integration.conftest import ROOT, Deployment, free_port

T = TypeVar("T")

WORKSPACE = ("-w", str(ROOT / "workspace.yaml"))

_LAUNCH = """mutation($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } } } }"""
_BACKFILL = """mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
    __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
_BACKFILL_RUNS = """query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill {
    numPartitions runs { id tags { key value } } assetBackfillData { assetBackfillStatuses {
        ... on AssetPartitionsStatusCounts {
            numPartitionsInProgress numPartitionsMaterialized numPartitionsFailed } } } } } }"""
_RUN = """query($id: ID!) { runOrError(runId: $id) { ... on Run { status
    assetMaterializations { assetKey { path } partition metadataEntries { label
        ... on IntMetadataEntry { intValue } ... on TextMetadataEntry { text } } } } } }"""
_CHECKS = """query($key: AssetKeyInput!, $check: String!) {
    assetCheckExecutions(assetKey: $key, checkName: $check, limit: 1) {
        runId status evaluation { success severity description metadataEntries { label
            ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue } } } } }"""
_SAID = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
    ... on LogMessageEvent { message } } } } }"""
_SENSOR = "query($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor) { ... on Sensor { id } } }"
_STOP_SENSOR = """mutation($id: String!) { stopSensor(id: $id) {
    __typename ... on StopSensorMutationResult { instigationState { status } } } }"""
_REPOSITORY = {"repositoryLocationName": "distributary", "repositoryName": "__repository__"}


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

    def __init__(self, port: int, log: Path) -> None:
        self._url = f"http://127.0.0.1:{port}/graphql"
        self._log = log

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

    def launch(self, job: str, run_config: Mapping[str, Any] | None = None) -> str:
        """Launch a job, as the launchpad does, and return the run's id."""
        selector = {**_REPOSITORY, "jobName": job}
        return self._launched({"selector": selector, "runConfigData": dict(run_config or {})})

    def materialize(self, *path: str, checks: Sequence[str] = (), run_config: Mapping[str, Any] | None = None) -> str:
        """Materialize an asset without partitions, as its page does, with its *checks*; return the run's id."""
        selection = {"assetSelection": [{"path": list(path)}], "assetCheckSelection": _handles(path, checks)}
        selector = {**_REPOSITORY, "jobName": "__ASSET_JOB", **selection}
        return self._launched({"selector": selector, "runConfigData": dict(run_config or {})})

    def check(self, *path: str, checks: Sequence[str]) -> str:
        """Execute some checks of an asset and not the asset, as the page of its checks does; return the run's id."""
        selection = {"assetSelection": [], "assetCheckSelection": _handles(path, checks)}
        selector = {**_REPOSITORY, "jobName": "__ASSET_JOB", **selection}
        return self._launched({"selector": selector, "runConfigData": {}})

    def checked(self, *path: str, check: str) -> Mapping[str, Any]:
        """Return the last execution of a check, as its page shows it."""
        (last,) = self.ask(_CHECKS, key={"path": list(path)}, check=check)["assetCheckExecutions"]
        found: Mapping[str, Any] = last
        return found

    def said(self, run: str) -> list[str]:
        """Return what a run's ops logged, in order, as its page shows it."""
        events = self.ask(_SAID, id=run)["logsForRun"]["events"]
        return [event["message"] for event in events if "message" in event]

    def stop_sensor(self, name: str) -> None:
        """Switch a sensor off, as its page does."""
        found = self.ask(_SENSOR, sensor={**_REPOSITORY, "sensorName": name})["sensorOrError"]
        stopped = self.ask(_STOP_SENSOR, id=found["id"])["stopSensor"]
        assert stopped.get("instigationState") == {"status": "STOPPED"}, stopped

    def _launched(self, params: Mapping[str, Any]) -> str:
        launched = self.ask(_LAUNCH, params={"mode": "default", **params})["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def backfill(self, *path: str, days: Sequence[str]) -> str:
        """Launch a backfill of an asset's days, as its page does, and return the backfill's id."""
        params = {"assetSelection": [{"path": list(path)}], "partitionNames": list(days), "fromFailure": False}
        launched = self.ask(_BACKFILL, params=params)["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        return str(launched["backfillId"])

    def run_of_backfill(self, backfill: str) -> str:
        """Return the id of the run by which a backfill does all its days."""
        (run,) = self.runs_of_backfill(backfill).values()
        return run

    def runs_of_backfill(self, backfill: str, *, seconds: float = 90.0) -> Mapping[tuple[str, str], str]:
        """Return the ids of a backfill's runs, by their first day and their last; the daemon looks every half minute.

        It launches all of them at once, and knows then what it has asked for.
        """

        def launched() -> Mapping[tuple[str, str], str] | None:
            found = self.ask(_BACKFILL_RUNS, id=backfill)["partitionBackfillOrError"]
            statuses = found["assetBackfillData"]["assetBackfillStatuses"]
            asked = sum(sum(one.values()) for one in statuses)
            runs = {
                (tags["dagster/asset_partition_range_start"], tags["dagster/asset_partition_range_end"]): run["id"]
                for run in found["runs"]
                if (tags := {tag["key"]: tag["value"] for tag in run["tags"]})
            }
            assert len(runs) == len(found["runs"]), "no days have two runs"
            return runs if runs and asked == found["numPartitions"] else None

        return wait_until(launched, f"the backfill {backfill} launches its runs", self._log, seconds=seconds)

    def wait_for_run(self, run: str, *, seconds: float = 60.0) -> Mapping[str, Any]:
        """Return a run once it has ended: its status and what it materialized."""

        def ended() -> Mapping[str, Any] | None:
            found: Mapping[str, Any] = self.ask(_RUN, id=run)["runOrError"]
            return found if found.get("status") in ("SUCCESS", "FAILURE", "CANCELED") else None

        return wait_until(ended, f"the run {run} ends", self._log, seconds=seconds)


def _handles(path: Sequence[str], checks: Sequence[str]) -> list[dict[str, Any]]:
    return [{"assetKey": {"path": list(path)}, "name": name} for name in checks]


@contextmanager
def dagster_up(deployment: Deployment) -> Iterator[tuple[Ui, Path]]:
    """Yield the UI of a running web server and the log of a running daemon."""
    port = free_port()
    with ExitStack() as stack:
        _, daemon_log = stack.enter_context(deployment.started("dagster-daemon", "run", *WORKSPACE))
        web_server = deployment.started("dagster-webserver", "-h", "127.0.0.1", "-p", str(port), *WORKSPACE)
        _, log = stack.enter_context(web_server)
        ui = Ui(port, log)
        query = "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } } }"
        wait_until(lambda: ui.ask(query), "the web server", log, seconds=60)
        yield ui, daemon_log
