"""How soon is a change at the target, and what does a run cost? `make bench-latency` measures three things.

    warm  the daemon, the sensor and a run that lingers are up: from a commit until the target has the change
    cold  no run is up: the same, with the sensor's tick, the run's start and the step's start in it
    wide  `dagster job execute` with 10 changes for each of 1, 10 and 50 targets: time and CPU

One machine, so one clock: a change's row says when it was written, in the transaction that commits it, and the target
says when the last byte of its request was there.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from demo.processes import ROOT, ProgramFailed, Programs
from soak import deployment
from soak.deployment import EXECUTE, WORKSPACE, Deployment, server

FOLDER = ROOT / ".data" / "benchmarks"
_PATIENCE = 180.0
_SOURCE: Mapping[str, Any] = {"tables": {"orders": {"key": "id"}}}
_WRITE = "insert into orders values (%s, extract(epoch from clock_timestamp()))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """Seconds from a change's commit until the target had it."""

    kind: str
    seconds: Sequence[float]

    def quantile(self, fraction: float) -> float:
        """Return the delay that *fraction* of the changes did not exceed."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wide:
    """One command that delivered a few changes to many targets."""

    targets: int
    seconds: float
    cpu_seconds: float
    """Of the command, and of the process that its steps are forked from, with theirs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.partition("\n")[0])
    parser.add_argument("--warm", type=int, default=200, help="changes, one after another; 0 leaves it out")
    parser.add_argument("--cold", type=int, default=5, help="changes, each when no run is up; 0 leaves it out")
    parser.add_argument("--wide", type=int, nargs="*", default=[1, 10, 50], help="targets")
    parser.add_argument("--json", type=Path, default=FOLDER / "latency.json", help="where the numbers go")
    chosen = parser.parse_args(arguments)
    delays: list[Delays] = []
    with server() as server_url:
        if chosen.warm or chosen.cold:
            delays = measure_delays(server_url, warm=chosen.warm, cold=chosen.cold)
            print(report_delays(delays), flush=True)
        wides = [measure_wide(server_url, targets) for targets in chosen.wide]
        if wides:
            print(report_wide(wides))
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"delays": [asdict(one) for one in delays], "wide": [asdict(one) for one in wides]}
    chosen.json.write_text(json.dumps(found, indent=1))
    print(f"The numbers are in {chosen.json}.")
    return 0


# From a commit to the target -----------------------------------------------------------------------------------------


def measure_delays(server_url: str, *, warm: int, cold: int, name: str = "bench_latency") -> list[Delays]:
    """Have the daemon and its sensor deliver single changes: *cold* ones first, then *warm* ones."""
    folder = FOLDER / "latency"
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Delays] = []
    try:
        made = deployment.make(folder, server_url, name)
        with receiver() as (url, arrived), Programs(folder) as programs:
            _set_up(made, programs, [_target("steady", url)])
            programs.start("latency_daemon", ["-m", "dagster._daemon", "run", *WORKSPACE], env=made.env)
            change = 0
            with made.connect() as connection:

                def deliver() -> float:
                    nonlocal change
                    change += 1
                    connection.execute(_WRITE, [change])
                    _wait_until(lambda: change in arrived, f"change {change} is at the target")
                    return arrived[change]

                def idle() -> bool:
                    locks = "select count(*) from pg_locks where locktype = 'advisory' and classid = 1684632436"
                    return connection.execute(locks).fetchone() == (0,)

                colds = []
                for _ in range(cold):
                    colds.append(deliver())
                    _wait_until(idle, "the run has ended")
                    # The run's process is gone then, and the commit comes at any moment of the daemon's round.
                    time.sleep(6 + random.uniform(0, 5))
                if cold:
                    found.append(Delays(kind="cold", seconds=colds))
                if warm:
                    deliver()
                    warms = []
                    for _ in range(warm):
                        time.sleep(0.037)  # out of step with the drain's polling
                        warms.append(deliver())
                    found.append(Delays(kind="warm", seconds=warms))
    finally:
        deployment.drop(server_url, name)
    return found


