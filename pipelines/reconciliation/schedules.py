"""When the targets are compared: one schedule for each target and time, as the routes' `reconcile.cron` say."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import dagster as dg

from pipelines.delivery.config import TargetConfig
from pipelines.reconciliation.assets import key_of, streams_of


def reconciliation_schedules(configs: Iterable[TargetConfig], job: Any) -> list[dg.ScheduleDefinition]:
    """Return the schedules. Streams of a target that have the same cron are reconciled in one run."""
    return [schedule for config in configs if config.status == "active" for schedule in _schedules_of(config, job)]


def _schedules_of(config: TargetConfig, job: Any) -> list[dg.ScheduleDefinition]:
    by_cron: dict[str, list[str]] = defaultdict(list)
    for stream in streams_of(config):
        settings = config.routes[stream].reconcile
        if settings is not None and settings.cron is not None:
            by_cron[settings.cron].append(stream)
    return [
        _schedule(config, cron, streams, job, alone=len(by_cron) == 1, first=number == 0)
        for number, (cron, streams) in enumerate(by_cron.items())
    ]


def _schedule(
    config: TargetConfig, cron: str, streams: list[str], job: Any, *, alone: bool, first: bool
) -> dg.ScheduleDefinition:
    # The name is that of a switch in the UI: it stays when another stream gets a time of its own, if it can.
    name = f"reconcile_{config.name}" + ("" if alone else "_" + re.sub(r"\W", "_", streams[0]))
    keys = [key_of(config.name, stream) for stream in streams] + ([key_of(config.name)] if first else [])

    def request() -> dg.RunRequest:
        return dg.RunRequest(asset_selection=keys)

    return dg.ScheduleDefinition(
        name=name,
        job=job,
        cron_schedule=cron,
        execution_fn=lambda _: request(),
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Compares {', '.join(streams)} at {config.name} with the source.",
    )
