"""The ops that a person launches: load tables, redrive or discard dead letters, prune the log, look at what comes.

No `from __future__ import annotations` here: Dagster reads the annotations of ops at decoration.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import dagster as dg
from pydantic import Field

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import TargetCatalog, TargetMisconfigured
from pipelines.delivery.clock import Clock
from pipelines.delivery.ledger import Ledger
from pipelines.delivery.loading import CannotLoad, Loader
from pipelines.delivery.ops import log_progress
from pipelines.operating.dead_letters import CannotRedrive, DeadLetters, Redrive, Selection
from pipelines.operating.masking import Masking
from pipelines.operating.previewing import lines_of
from pipelines.operating.previewing import preview as preview_of
from pipelines.operating.pruning import Pruner, who_holds
from pipelines.operating.selecting import UnknownTime, describe, parse_time, redrives

_PREVIEWED_BYTES = 32_000_000


class RedriveConfig(dg.Config):
    """Which open dead letters are meant, and what is to be done with them."""

    targets: list[str] = Field(default=[], description="Of these targets only; empty: of all.")
    streams: list[str] = Field(default=[], description="Of these streams only; empty: of all.")
    keys: list[str] = Field(default=[], description="Of these records only, by their keys; empty: of all.")
    change_ids: list[int] = Field(default=[], description="These changes only; empty: all.")
    reason: str = Field(default="", description="Only those whose reason contains this, in whatever case.")
    since: str = Field(default="", description="Refused at this time or later: 2026-01-31, or with a time of day.")
    until: str = Field(default="", description="Refused before this time.")
    dry_run: bool = Field(default=True, description="Say what would be done, and do nothing. Set it to false to act.")
    discard: str = Field(
        default="", description="A reason why these need not be sent any more: they are closed with it, not sent."
    )

    def selection(self) -> Selection:
        """Return what is meant; raises UnknownTime."""
        return Selection(
            targets=self.targets,
            streams=self.streams,
            keys=self.keys,
            change_ids=self.change_ids,
            reason=self.reason,
            since=parse_time(self.since, field="ops.redrive.config.since"),
            until=parse_time(self.until, field="ops.redrive.config.until"),
        )


@dg.op
def redrive(
    context: dg.OpExecutionContext,
    config: RedriveConfig,
    dead_letters: dg.ResourceParam[DeadLetters],
    targets: dg.ResourceParam[TargetCatalog],
    clock: dg.ResourceParam[Clock],
) -> None:
    """Append the selected dead letters to the log again, or discard them; `change_sensor` sees to the delivery."""
    try:
        selection = config.selection()
    except UnknownTime as error:
        raise dg.Failure(f"{error}.", allow_retries=False) from None
    groups = dead_letters.groups(selection)
    for group in groups:
        line = describe(group, now=clock.now())
        print(line, flush=True)  # on stdout: what `dagster job execute` shows
        context.log.info(line)
    total = sum(group.count for group in groups)
    if not total:
        _say(context, "There are no open dead letters of this kind.", selected=0)
    elif config.dry_run:
        what = "discarded" if config.discard else "redriven"
        _say(context, f"{total} would be {what}. To do it, launch this again with dry_run: false.", selected=total)
    elif config.discard:
        done = dead_letters.discard(selection, note=config.discard, run_id=context.run_id)
        _say(context, f"{done} discarded: {config.discard}", selected=total, discarded=done)
    else:
        _redrive(context, dead_letters, selection, *redrives(groups, targets.configs()))


def _redrive(
    context: dg.OpExecutionContext,
    dead_letters: DeadLetters,
    selection: Selection,
    routes: Sequence[Redrive],
    problems: list[str],
) -> None:
    closed = appended = 0
    for route in routes:
        try:
            for step in dead_letters.redrive(selection, route, run_id=context.run_id):
                closed, appended = closed + step.closed, appended + step.appended
                context.log.info(f"{route.target}/{route.stream}: {closed} redriven so far")
        except CannotRedrive as error:
            problems.append(f"{route.target}: {error}")
    _say(context, f"{closed} redriven; records to be delivered: {appended}.", redriven=closed, appended=appended)
    if problems:
        raise dg.Failure("; ".join(problems), allow_retries=False)


class LoadConfig(dg.Config):
    """Whose rows are loaded."""

    targets: list[str] = Field(default=[], description="For these targets only; empty: for all that are active.")
    streams: list[str] = Field(default=[], description="Of these streams only; empty: of all that a target routes.")
    again: bool = Field(default=False, description="Load again what is loaded already.")


@dg.op
def load_rows(
    context: dg.OpExecutionContext,
    config: LoadConfig,
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
    loader: dg.ResourceParam[Loader],
) -> None:
    """Append every row of the targets' tables to the log, addressed to them; deliveries go on meanwhile."""
    configs = targets.configs()
    names = _known(config.targets, targets, at="ops.load_rows.config.targets")
    targets.owed(ledger)  # makes known those that are new
    chosen = [configs[name] for name in names if configs[name].status == "active"]
    for name in names:
        if configs[name].status != "active":
            print(f"{name}  left alone: its file has status: {configs[name].status}", flush=True)
    routes = [(one.name, stream) for one in chosen for stream in one.routes if stream in (config.streams or one.routes)]
    problems: list[str] = []
    total = 0
    for target, stream in routes:
        loader.begin(target, [stream], again=config.again)
        rows = 0
        try:
            for progress in loader.run(target, stream, run_id=context.run_id):
                log_progress(context, target, stream, progress)
                rows = progress.rows
        except CannotLoad as error:
            problems.append(f"{target}: {error}")
            continue
        (load,) = (one for one in loader.loads([target]) if one.stream == stream)
        if rows:
            ending = f"{rows} rows appended"
        elif load.done:
            ending = f"loaded before ({load.rows} rows); to load it again, set again: true"
        else:
            ending = "another run is loading it"
        print(f"{target}/{stream}  {ending}", flush=True)
        total += rows
    context.add_output_metadata({"rows": total})
    if problems:
        raise dg.Failure("; ".join(problems), allow_retries=False)


