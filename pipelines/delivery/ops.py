"""The ops of `delivery_job`: plan, deliver to each target, conclude.

No `from __future__ import annotations` here: Dagster reads the annotations of ops at decoration.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import dagster as dg
from pydantic import Field

from pipelines.delivery.catalog import TargetCatalog, TargetMisconfigured
from pipelines.delivery.choosing import choose_targets
from pipelines.delivery.clock import Clock
from pipelines.delivery.concluding import conclude
from pipelines.delivery.drain import DrainLimits, StopRequest, drain
from pipelines.delivery.ledger import Ledger, LedgerFailed
from pipelines.delivery.loading import CannotLoad, Loader, LoadProgress
from pipelines.delivery.report import DrainReport, Recorder

_PROGRESS_SECONDS = 10.0
_SENSOR_TAG = "dagster/sensor_name"  # Dagster puts it on every run that a sensor asked for


class PlanConfig(dg.Config):
    """How far a run goes."""

    targets: list[str] = Field(default=[], description="Deliver to these targets only; empty: to all.")
    linger_seconds: float = Field(
        default=0.0, ge=0, description="Once caught up, wait so long for further changes, so that they go out at once."
    )
    poll_seconds: float = Field(default=0.25, gt=0, description="How often to look for changes while lingering.")
    max_seconds: float = Field(default=86_400.0, gt=0, description="Claim nothing new after so long.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryPlan:
    """One target's share of a run. It names the work and carries no record: payloads stay out of Dagster's storage."""

    target: str
    linger_seconds: float
    poll_seconds: float
    max_seconds: float


@dg.op(out={"plans": dg.DynamicOut(DeliveryPlan), "scope": dg.Out(list[str])})
def plan_deliveries(
    context: dg.OpExecutionContext,
    config: PlanConfig,
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
) -> Iterator[dg.DynamicOutput[DeliveryPlan] | dg.Output[list[str]]]:
    """Ask the ledger which targets are owed something and plan one delivery for each; `scope` is what was asked for."""
    configs = targets.configs()
    if unknown := sorted(set(config.targets) - set(configs)):
        known = ", ".join(configs) or "none"
        raise dg.Failure(
            f"ops.plan_deliveries.config.targets: there is no target {', '.join(unknown)}; configured are: {known}.",
            allow_retries=False,
        )
    asked = frozenset(config.targets or configs)
    owed = [state for state in targets.owed(ledger) if state.target in asked]
    choice = choose_targets(owed, impatient=True, insist_on=frozenset(config.targets))
    for name, why in choice.left_out.items():
        context.log.info(f"{name}: left out, {why}")
    for name in choice.targets:
        yield dg.DynamicOutput(
            DeliveryPlan(
                target=name,
                linger_seconds=config.linger_seconds,
                poll_seconds=config.poll_seconds,
                max_seconds=config.max_seconds,
            ),
            output_name="plans",
            mapping_key=name,
        )
    yield dg.Output(sorted(asked), output_name="scope")


@dg.op
def deliver_to_target(
    context: dg.OpExecutionContext,
    plan: DeliveryPlan,
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
    clock: dg.ResourceParam[Clock],
    loader: dg.ResourceParam[Loader],
) -> DrainReport:
    """Deliver all that one target is owed. Its faults are values: if an op raised, no target would be reported."""
    return deliver(context, plan, ledger, targets, clock, loader)


def deliver(
    context: dg.OpExecutionContext,
    plan: DeliveryPlan,
    ledger: Ledger,
    targets: TargetCatalog,
    clock: Clock,
    loader: Loader,
) -> DrainReport:
    """Drain one target and report its sync assets; called by whatever step is to deliver."""
    try:
        destination = targets.destination(plan.target)
    except TargetMisconfigured as error:
        context.log.error(str(error))
        return DrainReport(target=plan.target, end="paused", reason=str(error))
    problem: str | None = None
    try:
        with ledger.open_target(plan.target, run_id=context.run_id) as target_ledger, _stop_on_signals() as stop:
            if target_ledger is None:
                context.log.info(f"{plan.target}: another drain holds its lock")
                return DrainReport(target=plan.target, end="held", reason="another drain holds its lock")
            problem = _finish_loads(context, loader, plan.target, stop)
            report = drain(
                policy=destination.policy,
                routes=destination.routes,
                ledger=target_ledger,
                connect=destination.connect,
                clock=clock,
                limits=DrainLimits(
                    linger_seconds=plan.linger_seconds, poll_seconds=plan.poll_seconds, max_seconds=plan.max_seconds
                ),
                stop=stop,
                on_progress=_progress_logger(context, plan.target),
            )
    except LedgerFailed as error:
        # What was claimed is in the database and goes out again, under its keys, once that is well.
        context.log.error(f"{plan.target}: {error}")
        return DrainReport(target=plan.target, end="failed", reason=str(error))
    _report_assets(context, report)
    if problem is not None and report.end == "caught_up":
        return replace(report, end="deferred", reason=problem)
    return report


@dg.op
def conclude_delivery(
    context: dg.OpExecutionContext,
    scope: list[str],
    reports: list[DrainReport],
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
) -> None:
    """Print one line per target; fail once if a critical target is not caught up or a record is dead."""
    conclusion = conclude(
        reports,
        configs=targets.configs(),
        owed=targets.owed(ledger),
        scope=frozenset(scope),
        asked_by_sensor=context.has_tag(_SENSOR_TAG),
    )
    for line in conclusion.lines:
        print(line, flush=True)  # on stdout: what `dagster job execute` shows in CI
    for warning in conclusion.warnings:
        context.log.warning(warning)
    failures = [*conclusion.failures, *targets.problems()]
    if failures:
        raise dg.Failure("; ".join(failures), allow_retries=False)


def _finish_loads(context: dg.OpExecutionContext, loader: Loader, target: str, stop: StopRequest) -> str | None:
    """Append what is missing of the target's initial loads; return why, if it cannot be. Live changes do not wait."""
    for load in loader.loads([target]):
        try:
            for progress in () if load.done else loader.run(target, load.stream, run_id=context.run_id):
                log_progress(context, target, load.stream, progress)
                if stop.is_set():
                    return None
        except CannotLoad as error:
            context.log.error(str(error))
            return str(error)
    return None


