"""The sync assets `<target>/<stream>`, by day of change, and `dead_letters`: what the UI shows, and sends again.

No `from __future__ import annotations` here: Dagster reads the annotations of assets at decoration.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from datetime import date, datetime
from threading import Condition

import dagster as dg

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.clock import Clock
from pipelines.delivery.config import RouteConfig, TargetConfig
from pipelines.delivery.ledger import Ledger
from pipelines.delivery.loading import Loader
from pipelines.delivery.ops import DeliveryPlan, deliver
from pipelines.operating.backfilling import Backfill, Backfiller, BackfillProgress, CannotBackfill
from pipelines.operating.dead_letters import DeadLetters, Selection
from pipelines.operating.selecting import age

_BACKFILL = "dagster/backfill"
_FIRST_DAY = "dagster/asset_partition_range_start"
_UNDER_WAY = (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
_NOT_BEGUN = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED)
_LOOK_AGAIN = 1.0

_SHOWN = 200
_TELL_EVERY = 50

# The calendar has to begin somewhere: a change of an earlier day is delivered and reported all the same.
DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_offset=1)


def sync_assets(configs: Iterable[TargetConfig]) -> list[dg.AssetsDefinition]:
    """Return one asset for each route: what its target was given of the stream, by day of change.

    Deliveries report them. To materialize days of one is to send them again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # of the backfill policy; Dagster is pinned
        return [_sync_asset(config, stream, route) for config in configs for stream, route in config.routes.items()]


def _sync_asset(config: TargetConfig, stream: str, route: RouteConfig) -> dg.AssetsDefinition:
    target, mode = config.name, route.mode
    again = "what its keys hold now" if mode == "state" else "the changes themselves, in order"

    @dg.asset(
        key=[target, stream],
        description=f"What {target} ({config.base_url}) was given of {stream}, in mode {mode}. "
        f"Materialize days to send again, to it alone, what changed on them: {again}.",
        group_name=target,
        kinds={"http"},
        partitions_def=DAYS,
        backfill_policy=dg.BackfillPolicy.single_run(),
        metadata={"mode": mode, "status": config.status, "critical": config.critical},
    )
    def send_again(
        context: dg.AssetExecutionContext,
        ledger: dg.ResourceParam[Ledger],
        targets: dg.ResourceParam[TargetCatalog],
        clock: dg.ResourceParam[Clock],
        loader: dg.ResourceParam[Loader],
        backfiller: dg.ResourceParam[Backfiller],
    ) -> dg.MaterializeResult[None]:
        if config.status != "active":
            raise dg.Failure(
                f"{target}: its file has status: {config.status}, so nothing is appended or sent; set status: active.",
                allow_retries=False,
            )
        since, until = context.partition_time_window
        _let_earlier_days_go_first(context, clock)
        _tell_what_is_missing(context, backfiller, since)
        appended = _append_again(
            context, backfiller, Backfill(target=target, stream=stream, mode=mode, since=since, until=until)
        )
        plan = DeliveryPlan(target=target, linger_seconds=0.0, poll_seconds=0.25, max_seconds=86_400.0)
        report = deliver(context.op_execution_context, plan, ledger, targets, clock, loader)
        if report.end == "held":
            context.log.info(f"{target}: the drain that holds its lock delivers them")
        elif report.end not in ("caught_up", "stopped"):
            raise dg.Failure(
                f"{target}: {appended} records were appended, and are delivered once it is well: {report.reason}",
                allow_retries=False,
            )
        if dead := report.total("dead"):
            reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(report.refusals.items()))
            raise dg.Failure(
                f"{target}: {appended} records were appended and {dead} dead-lettered ({reasons}); see dead_letters.",
                allow_retries=False,
            )
        return dg.MaterializeResult(metadata={"sent again by this run": appended})

    return send_again


