"""The ops that a person launches: redrive or discard dead letters.

No `from __future__ import annotations` here: Dagster reads the annotations of ops at decoration.
"""

from collections.abc import Sequence

import dagster as dg
from pydantic import Field

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.clock import Clock
from pipelines.operating.dead_letters import CannotRedrive, DeadLetters, Redrive, Selection
from pipelines.operating.selecting import UnknownTime, describe, parse_time, redrives


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
        print(describe(group, now=clock.now()), flush=True)
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


def _say(context: dg.OpExecutionContext, sentence: str, **numbers: int) -> None:
    print(sentence, flush=True)  # on stdout: what `dagster job execute` shows
    context.log.info(sentence)
    context.add_output_metadata(numbers)
