"""`change_sensor`: wakes a run for the targets that are owed something.

It keeps no cursor. A cursor that moves when a run is asked for says nothing of what was delivered; the ledger knows.
"""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from threading import Condition
from typing import Any

import dagster as dg

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.choosing import Choice, choose_targets
from pipelines.delivery.clock import Clock
from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.ledger import Ledger
from pipelines.delivery.ops import PlanConfig

TARGETS_TAG = "distributary/targets"

# The daemon comes to its sensors every 5 s at best, and half of that would be most of what a change waits. So a tick
# stays until the next is nearly due (where ticks have threads, one that is still at it then is left out), and looks
# itself meanwhile, as often as a drain that lingers: one query each time, while nothing is owed.
_STAY_SECONDS = 4.5
_LOOK_SECONDS = 0.25
# While a drain lingers, a change goes out within a fraction of a second; after, it costs the start of a run.
_LINGER_SECONDS = 30.0
# Then the drain ends and a new one takes over: new code and new configuration are taken up.
_MAX_SECONDS = 900.0
# From its start, a run takes a few seconds to lock its targets; until then the lock says nothing.
_STARTING = timedelta(seconds=30)
# A run that was made and not begun by then was lost with the process that made it.
_LOST = timedelta(minutes=10)


@dg.sensor(
    # By name: given the job, dagster 1.13 copies the sensor when it binds resources, and then warns of its own copy.
    job_name=delivery_job.name,
    # Less than the daemon's own round: at exactly that, one that comes a moment early is left out.
    minimum_interval_seconds=1,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def change_sensor(
    context: dg.SensorEvaluationContext,
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
    clock: dg.ResourceParam[Clock],
) -> dg.SensorResult | dg.SkipReason:
    """Launch one run for all targets with work that nobody is at; one query, whatever the number of targets.

    Where there is none it looks again four times a second, until the daemon's next round is nearly due.
    """
    choice = _choose(context.instance, ledger, targets)
    ends, pause = clock.monotonic() + _STAY_SECONDS, Condition()
    while not choice.targets and clock.monotonic() < ends:
        with pause:
            clock.wait(pause, _LOOK_SECONDS)
        choice = _choose(context.instance, ledger, targets)
    if not choice.targets:
        waiting = "; ".join(f"{name}: {why}" for name, why in choice.left_out.items())
        return dg.SkipReason(waiting or "Every target has everything.")
    config = PlanConfig(targets=list(choice.targets), linger_seconds=_LINGER_SECONDS, max_seconds=_MAX_SECONDS)
    request = dg.RunRequest(
        run_config=dg.RunConfig(ops={"plan_deliveries": config}),
        tags={
            TARGETS_TAG: ",".join(choice.targets),
            # Long after its drains have ended: then its process was killed, and nobody has said so.
            "dagster/max_runtime": str(int(2 * _MAX_SECONDS)),
            # The next tick sees to what is left. A retry would come beside it, and find the locks held.
            "dagster/max_retries": "0",
        },
    )
    return dg.SensorResult(run_requests=[request])


def _choose(instance: dg.DagsterInstance, ledger: Ledger, targets: TargetCatalog) -> Choice:
    choice = choose_targets(targets.owed(ledger))
    if not choice.targets:
        return choice  # as nearly always; then it does not matter which runs there are
    # The runs before the ledger: one that ends between the two has then let go of its targets.
    on_their_way = _on_their_way(instance, targets.configs())
    return choose_targets(targets.owed(ledger), on_their_way=on_their_way)


def _on_their_way(instance: dg.DagsterInstance, known: Collection[str]) -> frozenset[str]:
    """Return the targets of runs that have not had the time to take their locks."""
    records = instance.get_run_records(
        dg.RunsFilter(
            job_name=delivery_job.name,
            statuses=[
                dg.DagsterRunStatus.QUEUED,
                dg.DagsterRunStatus.NOT_STARTED,
                dg.DagsterRunStatus.STARTING,
                dg.DagsterRunStatus.STARTED,
            ],
        )
    )
    now = datetime.now(UTC)
    return frozenset(
        name for record in records if _may_yet_begin(record, now) for name in _targets_of(record.dagster_run, known)
    )


def _may_yet_begin(record: dg.RunRecord, now: datetime) -> bool:
    match record.dagster_run.status:
        case dg.DagsterRunStatus.QUEUED:
            return True
        case dg.DagsterRunStatus.STARTED:
            return record.start_time is not None and record.start_time > (now - _STARTING).timestamp()
        case _:
            return record.update_timestamp > now - _LOST


def _targets_of(run: dg.DagsterRun, known: Collection[str]) -> Collection[str]:
    """Return the targets that *run* was asked to deliver to; a person's run that names none is for all."""
    asked: Any = run.run_config
    for key in ("ops", "plan_deliveries", "config", "targets"):
        asked = asked.get(key) or {}
    return asked or known
