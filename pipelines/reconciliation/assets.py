"""The assets `reconciliation/<target>/<stream>`, with their checks: what each target holds, compared with the source.

Those of a target are one step, one stream after another, so that it is asked no more often than it allows. Beside them
`reconciliation/<target>` counts where each change is that was captured for it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import dagster as dg
from pydantic import Field

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import TargetCatalog, TargetMisconfigured
from pipelines.delivery.clock import Clock
from pipelines.delivery.config import RouteConfig, TargetConfig
from pipelines.delivery.ledger import Ledger
from pipelines.delivery.reading import ReconcileConfig, Repair
from pipelines.reconciliation import report
from pipelines.reconciliation.checks import conservation_check, result_of, stream_checks
from pipelines.reconciliation.guard import Limits
from pipelines.reconciliation.listing import ListingFailed
from pipelines.reconciliation.meaning import meaning_of
from pipelines.reconciliation.reconcile import Outcome, Reconciliation
from pipelines.reconciliation.subject import bucket_of, reader_of, subject_of
from pipelines.reconciliation.workspace import CannotReconcile, Workspaces

Result = dg.MaterializeResult[None] | dg.AssetCheckResult

_PREFIX = "reconciliation"


class ReconcileRun(dg.Config):
    """What a launch sets in place of the routes' own `reconcile`."""

    repair: str = Field(default="", description="off, missing, stale or all; empty: as each route says.")
    delete_extra: bool | None = Field(
        default=None, description="With repair: all, delete what the source has not got. Default: as each route says."
    )
    max_repair_fraction: float | None = Field(
        default=None, description="Repair no more than this part of the records. Default: as each route says."
    )
    trust_listing: bool = Field(
        default=False, description="The target's list is as short as it seems: repair though most is missing."
    )
    dry_run: bool = Field(default=False, description="Say what would be repaired, and do nothing.")

    def check(self) -> None:
        """Raise Failure if this cannot be meant."""
        if self.repair and self.repair not in get_args(Repair):
            known = ", ".join(get_args(Repair))
            raise dg.Failure(f"repair: '{self.repair}' is not one of {known}.", allow_retries=False)
        if self.delete_extra and self.repair not in ("", "all"):
            raise dg.Failure(f"delete_extra: goes with repair: all, not with {self.repair}.", allow_retries=False)
        if self.max_repair_fraction is not None and not 0 <= self.max_repair_fraction <= 1:
            raise dg.Failure(
                f"max_repair_fraction: {self.max_repair_fraction:g} is not from 0 to 1.", allow_retries=False
            )

    def limits(self, settings: ReconcileConfig, route: RouteConfig) -> Limits:
        """Return a route's limits, with what is set here in their place."""
        chosen: Repair | None = next((one for one in get_args(Repair) if one == self.repair), None)
        return Limits.of(
            settings,
            repair=chosen,
            delete_extra=self.delete_extra,
            max_repair_fraction=self.max_repair_fraction,
            trust_listing=self.trust_listing,
            dry_run=self.dry_run,
            cannot=route.cannot_repair(),
        )


def key_of(target: str, stream: str | None = None) -> dg.AssetKey:
    """Return the key of a stream's asset, or of the target's own."""
    return dg.AssetKey([_PREFIX, target] if stream is None else [_PREFIX, target, stream])


def streams_of(config: TargetConfig) -> list[str]:
    """Return the streams of a target that can be read back."""
    return [stream for stream, route in config.routes.items() if route.read is not None]


def reconciliation_assets(configs: Iterable[TargetConfig]) -> list[dg.AssetsDefinition]:
    """Return one definition for each target."""
    return [_assets_of(config) for config in configs]


def _assets_of(target: TargetConfig) -> dg.AssetsDefinition:
    name, streams = target.name, streams_of(target)

    @dg.multi_asset(
        name=f"reconcile_{name}",
        description=f"Count the changes for {name}, and compare what it holds with the source, stream by stream.",
        specs=list(_specs(target)),
        check_specs=[
            conservation_check(key_of(name)),
            *(check for stream in streams for check in stream_checks(key_of(name, stream))),
        ],
        can_subset=True,
    )
    def reconcile(
        context: dg.AssetExecutionContext,
        config: ReconcileRun,
        ledger: dg.ResourceParam[Ledger],
        targets: dg.ResourceParam[TargetCatalog],
        workspaces: dg.ResourceParam[Workspaces],
        source: dg.ResourceParam[SourceConfig],
        clock: dg.ResourceParam[Clock],
    ) -> Iterator[Result]:
        config.check()
        found = targets.configs().get(name)
        if found is None or found.status != "active":
            why = "its file is gone" if found is None else f"it is {found.status} in its file"
            context.log.warning(f"{name} is left alone: {why}")
            return
        targets.owed(ledger)  # makes it known if it is new
        if _is_chosen(context, key_of(name)):
            yield from _changes(context, found, ledger)
        chosen = [stream for stream in streams_of(found) if _is_chosen(context, key_of(name, stream))]
        problems: list[str] = []
        for outcome in _reconciled(context, config, found, chosen, targets, workspaces, source, clock):
            if isinstance(outcome, str):
                problems.append(outcome)
                context.log.error(outcome)
            else:
                print(report.line(outcome), flush=True)  # on stdout: what `dagster job execute` shows
                yield from _told(context, found, outcome)
        if problems and found.critical:
            raise dg.Failure("; ".join(problems), allow_retries=False)

    return reconcile


