"""Do sick targets slow healthy ones down? `make bench-isolation` measures two of them alone and beside three sick ones.

The same changes go through the real `delivery_job`, by `dagster job execute`, to

    alone     steady_a and steady_b
    beside    the same, with hangs (never answers), refuses (503 to all) and gone (nothing listens)

in turns, a few rounds of it in one invocation, each time from a fresh database. Throughput is what the two healthy
targets saw: records from the first request to the last answer. They answer after --delay seconds, so that the wire sets
the pace; with --delay 0 the machine does, and every process that does anything at all takes from the others.

In the end the sick get well under the real daemon and sensor, and must be delivered everything with nobody's help.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from psycopg.rows import class_row

from demo.processes import ROOT, Program, ProgramFailed, Programs, free_port
from soak import deployment
from soak.deployment import EXECUTE, WORKSPACE, Deployment

FOLDER = ROOT / ".data" / "benchmarks"
HEALTHY = ("steady_a", "steady_b")
SICK = ("hangs", "refuses", "gone")
_LONGEST_RUN = 900.0
_LONGEST_RECOVERY = 300.0

_SOURCE = {"tables": {"orders": {"key": "id"}}}
_FILL = """
insert into distributary.change_log (stream, key, operation, payload)
select 'orders', i::text, 'insert', jsonb_build_object('id', i, 'note', repeat(md5(i::text), 6), 'cents', i * 7)
from generate_series(1, %s) as i
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured."""

    changes: int = 60_000
    rounds: int = 3
    delay: float = 0.03
    batch: int = 25
    patience: float = 20.0
    """Seconds for which a sick target is tried in one run (`retry.max_elapsed`)."""
    folder: Path = FOLDER
    name: str = "bench_isolation"
    """Names the databases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the job: how fast the two healthy targets were served."""

    round: int
    beside_sick: bool
    per_second: Mapping[str, float]
    """Records, as each healthy target saw them."""

    @property
    def throughput(self) -> float:
        """Records per second, over both."""
        return sum(self.per_second.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How one target fared that got well; times in seconds."""

    target: str
    held_back: float
    """From getting well until its `retry_at`; negative: that had passed already."""
    until_first: float
    """From getting well until its first request, for daemon, sensor and run to start as well."""
    until_everything: float
    """From getting well until it had everything."""
    delivered: int
    dead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All of it."""

    options: Options
    runs: Sequence[Run]
    recoveries: Sequence[Recovery]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios: beside the sick to alone."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> Sequence[float]:
        """Each round's own ratio."""
        alone = {run.round: run.throughput for run in self.runs if not run.beside_sick}
        return [run.throughput / alone[run.round] for run in self.runs if run.beside_sick]

    @property
    def all_delivered(self) -> bool:
        """Whether the sick got everything in the end, and nothing died."""
        return all(one.delivered == self.options.changes and not one.dead for one in self.recoveries)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers; returns 0 if the healthy kept their pace and the sick got everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolation", description=__doc__.partition("\n")[0])
    parser.add_argument("--changes", type=int, default=Options().changes, help="changes for each target")
    parser.add_argument("--rounds", type=int, default=Options().rounds)
    parser.add_argument("--delay", type=float, default=Options().delay, help="seconds before a healthy target answers")
    parser.add_argument("--batch", type=int, default=Options().batch, help="records in one request")
    parser.add_argument("--least", type=float, default=0.95, help="the ratio below which the exit code is 1")
    parser.add_argument("--json", type=Path, default=FOLDER / "isolation.json", help="where the numbers go")
    chosen = parser.parse_args(arguments)
    options = Options(changes=chosen.changes, rounds=chosen.rounds, delay=chosen.delay, batch=chosen.batch)
    measured = measure(options)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(asdict(measured) | {"ratio": measured.ratio}, indent=1, default=str))
    print(report(measured))
    print(f"Every number is in {chosen.json}.")
    return 0 if measured.ratio >= chosen.least and measured.all_delivered else 1


