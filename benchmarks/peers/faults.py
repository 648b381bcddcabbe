"""The same faults for everybody: what is lost, what is repeated under no known key, what is older than the target had?

Each sender delivers with nothing in its way, then to a receiver that now and then refuses, closes the connection once
it has applied a request, or says nothing; then it is killed half-way and started again, as its user would. Whatever is
missing when it says that it is done is lost.
"""

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.running import Delivery, Sender, Setting
from benchmarks.peers.speed import DATABASE, setting_of
from benchmarks.throughput import seen, verdicts
from benchmarks.workload import Workload
from demo.processes import ProgramFailed

TIMEOUT = 2.0
"""Seconds that an answer may take, for everybody."""
_LIMIT = 600.0
"""Seconds until a sender has had its time; one of them waits 30 s for each answer, and that cannot be changed."""
_MOST_STARTS = 5
KILL_AT = 0.4
"""The share of the requests that have been applied when everything is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What happens to a delivery. The faults are `benchmarks.receiver.Faults`."""

    name: str
    faults: Mapping[str, int] = field(default_factory=dict)
    kill: bool = False


WORK = Workload(changes=40_000, targets=2, latency=0.02, versions=20)
"""Each record changes again within 2,000 changes."""
TRIALS: Sequence[Trial] = (
    Trial(name="nothing"),
    Trial(name="faults", faults={"refuse": 23, "lose_answer": 41, "hang": 97}),
    Trial(name="SIGKILL", kill=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the targets have after one trial, all together."""

    sender: str
    trial: str
    ended: str
    """`caught_up`, or how it ended otherwise."""
    starts: int
    seconds: float
    lost: int
    """Never came; of a sender that was not done (see `ended`), not yet."""
    repeated: int
    """Came again without a key that tells so."""
    known: int
    """Came again under its key."""
    stale: int
    """Came after a later version of the same record."""
    wrong_at_the_end: int
    """Records whose last version the target does not have last."""


def put_to(
    sender: Sender, trial: Trial, server_url: str, workload: Workload, *, folder: Path, database: str = DATABASE
) -> Outcome:
    """Have *sender* deliver *workload* while *trial* happens to it; started again until it says that all is done."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = setting_of(
        sender, server_url, workload, folder=folder, database=database, faults=trial.faults, timeout=TIMEOUT
    )
    with settings as setting:
        started, starts, killed = time.monotonic(), 0, not trial.kill
        ended = "out of time"
        while ended != "caught_up" and starts < _MOST_STARTS and (left := started + _LIMIT - time.monotonic()) > 0:
            starts += 1
            try:
                with Delivery(sender, setting) as delivery, _killing(delivery, setting, ahead=not killed) as done:
                    ended = _end(delivery.deliver(left))
            except ProgramFailed:
                ended = "broke off" if time.monotonic() < started + _LIMIT else "out of time"
            if not killed:
                ended = "killed" if done.is_set() else "was done before it could be killed"
                killed = True
        seconds = time.monotonic() - started
        found = verdicts(setting.url, workload)

    def count(what: str) -> int:
        return sum(verdict[what] for verdict in found.values())

    absent = len(workload.names) - len(found)
    return Outcome(
        sender=sender.name,
        trial=trial.name,
        ended=ended,
        starts=starts,
        seconds=seconds,
        lost=count("missing") + absent * workload.deliveries // workload.targets,
        repeated=count("repeats"),
        known=count("known_repeats"),
        stale=count("stale"),
        wrong_at_the_end=count("wrong_at_the_end") + absent * workload.ids,
    )


def table(outcomes: Sequence[Outcome], trials: Sequence[Trial] = TRIALS) -> str:
    """Return a line for each sender; for each trial how it ended, and what the targets have."""
    lines = [
        f"{'':<42} " + " | ".join(f"{trial.name:<50}" for trial in trials),
        f"{'':<42} "
        + " | ".join(f"{'lost':>8}{'repeated':>10}{'stale':>8}{'wrong':>8}{'s':>6}  {'':<8}" for _ in trials),
    ]
    for sender in dict.fromkeys(one.sender for one in outcomes):
        by_trial = {one.trial: one for one in outcomes if one.sender == sender}
        cells = [_cell(by_trial.get(trial.name)) for trial in trials]
        lines.append(f"{sender:<42} " + " | ".join(cells))
    return "\n".join(lines)


def _cell(one: Outcome | None) -> str:
    if one is None:
        return f"{'not tried':<50}"
    ended = "" if one.ended == "caught_up" else one.ended
    counts = f"{one.lost:>8,}{one.repeated:>10,}{one.stale:>8,}{one.wrong_at_the_end:>8,}{one.seconds:>6.0f}"
    return f"{counts}  {ended:<8}"


def _end(said: Sequence[Mapping[str, Any]]) -> str:
    """Return how it ended for that process for which it ended worst."""
    return next((str(one["end"]) for one in said if one["end"] != "caught_up"), "caught_up")


@contextmanager
def _killing(delivery: Delivery, setting: Setting, *, ahead: bool) -> Iterator[threading.Event]:
    """Kill *delivery* once so much is applied, if that is *ahead*; yield what is set when that is done."""
    done, over = threading.Event(), threading.Event()
    work = setting.workload
    enough = KILL_AT * work.deliveries / work.batch

    def watch() -> None:
        while not over.wait(0.005):
            if sum(one["requests"] for one in seen(setting.url)["targets"].values()) >= enough:
                done.set()
                delivery.kill()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if ahead:
        watcher.start()
    try:
        yield done
    finally:
        over.set()
        if ahead:
            watcher.join()