def _specs(config: TargetConfig) -> Iterator[dg.AssetSpec]:
    yield dg.AssetSpec(
        key=key_of(config.name),
        description=f"Where each change is that was captured for {config.name}.",
        group_name=_PREFIX,
        kinds={"postgres"},
        skippable=True,
    )
    for stream in streams_of(config):
        yield dg.AssetSpec(
            key=key_of(config.name, stream),
            description=f"What {config.name} holds of {stream}, compared with the source field by field.",
            group_name=_PREFIX,
            kinds={"http", "pandas"},
            deps=[dg.AssetKey([config.name, stream])],
            skippable=True,
        )


def _reconciled(
    context: dg.AssetExecutionContext,
    config: ReconcileRun,
    target: TargetConfig,
    streams: Sequence[str],
    targets: TargetCatalog,
    workspaces: Workspaces,
    source: SourceConfig,
    clock: Clock,
) -> Iterator[Outcome | str]:
    """Yield what was found of each stream, or a sentence that says why it could not be read."""
    if not streams:
        return
    try:
        routes = targets.destination(target.name).routes
        subjects = [subject_of(target, stream, routes) for stream in streams]
        largest = max(subject.read.max_response_bytes for subject in subjects)
        client = targets.reader(target.name, max_response_bytes=largest)
    except TargetMisconfigured as problem:
        yield f"{target.name}: {problem}"
        return
    bucket = bucket_of(target, clock)
    try:
        for subject in subjects:
            stream = subject.stream
            try:
                with workspaces.open(target.name, stream, run_id=context.run.run_id) as workspace:
                    outcome = Reconciliation(
                        subject=subject,
                        workspace=workspace,
                        reader=reader_of(target, client, clock, bucket),
                        meaning=meaning_of(target, stream, source.tables[stream], loaded=workspace.loaded()),
                        limits=config.limits(subject.settings, target.routes[stream]),
                        now=clock.now(),
                        say=context.log.info,
                    ).run()
            except (ListingFailed, CannotReconcile) as problem:
                yield f"{target.name}/{stream}: {problem}"
            else:
                yield outcome
    finally:
        client.close()


def _is_chosen(context: dg.AssetExecutionContext, key: dg.AssetKey) -> bool:
    return key in context.selected_asset_keys or any(
        check.asset_key == key for check in context.selected_asset_check_keys
    )


def _changes(context: dg.AssetExecutionContext, config: TargetConfig, ledger: Ledger) -> Iterator[Result]:
    verdict = report.conservation(ledger.conservation(config.name))
    yield from _yielded(context, config, key_of(config.name), dict(verdict.numbers), [verdict])


def _told(context: dg.AssetExecutionContext, config: TargetConfig, outcome: Outcome) -> Iterator[Result]:
    metadata: dict[str, Any] = {
        **report.numbers(outcome),
        "summary": report.line(outcome),
        "chart": dg.MetadataValue.md(report.chart(outcome)),
        "fields that differ": _table(("field", "records"), outcome.summary.fields),
        "samples": _table(("kind", "key", "fields or reason"), report.samples(outcome)),
        "resumed": outcome.resumed,
    }
    if outcome.values:
        metadata["values that differ"] = _table(("key", "field", "should be", "is"), outcome.values)
    if outcome.guard.refused:
        metadata["not repaired"] = outcome.guard.refused
    key = key_of(outcome.target, outcome.stream)
    yield from _yielded(context, config, key, metadata, report.verdicts(outcome))


def _yielded(
    context: dg.AssetExecutionContext,
    config: TargetConfig,
    key: dg.AssetKey,
    metadata: dict[str, Any],
    verdicts: Sequence[report.Verdict],
) -> Iterator[Result]:
    if key in context.selected_asset_keys:
        yield dg.MaterializeResult(asset_key=key, metadata=metadata)
    for verdict in verdicts:
        if dg.AssetCheckKey(key, verdict.name) in context.selected_asset_check_keys:
            yield result_of(verdict, key, critical=config.critical)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dg.TableMetadataValue:
    schema = dg.TableSchema(
        columns=[
            dg.TableColumn(name, "int" if rows and isinstance(rows[0][place], int) else "string")
            for place, name in enumerate(columns)
        ]
    )
    records = [dg.TableRecord(dict(zip(columns, row, strict=True))) for row in rows]
    return dg.MetadataValue.table(records=records, schema=schema)
