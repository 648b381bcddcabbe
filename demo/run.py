"""The demo from beginning to end: first load, changes, a late commit, a refusal, and what the targets hold then."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from psycopg import Connection
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo import changes, ledger_counts, readback
from demo.changes import RefusedPlane
from demo.ledger_counts import Counts, DeadLetter, Pace
from demo.processes import Program, ProgramFailed
from demo.readback import Finding
from demo.world import FOLDER, World, set_up

_SHOWN = 10
_REFUSING = ("flight_board", "registry")
"""The targets that have a rule against fewer than no seats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the demo found of one target."""

    counts: Counts
    first_load: Pace
    refused: Sequence[DeadLetter]
    finding: Finding
    problems: Sequence[str]
    """Sentences; empty when source and target agree."""


def run(console: Console) -> int:
    """Run it all and print one table; returns 0 only if every target agrees with the source."""
    started = time.monotonic()
    with (
        set_up(lambda step: console.print(f"[bold]·[/] {step}")) as world,
        world.connect() as source,
        world.connect() as late,
    ):
        verdicts = _act(console, world, source, late)
    console.print()
    console.print(summary(verdicts))
    console.print(NOTES, style="dim", markup=False)
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    for problem in problems[:_SHOWN]:
        console.print(problem, style="red", markup=False)
    if len(problems) > _SHOWN:
        console.print(f"… and {len(problems) - _SHOWN} more of these.", style="red")
    console.print(
        f"{'Every target agrees with the source' if not problems else 'Not every target agrees with the source'}, "
        f"after {time.monotonic() - started:.0f} s. Nothing is left running; logs are in {FOLDER}."
    )
    return 1 if problems else 0


def _act(console: Console, world: World, source: Connection, late: Connection) -> Sequence[Verdict]:
    captured = sum(world.loaded.values())
    _check_captured(source, captured)
    loaded = ", ".join(f"{rows:,} {table}" for table, rows in world.loaded.items())
    console.print(f"[bold]·[/] First load: {loaded}: {captured:,} changes for each target")
    _run_job(console, world, source, 1)
    first_load = ledger_counts.pace(source)

    in_late = changes.open_late_transaction(late)
    during = changes.a_day_passes(source)
    captured += during
    _check_captured(source, captured)
    console.print(f"[bold]·[/] A day passes: {during:,} changes, while a transaction with {in_late} more stays open")
    _run_job(console, world, source, 2)

    late.execute("commit")
    behind = ledger_counts.behind_what_was_delivered(source)
    after, refused = changes.one_bad_among_good(source)
    captured += in_late + after
    _check_captured(source, captured)
    if behind != in_late:
        raise ProgramFailed(
            f"The late commit should stand behind what was delivered in {in_late} places, not {behind}."
        )
    console.print(
        f"[bold]·[/] The open transaction commits its {in_late} changes, behind what was delivered; "
        f"{after} more follow, one of them bad: plane {refused.tailnum} gets -1 seats, so this run must end in an error"
    )
    _run_job(console, world, source, 3, to_fail=True)

    console.print("[bold]·[/] Reading every target back through its own API, and comparing it field by field")
    return _judge(world, source, captured, first_load, refused)


def _check_captured(source: Connection, expected: int) -> None:
    found = ledger_counts.captured(source)
    if found != expected:
        raise ProgramFailed(f"The change log should have {expected:,} records by now and has {found:,}.")


def _run_job(console: Console, world: World, source: Connection, number: int, *, to_fail: bool = False) -> None:
    """Run the job as a user would, showing how far each target is; raises ProgramFailed unless it ends as it should."""
    before = ledger_counts.progress(source)
    total = ledger_counts.captured(source)
    command = ["-m", "dagster", "job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job"]
    job = world.programs.start(f"delivery_job_{number}", command, env=world.env)
    started = time.monotonic()
    if console.is_terminal:
        _show_bars(console, world, source, job, before, total)
    else:
        _show_lines(console, world, source, job, before, total)
    code = job.exit_code()
    seconds = time.monotonic() - started
    if (code != 0) != to_fail:
        raise ProgramFailed(
            f"dagster job execute ended with exit code {code} after {seconds:.0f} s. {job.last_words(40)}"
        )
    for line in job.log.read_text(errors="replace").splitlines():
        if line.startswith(tuple(f"{target} " for target in world.apis.base_urls)):
            console.print("  " + line, markup=False)
    expected = ", as it should: a record was refused" if to_fail else ""
    console.print(f"  dagster job execute: exit code {code}{expected}, {seconds:.1f} s")


def _show_bars(
    console: Console, world: World, source: Connection, job: Program, before: Mapping[str, int], total: int
) -> None:
    columns = (TextColumn("  {task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks = {target: bars.add_task(target, total=total - before.get(target, 0)) for target in world.apis.base_urls}
        while job.exit_code() is None:
            for target, done in ledger_counts.progress(source).items():
                bars.update(tasks[target], completed=done - before.get(target, 0))
            time.sleep(0.1)


def _show_lines(
    console: Console, world: World, source: Connection, job: Program, before: Mapping[str, int], total: int
) -> None:
    shown = time.monotonic()
    while job.exit_code() is None:
        if time.monotonic() - shown >= 5:
            shown = time.monotonic()
            done = ledger_counts.progress(source)
            parts = (
                f"{target} {done.get(target, 0) - before.get(target, 0):,} of {total - before.get(target, 0):,}"
                for target in world.apis.base_urls
            )
            console.print("  " + ", ".join(parts))
        time.sleep(0.1)


def _judge(
    world: World, source: Connection, captured: int, first_load: Mapping[str, Pace], refused: RefusedPlane
) -> Sequence[Verdict]:
    findings = {
        "flight_board": readback.read_board(world.apis, source, refused),
        "registry": readback.read_registry(world.apis, source, refused),
        "event_hook": readback.read_event_hook(world.apis, source),
    }
    counts = ledger_counts.counts(source)
    letters = ledger_counts.dead_letters(source)
    verdicts = []
    for target, finding in findings.items():
        its_letters = [letter for letter in letters if letter.target == target]
        problems = [
            *finding.differences,
            *conservation_problems(counts[target], captured),
            *refusal_problems(its_letters, refused.tailnum if target in _REFUSING else None),
        ]
        verdicts.append(
            Verdict(
                counts=counts[target],
                first_load=first_load.get(target, Pace(target=target, records=0, requests=0, seconds=0.0)),
                refused=its_letters,
                finding=finding,
                problems=[f"{target}: {problem}." for problem in problems],
            )
        )
    return verdicts


def conservation_problems(counts: Counts, captured: int) -> list[str]:
    """Return what is wrong with a target's counts, given how many changes were made."""
    problems = []
    if counts.captured != captured:
        problems.append(f"{captured:,} changes were made for it, and {counts.captured:,} captured")
    if not counts.adds_up:
        problems.append(
            f"captured {counts.captured:,} is not accepted {counts.accepted:,} + superseded {counts.superseded:,} + "
            f"filtered {counts.filtered:,} + dead {counts.dead:,} + claimed {counts.claimed:,} + "
            f"pending {counts.pending:,}"
        )
    if counts.claimed or counts.pending:
        problems.append(f"{counts.claimed + counts.pending:,} changes are still owed")
    return problems


