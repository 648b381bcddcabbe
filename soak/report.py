"""Judge a soak that is over, say what was found, and write it down."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import psycopg

from demo import ledger_counts
from soak import verdict, writers
from soak.schedule import BAD_KEYS
from soak.verdict import Account, Truth
from soak.watch import Watch
from soak.world import ROUTES, World

_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtUp:
    """How long a target took, once well, to have what it was owed by then."""

    target: str
    was: str
    owed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """What was killed, and when."""

    at: float
    attack: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What happened on the way."""

    seconds: float
    struck: Sequence[Struck]
    caught_up: Sequence[CaughtUp]
    caught_up_in: float | None
    """Seconds from the last fault and the last write until no target was owed anything; None: some still is."""
    workers: int
    """Run workers that were alive in the end."""
    watch: Watch


def judge(world: World, source: psycopg.Connection, course: Course, say: Callable[[str], None]) -> int:
    """Compare, print and write down; returns the exit code."""
    truth = verdict.read_truth(source, writers.STREAMS)
    accounts = [_account(world, source, target, truth) for target in ROUTES]
    found = list(verdict.capture_problems(truth))
    for account in accounts:
        found += verdict.problems(account, truth, refuses=_refuses(account.target))
    if course.caught_up_in is None:
        found.insert(0, "not every target caught up in time")
    runs = _runs(world)
    for line in report(truth, accounts, runs, course):
        say(line)
    for problem in found[:_SHOWN]:
        say(f"PROBLEM  {problem}")
    folder = world.deployment.folder
    course.watch.write(folder / "samples.csv")
    document = {
        "seconds": course.seconds,
        "written": sum(truth.written.values()),
        "caught_up_in": course.caught_up_in,
        "problems": found,
        "struck": [asdict(one) for one in course.struck],
        "caught_up": [asdict(one) for one in course.caught_up],
        "runs": runs,
        "targets": {
            one.target: {"counts": asdict(one.counts), "findings": one.findings, "dead": len(one.dead)}
            for one in accounts
        },
    }
    (folder / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    agree = "Not every target agrees" if found else "Every target agrees"
    say(f"{agree} with the source. Numbers, curves and logs are in {folder}.")
    return 1 if found else 0


def report(truth: Truth, accounts: Sequence[Account], runs: Mapping[str, int], course: Course) -> Sequence[str]:
    """Return the tables and the curves."""
    strikes = Counter(one.attack for one in course.struck)
    unfinished = sum(runs.get(status, 0) for status in ("STARTING", "STARTED", "CANCELING"))
    lines = [
        "",
        f"{sum(truth.written.values()):,} changes of {len(truth.written):,} keys committed in {course.seconds:.0f} s",
        f"{len(course.struck)} blows: {'; '.join(f'{count} x {what}' for what, count in strikes.items()) or 'none'}",
        f"Runs: {', '.join(f'{count} {status.lower()}' for status, count in runs.items())}; "
        f"{max(0, unfinished - course.workers)} of them have no process any more and take up a place in the queue",
        "",
        f"{'target':<8} {'mode':<6}" + "".join(f"{title:>12}" for title in _TITLES),
    ]
    for account in accounts:
        mode = ROUTES[account.target]["mode"]
        lines.append(f"{account.target:<8} {mode:<6}" + "".join(f"{cell:>12,}" for cell in _cells(account)))
    lines += ["repeated: sent again although the target had it, under the same key and with the same body", ""]
    lines += [
        f"{one.target} {one.was}: {one.seconds:.0f} s after it was well it had the {one.owed:,} changes it was owed"
        for one in course.caught_up
    ]
    if course.caught_up_in is not None:
        lines.append(
            f"{course.caught_up_in:.0f} s after the last fault and the last write, every target had everything"
        )
    return [*lines, "", *course.watch.curves(), ""]


_TITLES = ("requests", "delivered", "superseded", "repeated", "lost", "disordered", "dead")


def _cells(account: Account) -> Sequence[int]:
    broken = account.findings["broken"]
    return (
        account.findings["requests"],
        account.counts.accepted,
        account.counts.superseded,
        account.findings["repeats"],
        broken.get("lost", 0),
        broken.get("out_of_order", 0),
        len(account.dead),
    )


def _refuses(target: str) -> Sequence[str]:
    return BAD_KEYS if target == "picky" else ()


def _account(world: World, source: psycopg.Connection, target: str, truth: Truth) -> Account:
    mode = str(ROUTES[target]["mode"])
    expected = truth.expected(mode=mode, without=_refuses(target))
    return Account(
        target=target,
        counts=ledger_counts.counts(source)[target],
        findings=world.ask(target, "/findings", expected=expected),
        held=world.ask(target, "/held"),
        dead=[letter for letter in ledger_counts.dead_letters(source) if letter.target == target],
    )


def _runs(world: World) -> Mapping[str, int]:
    url = world.deployment.env["DAGSTER_POSTGRES_URL"].replace("+psycopg2", "", 1)
    with psycopg.connect(url) as connection:
        return dict(connection.execute("select status, count(*) from runs group by status order by 1").fetchall())
