"""`change_sensor`: wakes a run for the targets that are owed something.

It keeps no cursor. A cursor that moves when a run is asked for says nothing of what was delivered; the ledger knows.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.choosing import choose_targets
from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.ledger import Ledger
from pipelines.delivery.ops import PlanConfig

TARGETS_TAG = "distributary/targets"

# While a drain lingers, a change goes out within a fraction of a second; after, it costs the start of a run.
_LINGER_SECONDS = 30.0
# Then the drain ends and a new one takes over: new code and new configuration are taken up.
_MAX_SECONDS = 900.0
# From its start, a run takes a few seconds to lock its targets; until then the lock says nothing.
_STARTING = timedelta(seconds=30)


@dg.sensor(
    job=delivery_job,
    minimum_interval_seconds=5,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def change_sensor(
    context: dg.SensorEvaluationContext,
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
) -> dg.SensorResult | dg.SkipReason:
    """Launch one run for all targets with work that nobody is at; one query, whatever the number of targets."""
    choice = choose_targets(targets.owed(ledger), on_their_way=_on_their_way(context.instance))
    if not choice.targets:
        waiting = "; ".join(f"{name}: {why}" for name, why in choice.left_out.items())
        return dg.SkipReason(waiting or "Every target has everything.")
    config = PlanConfig(targets=list(choice.targets), linger_seconds=_LINGER_SECONDS, max_seconds=_MAX_SECONDS)
    request = dg.RunRequest(
        run_config=dg.RunConfig(ops={"plan_deliveries": config}),
        tags={TARGETS_TAG: ",".join(choice.targets)},
    )
    return dg.SensorResult(run_requests=[request])


def _on_their_way(instance: dg.DagsterInstance) -> frozenset[str]:
    """Return the targets of runs that have not had the time to take their locks."""
    waiting = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING]
    records = instance.get_run_records(
        dg.RunsFilter(job_name=delivery_job.name, statuses=[*waiting, dg.DagsterRunStatus.STARTED])
    )
    just_now = datetime.now(UTC) - _STARTING
    names: list[str] = []
    for record in records:
        started = record.start_time
        if record.dagster_run.status in waiting or (started is not None and started > just_now.timestamp()):
            names += _targets_of(record.dagster_run.tags)
    return frozenset(names)


def _targets_of(tags: Mapping[str, str]) -> Sequence[str]:
    return [name for name in tags.get(TARGETS_TAG, "").split(",") if name]
