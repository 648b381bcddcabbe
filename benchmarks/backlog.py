"""Does a drain's memory grow with the backlog? `make bench-backlog` drains 10,000, 100,000 and 2,000,000 changes.

Each backlog is drained by one `drain()` in a process of its own, from a fresh database, to a target that only counts.
What is compared is the most memory that the process ever had (its peak resident set size).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
import psycopg

from demo.processes import ROOT, Program, ProgramFailed, Programs, free_port
from pipelines.delivery.catalog import policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.routing import compile_routes
from resources.http_target import HttpTargetClient, endpoint
from resources.migrate import apply_migrations
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock
from soak.curve import sparkline
from soak.deployment import drop_database, make_database, server

FOLDER = ROOT / ".data" / "benchmarks"
SIZES = (10_000, 100_000, 2_000_000)
DATABASE = "distributary_bench_backlog"
_SAMPLE_SECONDS = 0.05
_LONGEST = 3600.0
_MEGABYTE = 1_000_000

_FILL = """
insert into distributary.change_log (stream, key, operation, payload)
select 'orders', i::text, 'insert',
       jsonb_build_object('id', i, 'customer', i %% 1000, 'note', repeat(md5(i::text), 6), 'cents', i * 7)
from generate_series(1, %s) as i
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """What draining one backlog took."""

    changes: int
    seconds: float
    idle_bytes: int
    """Resident before the first change was read."""
    peak_bytes: int
    curve_bytes: Sequence[int] = field(repr=False)
    """Resident, twenty times a second."""
    delivered: int
    """Distinct records that the target has."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers; returns 0 if every record arrived."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backlog", description=__doc__.partition("\n")[0])
    parser.add_argument("--changes", type=int, nargs="+", default=SIZES, help="sizes of the backlogs, smallest first")
    parser.add_argument("--json", type=Path, default=FOLDER / "backlog.json", help="where the numbers go")
    parser.add_argument("--drain", nargs=2, metavar=("DATABASE_URL", "TARGET_URL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.drain:
        print(json.dumps(_drain_here(*chosen.drain)))
        return 0
    results = measure(chosen.changes)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(report(results))
    print(f"Every number and the curves are in {chosen.json}.")
    return 0 if all(result.delivered == result.changes for result in results) else 1


def measure(sizes: Sequence[int], *, folder: Path = FOLDER, database: str = DATABASE) -> list[Drained]:
    """Drain a backlog of each of *sizes*; logs go to *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with server() as server_url:
        for size in sizes:
            print(f"Draining {size:,} pending changes …", flush=True)
            url = make_database(server_url, database)
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    apply_migrations(connection)
                    connection.execute(_FILL, [size])
                    connection.execute("vacuum analyze distributary.change_log")
                results.append(_measure_one(url, size, folder))
            finally:
                drop_database(server_url, database)
    return results


def report(results: Sequence[Drained]) -> str:
    """Return the table, the curves and the ratios."""
    lines = [f"{'pending':>10} {'seconds':>8} {'changes/s':>10} {'idle MB':>8} {'peak MB':>8} {'of the smallest':>16}"]
    smallest = results[0].peak_bytes
    for one in results:
        lines.append(
            f"{one.changes:>10,} {one.seconds:>8.1f} {one.changes / one.seconds:>10,.0f} "
            f"{one.idle_bytes / _MEGABYTE:>8.1f} {one.peak_bytes / _MEGABYTE:>8.1f} {one.peak_bytes / smallest:>16.2f}"
        )
    lines += [
        f"{one.changes:>10,} {sparkline(one.curve_bytes)} 0 to {max(one.curve_bytes) / _MEGABYTE:.0f} MB"
        for one in results
    ]
    return "\n".join(lines)


def _measure_one(database_url: str, size: int, folder: Path) -> Drained:
    port = free_port(0)
    with Programs(folder) as programs:
        target = programs.start("backlog_target", ["-m", "benchmarks.target", "--port", str(port)], env={})
        url = f"http://127.0.0.1:{port}"
        target.wait_until_it_answers(f"{url}/summary", seconds=20)
        drainer = programs.start("backlog_drain", ["-m", "benchmarks.backlog", "--drain", database_url, url], env={})
        found = json.loads(_output_of(drainer))
        delivered = httpx.get(f"{url}/summary").json()["distinct"]
    return Drained(changes=size, delivered=delivered, **found)


def _output_of(program: Program) -> str:
    try:
        code = program.guard.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        raise ProgramFailed(f"{program.name} should have ended well and did not: {code}. {program.last_words()}")
    return program.log.read_text().splitlines()[-1]


# In the process that is measured -------------------------------------------------------------------------------------


def _drain_here(database_url: str, target_url: str) -> dict[str, float | int | list[int]]:
    config = TargetConfig.model_validate(
        {
            "name": "counter",
            "base_url": target_url,
            "routes": {"orders": {"upsert": {"path": "/orders", "batch": {"max_records": 100}}}},
        }
    )
    ledger = PostgresLedger(database_url)
    ledger.register({config.name: "beginning"})
    where = endpoint(config, lambda name: name)
    HttpTargetClient(where).close()  # the certificates are read once, and are no part of the backlog
    me, curve, over = psutil.Process(os.getpid()), [], threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            curve.append(me.memory_info().rss)

    idle = me.memory_info().rss
    curve.append(idle)
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    started = time.monotonic()
    with ledger.open_target(config.name, run_id="benchmark") as opened:
        assert opened is not None
        report = drain(
            policy=policy_of(config),
            routes=compile_routes(config),
            ledger=opened,
            connect=lambda: HttpTargetClient(where),
            clock=SystemClock(),
            limits=DrainLimits(),
        )
    seconds = time.monotonic() - started
    over.set()
    sampler.join()
    assert report.end == "caught_up", report
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"seconds": seconds, "idle_bytes": idle, "peak_bytes": peak, "curve_bytes": curve}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProgramFailed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