def refusal_problems(letters: Sequence[DeadLetter], tailnum: str | None) -> list[str]:
    """Return what is wrong with a target's dead letters, given the one plane that it had to refuse (None: none)."""
    expected = [] if tailnum is None else [("planes", tailnum)]
    found = [(letter.stream, letter.key) for letter in letters]
    problems = [
        f"{stream} {key} was refused and should not have been" for stream, key in found if (stream, key) not in expected
    ]
    problems += [
        f"{stream} {key} should have been refused once" for stream, key in expected if found.count((stream, key)) != 1
    ]
    return problems


def summary(verdicts: Sequence[Verdict]) -> Table:
    """Return the one table: a column for each target, so that it fits a narrow terminal."""
    table = Table(title="What became of every change", title_justify="left", show_lines=False)
    table.add_column("")
    for verdict in verdicts:
        table.add_column(verdict.counts.target, ratio=1)

    def row(heading: str, cell: Callable[[Verdict], str]) -> None:
        table.add_row(heading, *(cell(verdict) for verdict in verdicts))

    row("changes captured", lambda v: f"{v.counts.captured:,}")
    row("delivered", lambda v: f"{v.counts.accepted:,}")
    row("superseded¹", lambda v: f"{v.counts.superseded:,}")
    row("filtered²", lambda v: f"{v.counts.filtered:,}")
    row("refused, and why", lambda v: "\n".join([f"{len(v.refused)}", *map(_refusal, v.refused)]))
    row("sent again³", lambda v: f"{v.finding.repeats:,}")
    row("first load", lambda v: _pace(v.first_load))
    row("compared⁴", lambda v: f"{v.finding.compared:,} {v.finding.things}")
    row(
        "[bold]source and\ntarget agree[/]",
        lambda v: "[bold red]no[/]" if v.problems else "[bold green]yes[/]",
    )
    return table


NOTES = """\
¹ overtaken by a later state of the same record
² of a table that this target does not want
³ although the target had it already
⁴ read from the target's own API, field by field; a refused record must be as it was before.
Agreed is only what adds up, too: captured = delivered + superseded + filtered + refused."""


def _refusal(letter: DeadLetter) -> str:
    return escape(f"{letter.stream} {letter.key}: {letter.why()}")


def _pace(pace: Pace) -> str:
    per_second = f"\n{pace.records / pace.seconds:,.0f} records/s" if pace.seconds else ""
    return f"{pace.seconds:.1f} s{per_second}"
