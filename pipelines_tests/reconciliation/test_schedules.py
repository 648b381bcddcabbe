"""Streams with the same time are one run; each time of a target has a schedule with a name of its own."""

from typing import Any

import dagster as dg
import pytest

from pipelines.delivery.config import TargetConfig
from pipelines.reconciliation.assets import reconciliation_assets
from pipelines.reconciliation.jobs import reconciliation_job
from pipelines.reconciliation.schedules import reconciliation_schedules


def target(name: str = "crm", *, status: str = "active", **crons: str | None) -> TargetConfig:
    routes: dict[str, Any] = {
        stream: {
            "upsert": {"path": "/x"},
            "read": {"path": "/x", "key": "id"},
            **({"reconcile": {"cron": cron}} if cron else {}),
        }
        for stream, cron in crons.items()
    }
    return TargetConfig.model_validate(
        {"name": name, "base_url": "https://api.test", "status": status, "routes": routes}
    )


def scheduled(*configs: TargetConfig) -> dict[str, tuple[Any, list[str]]]:
    """Return each schedule's cron and what it has materialized, in a loadable definition."""
    assets = reconciliation_assets(configs)
    job = reconciliation_job(assets)
    schedules = reconciliation_schedules(configs, job)
    loaded = dg.Definitions(
        assets=assets,
        jobs=[job],
        schedules=schedules,
        resources=dict.fromkeys(("ledger", "targets", "workspaces", "source", "clock"), "anything"),
    )
    dg.Definitions.validate_loadable(loaded)
    found: dict[str, tuple[Any, list[str]]] = {}
    for schedule in schedules:
        data = schedule.evaluate_tick(dg.build_schedule_context())
        (request,) = data.run_requests or []
        keys = sorted("/".join(key.path[1:]) for key in request.asset_selection or [])
        found[schedule.name] = (schedule.cron_schedule, keys)
    return found


def test_streams_of_one_time_are_one_run_with_the_targets_own_counts() -> None:
    assert scheduled(target(people="0 * * * *", pets="0 * * * *")) == {
        "reconcile_crm": ("0 * * * *", ["crm", "crm/people", "crm/pets"])
    }


def test_each_time_has_a_schedule() -> None:
    assert scheduled(target(people="0 * * * *", pets="7 3 * * *", toys="0 * * * *")) == {
        "reconcile_crm_people": ("0 * * * *", ["crm", "crm/people", "crm/toys"]),
        "reconcile_crm_pets": ("7 3 * * *", ["crm/pets"]),
    }


def test_each_target_has_its_own() -> None:
    found = scheduled(target("crm", people="@daily"), target("shop", people="@daily"))

    assert {name: keys for name, (_, keys) in found.items()} == {
        "reconcile_crm": ["crm", "crm/people"],
        "reconcile_shop": ["shop", "shop/people"],
    }


def test_who_has_no_time_or_is_not_active_has_no_schedule() -> None:
    assert scheduled(target(people=None), target("shop", status="paused", people="0 * * * *")) == {}


@pytest.mark.parametrize("cron", ["*/5 0-6,22 1 jan-mar mon", "0 0 31 12 7", "@hourly", "@yearly", "0 1-23/2 * * *"])
def test_dagster_takes_the_crons_that_a_file_may_have(cron: str) -> None:
    assert scheduled(target(people=cron))["reconcile_crm"][0] == cron