@dg.op
def prune(
    context: dg.OpExecutionContext,
    pruner: dg.ResourceParam[Pruner],
    source: dg.ResourceParam[SourceConfig],
    targets: dg.ResourceParam[TargetCatalog],
    clock: dg.ResourceParam[Clock],
) -> None:
    """Remove from the log and the trail what every target has settled and `retention_days` has passed."""
    if source.retention_days is None:
        _say(context, "The log is kept for ever: source.yaml sets no retention_days.", changes=0, batches=0)
        return
    now = clock.now()
    drop_after = None if source.drop_after is None else timedelta(days=source.drop_after)
    who = who_holds(pruner.holders(), targets.configs(), now=now, drop_after=drop_after)
    for remark in who.remarks:
        context.log.warning(remark)
    changes = batches = 0
    missed = Counter[str]()
    before = now - timedelta(days=source.retention_days)
    for step in pruner.prune(before=before, holding=who.holding, dropped=who.dropped):
        changes, batches = changes + step.changes, batches + step.batches
        missed.update(step.missed or {})
    for target, count in sorted(missed.items()):
        context.log.warning(f"{target}: {count} changes that it never got are no longer in the log (drop_after)")
    days = source.retention_days
    _say(
        context,
        f"{changes} changes and {batches} batches older than {days} days removed.",
        changes=changes,
        batches=batches,
        missed=missed.total(),
    )


class PreviewConfig(dg.Config):
    """Whose next requests are looked at, and how closely."""

    targets: list[str] = Field(default=[], description="Of these targets only; empty: of all.")
    records: int = Field(default=1000, ge=1, le=20_000, description="Look at so many of the changes that are owed.")
    requests: int = Field(
        default=3, ge=0, le=100, description="Show so many requests of each target, as they would go out."
    )
    mask: list[str] = Field(
        default=[],
        description="Source columns, or fields inside of them, whose values are not shown; _key is the record's key.",
    )


@dg.op
def preview(
    context: dg.OpExecutionContext,
    config: PreviewConfig,
    ledger: dg.ResourceParam[Ledger],
    targets: dg.ResourceParam[TargetCatalog],
    source: dg.ResourceParam[SourceConfig],
) -> None:
    """Say what each target would be sent next, and what would be refused before that. Sends and changes nothing."""
    names = _known(config.targets, targets, at="ops.preview.config.targets")
    masking = Masking(config.mask, key_columns={stream: table.key_columns for stream, table in source.tables.items()})
    unseen = frozenset(config.mask)
    problems: list[str] = []
    shown: list[str] = []
    looked_at = sendable = refused = 0
    for name in names:
        try:
            destination = targets.destination(name)
        except TargetMisconfigured as error:
            problems.append(str(error))
            continue
        upcoming = ledger.upcoming(name, max_records=config.records, max_bytes=_PREVIEWED_BYTES)
        unseen &= masking.unseen_in(upcoming.changes())
        found = preview_of(
            upcoming,
            policy=destination.policy,
            routes=destination.routes,
            show=config.requests,
            masking=masking,
        )
        shown += lines_of(name, found)
        looked_at += found.looked_at
        sendable += sum(found.records.values())
        refused += sum(len(keys) for keys in found.refused.values())
    if looked_at and (unknown := sorted(unseen - targets.columns())):
        # A slip here would show what is to be hidden.
        raise dg.Failure(
            f"ops.preview.config.mask: no change that is owed has a column or field {', '.join(unknown)}, and no "
            "watched table has such a column; nothing is shown.",
            allow_retries=False,
        )
    for line in shown:
        print(line, flush=True)  # on stdout: what `dagster job execute` shows
    text = "\n".join(["```", *shown, "```"])
    context.add_output_metadata({"records": sendable, "refused": refused, "preview": dg.MetadataValue.md(text)})
    if problems:
        raise dg.Failure("; ".join(problems), allow_retries=False)


def _known(chosen: Sequence[str], targets: TargetCatalog, *, at: str) -> Sequence[str]:
    """Return the chosen targets, all if none is chosen; raises Failure for one that is not configured."""
    configs = targets.configs()
    if unknown := sorted(set(chosen) - set(configs)):
        known = ", ".join(configs) or "none"
        raise dg.Failure(
            f"{at}: there is no target {', '.join(unknown)}; configured are: {known}.", allow_retries=False
        )
    return chosen or list(configs)


def _say(context: dg.OpExecutionContext, sentence: str, **numbers: int) -> None:
    print(sentence, flush=True)  # on stdout: what `dagster job execute` shows
    context.log.info(sentence)
    context.add_output_metadata(numbers)