def measure(options: Options) -> Measured:
    """Run all rounds, then let the sick get well."""
    options.folder.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    with deployment.server() as server_url:
        try:
            for number in range(1, options.rounds + 1):
                # Each goes first every other time: the machine may be warming up, or slowing down.
                for beside_sick in (False, True) if number % 2 else (True, False):
                    with stage(server_url, options, beside_sick=beside_sick) as one:
                        runs.append(one.run(number))
                    _tell(runs[-1])
            print("Once more beside the sick, who then get well …", flush=True)
            with stage(server_url, options, beside_sick=True) as one:
                one.run(0)
                recoveries = one.get_well()
        finally:
            deployment.drop(server_url, options.name)
    return Measured(options=options, runs=runs, recoveries=recoveries)


def report(measured: Measured) -> str:
    """Return the tables."""
    options = measured.options
    lines = [
        f"{options.changes:,} changes for each target, {options.batch} in a request; healthy targets answer after "
        f"{options.delay * 1000:g} ms; records per second as they saw it:",
        f"{'round':>6} {'alone':>10} {'beside':>10} {'ratio':>7}",
    ]
    for number in sorted({run.round for run in measured.runs}):
        alone, beside = sorted((run for run in measured.runs if run.round == number), key=lambda run: run.beside_sick)
        ratio = beside.throughput / alone.throughput
        lines.append(f"{number:>6} {alone.throughput:>10,.0f} {beside.throughput:>10,.0f} {ratio:>7.3f}")
    lines.append(f"{'median':>6} {'':>21} {measured.ratio:>7.3f}")
    lines.append("The sick got well; seconds from then, with nobody's help:")
    lines.append(f"{'':>10} {'retry_at':>9} {'first request':>14} {'has everything':>15} {'delivered':>10} {'dead':>5}")
    for one in measured.recoveries:
        lines.append(
            f"{one.target:>10} {one.held_back:>9.1f} {one.until_first:>14.1f} {one.until_everything:>15.1f} "
            f"{one.delivered:>10,} {one.dead:>5}"
        )
    return "\n".join(lines)


def _tell(run: Run) -> None:
    where = "beside the sick" if run.beside_sick else "alone"
    rates = ", ".join(f"{name} {rate:,.0f}/s" for name, rate in run.per_second.items())
    print(f"round {run.round}, {where}: {rates}", flush=True)