def _let_earlier_days_go_first(context: dg.AssetExecutionContext, clock: Clock) -> None:
    """Wait for the runs of the same backfill that send earlier days of the same asset again.

    Dagster makes a run of each stretch of days, and starts all of them at once: events would go out in any order.
    """
    ours = context.instance.get_run_record_by_id(context.run.run_id)
    backfill = context.run.tags.get(_BACKFILL)
    if ours is None or backfill is None:
        return
    told = set[str]()
    turn = Condition()
    while earlier := [
        other.dagster_run.run_id
        for other in context.instance.get_run_records(
            dg.RunsFilter(tags={_BACKFILL: backfill}, statuses=[*_UNDER_WAY, *_NOT_BEGUN])
        )
        if context.asset_key in (other.dagster_run.asset_selection or ())
        and other.dagster_run.tags.get(_FIRST_DAY, "") < context.partition_key_range.start
        # One that is queued behind this one could wait for the place that this one has.
        and (other.dagster_run.status in _UNDER_WAY or other.storage_id < ours.storage_id)
    ]:
        for run_id in earlier:
            if run_id not in told:
                context.log.info(f"waits for run {run_id}, which sends earlier days; if it hangs, terminate it")
        told.update(earlier)
        with turn:
            clock.wait(turn, _LOOK_AGAIN)


def _tell_what_is_missing(context: dg.AssetExecutionContext, backfiller: Backfiller, since: datetime) -> None:
    """Say in the log, and in the metadata of the days concerned, what cannot be sent again."""
    kept_since = backfiller.kept_since()
    if kept_since is None or since >= kept_since:
        return
    missing = (
        f"Of what was made before {kept_since:%Y-%m-%d %H:%M} UTC some is no longer in the log (retention_days): it is "
        "not sent again. initial_load_job sends every row there is."
    )
    context.log.warning(missing)
    for day in context.partition_keys:
        if DAYS.time_window_for_partition_key(day).start < kept_since:
            context.add_asset_metadata({"not sent again": missing}, partition_key=day)


def _append_again(context: dg.AssetExecutionContext, backfiller: Backfiller, backfill: Backfill) -> int:
    """Append what is to be sent again, and note how many records of each day; return how many in all."""
    progress = BackfillProgress(appended=0)
    try:
        for step, progress in enumerate(backfiller.run(backfill, run_id=context.run.run_id)):
            if progress.waiting:
                if not step:
                    context.log.info("waits for another run, which is sending days of this again")
            elif progress.done or step % _TELL_EVERY == 0:
                context.log.info(f"{backfill.target}/{backfill.stream}: {progress.appended} records appended")
    except CannotBackfill as error:
        raise dg.Failure(str(error), allow_retries=False) from None
    for day in context.partition_keys:
        context.add_asset_metadata({"sent again": progress.by_day.get(date.fromisoformat(day), 0)}, partition_key=day)
    return progress.appended


@dg.asset(name="dead_letters", group_name="operating", kinds={"postgres"})
def dead_letters_asset(
    dead_letters: dg.ResourceParam[DeadLetters], clock: dg.ResourceParam[Clock]
) -> dg.MaterializeResult[None]:
    """The open dead letters, by target, stream and reason. Redrive or discard them with `redrive_job`."""
    groups = dead_letters.groups(Selection())
    by_target = Counter[str]()
    for group in groups:
        by_target[group.target] += group.count
    oldest = min((group.oldest for group in groups), default=None)
    now = clock.now()
    records = [
        dg.TableRecord(
            {
                "target": group.target,
                "stream": group.stream,
                "reason": group.reason,
                "count": group.count,
                "oldest": age(now - group.oldest),
                "keys": ", ".join(group.example_keys),
            }
        )
        for group in groups[:_SHOWN]
    ]
    schema = dg.TableSchema(
        columns=[
            dg.TableColumn(name, "int" if name == "count" else "string")
            for name in ("target", "stream", "reason", "count", "oldest", "keys")
        ]
    )
    return dg.MaterializeResult(
        metadata={
            "open": by_target.total(),
            "age of the oldest (h)": 0.0 if oldest is None else round((now - oldest).total_seconds() / 3600, 2),
            **{f"open at {target}": count for target, count in sorted(by_target.items())},
            "dead letters": dg.MetadataValue.table(records=records, schema=schema),
        }
    )
