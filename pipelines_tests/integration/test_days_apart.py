"""Days sent again that are not next to one another, launched in the UI: what Dagster makes of it, what is sent."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
import yaml

from pipelines.changes.config import SourceConfig
from pipelines_tests.fakes.http_server import HttpApi
from pipelines_tests.integration.conftest import Deployment
from pipelines_tests.integration.ui import dagster_up, wait_until
from resources.capture import install_capture

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SOURCE: Any = {"tables": {"customers": {"key": "id"}}}
DAYS = tuple(datetime.now(UTC).date() - timedelta(days=ago) for ago in (9, 8, 7))
DELIVER = ("job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job")


@pytest.fixture
def source(deployment: Deployment) -> Iterator[psycopg.Connection]:
    (deployment.folder / "config" / "source.yaml").write_text(yaml.safe_dump(SOURCE))
    with psycopg.connect(deployment.database, autocommit=True) as connection:
        connection.execute("create table customers (id int primary key, name text)")
        install_capture(connection, SourceConfig.model_validate(SOURCE))
        yield connection


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with HttpApi() as api:
        yield api


def target_of(deployment: Deployment, api: HttpApi, *, mode: str) -> None:
    routes = {"customers": {"mode": mode, "upsert": {"path": "/customers"}}}
    deployment.write_target("crm", api.url, routes=routes, start="now", max_in_flight=1)
    assert deployment.run(*DELIVER).returncode == 0  # from now on it is known


def write(source: psycopg.Connection, day: date, *ids: int) -> None:
    """Change some customers, on a day of the past: each is named for it."""
    since = source.execute("select coalesce(max(change_id), 0) from distributary.change_log").fetchone()
    source.execute(
        "insert into customers select n, %s from unnest(%s::int[]) n"
        " on conflict (id) do update set name = excluded.name",
        [day.isoformat(), list(ids)],
    )
    source.execute("update distributary.change_log set changed_at = %s where change_id > %s", [day, *(since or ())])


def given(api: HttpApi) -> list[tuple[int, str]]:
    return [(record["id"], record["name"]) for request in api.applied for record in request.records]


@pytest.mark.parametrize("mode", ["state", "event"])
def test_each_stretch_is_a_run_and_the_days_between_are_left_out(
    deployment: Deployment, source: psycopg.Connection, api: HttpApi, mode: str
) -> None:
    """Both runs are launched at once: the one of the later days waits until the earlier ones are sent."""
    target_of(deployment, api, mode=mode)
    first, between, last = DAYS
    write(source, first, 1, 9)
    write(source, between, 2, 9)
    write(source, last, 3, 9)
    assert deployment.run(*DELIVER).returncode == 0
    before = len(given(api))

    with dagster_up(deployment) as (ui, daemon_log):
        ui.stop_sensor("change_sensor")  # only what the backfill itself sends is seen
        with deployment.pinned("1") as is_pinned:
            backfill = ui.backfill("crm", "customers", days=[last.isoformat(), first.isoformat()])
            runs = ui.runs_of_backfill(backfill)
            assert set(runs) == {(first.isoformat(),) * 2, (last.isoformat(),) * 2}
            earlier, later = (runs[day.isoformat(), day.isoformat()] for day in (first, last))
            wait_until(is_pinned, "the earlier day is being appended", daemon_log, seconds=60)
            waits = f"waits for run {earlier}"
            wait_until(lambda: any(waits in line for line in ui.said(later)), waits, daemon_log, seconds=60)
        ended = {day: ui.wait_for_run(run) for day, run in ((first, earlier), (last, later))}

    for day, run in ended.items():
        assert run["status"] == "SUCCESS"
        told = {
            (one["partition"], entry["intValue"])
            for one in run["assetMaterializations"]
            for entry in one["metadataEntries"]
            if entry["label"] == "sent again"
        }
        assert told == {(day.isoformat(), 2)}
    again = given(api)[before:]
    assert [sorted(again[:2]), sorted(again[2:])] == [
        [(1, str(first)), (9, str(last if mode == "state" else first))],
        [(3, str(last)), (9, str(last))],
    ]
    assert len(again) == 4
    if mode == "event":
        keys = [request.key for request in api.applied]
        assert set(keys[before:]) < set(keys[:before])


def test_on_the_command_line_a_range_has_the_days_between(
    deployment: Deployment, source: psycopg.Connection, api: HttpApi
) -> None:
    target_of(deployment, api, mode="event")
    for number, day in enumerate(DAYS):
        write(source, day, number)
    assert deployment.run(*DELIVER).returncode == 0
    named = [(number, str(day)) for number, day in enumerate(DAYS)]

    def materialized(*which: str) -> list[tuple[int, str]]:
        before = len(given(api))
        asset = ("asset", "materialize", "-m", "pipelines.definitions", "--select", "crm/customers")
        done = deployment.run(*asset, *which)
        assert done.returncode == 0, done.stderr[-3000:]
        return given(api)[before:]

    assert materialized("--partition-range", f"{DAYS[0]}...{DAYS[2]}") == named
    assert materialized("--partition", str(DAYS[2])) == named[2:]