@contextmanager
def _stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT (a cancelled run, a stopped machine) into a graceful stop while a drain is at work."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_progress(context: dg.OpExecutionContext, target: str, stream: str, progress: LoadProgress) -> None:
    """Log how far a load is: with its first, its last and every fiftieth chunk."""
    if progress.done or progress.chunk % 50 == 1:
        share = f" of about {progress.of_about}" if not progress.done else ", all of them"
        context.log.info(f"{target}/{stream}: {progress.rows} rows{share} are in the log")


def _progress_logger(context: dg.OpExecutionContext, target: str) -> Callable[[Recorder], None]:
    """Return a callback that logs a line every few seconds: each line is a row in Dagster's event log."""
    started = last = time.monotonic()

    def log(recorder: Recorder) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS:
            last = now
            accepted = sum(tally.accepted for tally in recorder.tallies.values())
            context.log.info(f"{target}: {accepted} delivered, {recorder.requests} requests in {now - started:.0f} s")

    return log


def _report_assets(context: dg.OpExecutionContext, report: DrainReport) -> None:
    """Mark what was delivered, by stream and day, with the numbers that the UI plots."""
    for (stream, day), tally in sorted(report.tallies.items()):
        if not (tally.accepted or tally.superseded or tally.dead):
            continue
        numbers: dict[str, float | None] = {
            "delivered": tally.accepted,
            "superseded": tally.superseded,
            "filtered": tally.filtered,
            "dead": tally.dead,
            "retries": report.retries,
            "records per second": round(report.records_per_second, 1),
            "latency p50 (ms)": _milliseconds(report.latency_p50),
            "latency p95 (ms)": _milliseconds(report.latency_p95),
            "lag p50 (s)": report.lag_p50 and round(report.lag_p50, 3),
            "lag p95 (s)": report.lag_p95 and round(report.lag_p95, 3),
        }
        context.log_event(
            dg.AssetMaterialization(
                asset_key=[report.target, stream],
                partition=day.isoformat(),
                metadata={name: number for name, number in numbers.items() if number is not None},
            )
        )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