def report_delays(delays: Sequence[Delays]) -> str:
    """Return the table."""
    lines = ["", f"{'commit to target':>17} {'changes':>8} {'p50 (s)':>8} {'p99 (s)':>8} {'most (s)':>9}"]
    lines += [
        f"{one.kind:>17} {len(one.seconds):>8} {one.quantile(0.5):>8.3f} {one.quantile(0.99):>8.3f} "
        f"{max(one.seconds):>9.3f}"
        for one in delays
    ]
    return "\n".join(lines)


# Many targets ---------------------------------------------------------------------------------------------------------


def measure_wide(server_url: str, targets: int, *, changes: int = 10, name: str = "bench_wide") -> Wide:
    """Time one `dagster job execute` that brings *changes* to each of *targets*."""
    print(f"Delivering {changes} changes to each of {targets} targets …", flush=True)
    folder = FOLDER / "wide"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        made = deployment.make(folder, server_url, name)
        with receiver() as (url, arrived), Programs(folder) as programs:
            _set_up(made, programs, [_target(f"target_{i:02}", f"{url}/{i}") for i in range(targets)])
            with made.connect() as connection:
                for change in range(changes):
                    connection.execute(_WRITE, [change])
            out, err = folder / "stdout", folder / "stderr"
            started = time.monotonic()
            with out.open("w") as stdout, err.open("w") as stderr:
                command = subprocess.Popen(
                    [sys.executable, *EXECUTE],
                    cwd=ROOT,
                    env={**os.environ, **made.env},
                    stdout=stdout,
                    stderr=stderr,
                )
                cpu_seconds = _cpu_until_it_ends(command)
            seconds = time.monotonic() - started
            if command.returncode or len(arrived) != changes:
                raise ProgramFailed(f"`dagster job execute` did not deliver everything. {err.read_text()[-2000:]}")
            delivered = sum(line.count(f" {changes} delivered") for line in out.read_text().splitlines())
            assert delivered == targets, out.read_text()
    finally:
        deployment.drop(server_url, name)
    return Wide(targets=targets, seconds=seconds, cpu_seconds=cpu_seconds)


def _cpu_until_it_ends(command: subprocess.Popen[bytes]) -> float:
    """Wait for *command*; return its CPU seconds and its children's, with those of theirs that they have waited for.

    Whatever forks the steps is left to end by itself, so nobody is told at the end: it is looked at until then.
    """
    found: dict[int, float] = {}
    while command.poll() is None:
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(command.pid)
            for process in (main, *main.children()):
                with suppress(psutil.NoSuchProcess):
                    found[process.pid] = sum(process.cpu_times()[:4])  # its own, and of children that have ended
        time.sleep(0.05)
    return sum(found.values())


def report_wide(wides: Sequence[Wide]) -> str:
    """Return the table, with how much longer each target more takes than the first command."""
    lines = ["", f"{'targets':>8} {'seconds':>8} {'CPU s':>7} {'s for each target more':>23}"]
    first = wides[0]
    for one in wides:
        more = (one.seconds - first.seconds) / max(1, one.targets - first.targets)
        lines.append(f"{one.targets:>8} {one.seconds:>8.1f} {one.cpu_seconds:>7.1f} {more:>23.2f}")
    return "\n".join(lines)


# What both need ------------------------------------------------------------------------------------------------------


def _target(name: str, url: str) -> Mapping[str, Any]:
    batch = {"path": "/orders", "batch": {"max_records": 100}}
    return {"name": name, "base_url": url, "start": "beginning", "routes": {"orders": {"upsert": batch}}}


def _set_up(made: Deployment, programs: Programs, targets: Sequence[Mapping[str, Any]]) -> None:
    with made.connect() as connection:
        connection.execute("create table orders (id bigint primary key, written_at float8 not null)")
    made.configure(source=_SOURCE, targets=targets)
    made.migrate(programs)


def _wait_until(true: Any, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise ProgramFailed(f"Within {_PATIENCE:.0f} s it did not come about that {what}.")
        time.sleep(0.002)


@contextmanager
def receiver() -> Iterator[tuple[str, Mapping[int, float]]]:
    """Yield the URL of a target that takes everything, and how many seconds each change took, by id."""
    arrived: dict[int, float] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            now = time.time()
            for record in json.loads(body):
                arrived.setdefault(record["id"], now - record["written_at"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}", arrived
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProgramFailed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