@contextmanager
def stage(server_url: str, options: Options, *, beside_sick: bool) -> "Iterator[Stage]":
    """Yield a fresh deployment with its targets up; all that was started is stopped in the end."""
    with Programs(options.folder) as programs:
        made = Stage(
            options=options,
            deployment=deployment.make(options.folder, server_url, options.name),
            programs=programs,
            ports={name: free_port(0) for name in ((*HEALTHY, *SICK) if beside_sick else HEALTHY)},
        )
        made.set_up()
        yield made


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One deployment and its targets."""

    options: Options
    deployment: Deployment
    programs: Programs
    ports: Mapping[str, int]

    def set_up(self) -> None:
        """Fill the source and start the targets."""
        self.deployment.configure(source=_SOURCE, targets=[self._file(name) for name in self.ports])
        with self.deployment.connect() as connection:
            connection.execute("create table orders (id bigint primary key)")
            self.deployment.migrate(self.programs)
            connection.execute(_FILL, [self.options.changes])
            connection.execute("vacuum analyze distributary.change_log")
        for name in self.ports:
            if name != "gone":
                self._start(name)

    def run(self, number: int) -> Run:
        """Run the job to its end, sick targets' patience included."""
        job = self.programs.start("isolation_job", EXECUTE, env=self.deployment.env)
        _wait(job)
        seen = {name: self._summary(name) for name in HEALTHY}
        for name, summary in seen.items():
            if summary["distinct"] != self.options.changes:
                raise ProgramFailed(f"{name} has {summary['distinct']:,} of its records. {job.last_words(40)}")
        return Run(
            round=number,
            beside_sick=len(self.ports) > len(HEALTHY),
            per_second={
                name: summary["distinct"] / (summary["last_at"] - summary["first_at"]) for name, summary in seen.items()
            },
        )

    def get_well(self) -> Sequence[Recovery]:
        """Let daemon and sensor find the sick still unwell once more, then cure them and watch."""
        self.programs.start("isolation_daemon", ["-m", "dagster._daemon", "run", *WORKSPACE], env=self.deployment.env)
        _until(lambda: all(state.failed_runs > 1 for state in self.states().values()), "the sensor comes back")
        states = self.states()
        well_at, now = time.monotonic(), datetime.now(UTC)
        self._start("gone")
        for name in ("hangs", "refuses"):
            httpx.post(f"{self._url(name)}/behaviour/well").raise_for_status()
        _until(lambda: all(self._summary(name)["distinct"] == self.options.changes for name in SICK), "they catch up")
        # What the targets have was to be settled, too.
        _until(lambda: all(state.done == self.options.changes for state in self.states().values()), "all is settled")
        after = self.states()
        recoveries = []
        for name in SICK:
            summary, retry_at = self._summary(name), states[name].retry_at
            recoveries.append(
                Recovery(
                    target=name,
                    held_back=(retry_at - now).total_seconds() if retry_at else 0.0,
                    until_first=summary["first_at"] - well_at,
                    until_everything=summary["last_at"] - well_at,
                    delivered=summary["distinct"],
                    dead=after[name].dead,
                )
            )
        return recoveries

    def states(self) -> "Mapping[str, State]":
        """Return how the sick stand in the ledger."""
        with self.deployment.connect() as connection, connection.cursor(row_factory=class_row(State)) as cursor:
            return {row.target: row for row in cursor.execute(_STATES, [list(SICK)])}

    def _file(self, name: str) -> Mapping[str, Any]:
        return {
            "name": name,
            "base_url": self._url(name),
            "timeout_seconds": min(5.0, self.options.patience),
            "max_in_flight": 4,
            "retry": {"initial_backoff": 0.1, "max_backoff": 5.0, "max_elapsed": self.options.patience},
            "circuit_breaker": {"error_timeout": 5.0},
            "routes": {"orders": {"upsert": {"path": "/orders", "batch": {"max_records": self.options.batch}}}},
        }

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def _start(self, name: str) -> None:
        behaviour = name if name in ("hangs", "refuses") else "well"
        arguments = ["--port", str(self.ports[name]), "--delay", str(self.options.delay), "--behaviour", behaviour]
        target = self.programs.start(f"isolation_{name}", ["-m", "benchmarks.target", *arguments], env={})
        target.wait_until_it_answers(f"{self._url(name)}/summary", seconds=20)

    def _summary(self, name: str) -> Any:
        return httpx.get(f"{self._url(name)}/summary").raise_for_status().json()


@dataclass(frozen=True, slots=True)
class State:
    """How one target stands."""

    target: str
    failed_runs: int
    retry_at: datetime | None
    done: int
    dead: int


_STATES = """
select target, failed_runs, retry_at, accepted + superseded + filtered + dead as done, dead
from distributary.target_state where target = any (%s)
"""


def _wait(job: Program) -> None:
    try:
        job.guard.wait(_LONGEST_RUN)
    except subprocess.TimeoutExpired:
        raise ProgramFailed(f"The job did not end within {_LONGEST_RUN:.0f} s. {job.last_words(40)}") from None


def _until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LONGEST_RECOVERY
    while not done():
        if time.monotonic() > deadline:
            raise ProgramFailed(f"Waited {_LONGEST_RECOVERY:.0f} s and in vain: {what}.")
        time.sleep(0.1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProgramFailed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
