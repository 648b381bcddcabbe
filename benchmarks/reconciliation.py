"""What does it cost to compare a target with the source? `make bench-reconciliation`: up to a million.

Each size is reconciled once, and what differs repaired, in a process of its own, from a fresh database, against a
target that lists over HTTP. What is compared is the time, and the most memory that the process ever had (its peak
resident set size). One record of a thousand is missing, one stale and one extra: who finds none measures nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import psycopg

from benchmarks.listing import Listed
from demo.processes import ROOT, Program, ProgramFailed, Programs, free_port
from pipelines.changes.config import SourceConfig
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.routing import compile_routes
from pipelines.reconciliation.guard import Limits
from pipelines.reconciliation.meaning import meaning_of
from pipelines.reconciliation.reconcile import Reconciliation
from pipelines.reconciliation.subject import reader_of, subject_of
from resources.capture import install_capture
from resources.http_target import HttpTargetClient, endpoint
from resources.migrate import apply_migrations
from resources.postgres_ledger import PostgresLedger
from resources.postgres_workspace import PostgresWorkspaces
from resources.system_clock import SystemClock
from soak.deployment import drop_database, make_database, server

FOLDER = ROOT / ".data" / "benchmarks"
SIZES = (10_000, 100_000, 1_000_000)
DATABASE = "distributary_bench_reconciliation"
_LONGEST = 3600.0
_MEGABYTE = 1_000_000
_SOURCE = SourceConfig.model_validate({"tables": {"orders": {"key": "id"}}})

_TABLE = """
create table orders (id bigint primary key, customer integer, note text, cents bigint, paid boolean, rank integer)
"""
_FILL = """
insert into orders
select i, i %% 1000, repeat(lpad(to_hex(i), 32, '0'), 4), i * 7, i %% 3 = 0, case when i %% 5 <> 0 then i %% 11 end
from generate_series(1, %s) as i
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What reconciling one size took."""

    records: int
    listing_seconds: float
    comparing_seconds: float
    repairing_seconds: float
    idle_bytes: int
    """Resident before the first page."""
    peak_bytes: int
    found: tuple[int, int, int]
    """Missing, stale, extra."""
    repaired: int

    @property
    def right(self) -> bool:
        """Whether it found and repaired what there is."""
        each = Listed(records=self.records).each
        return self.found == (each, each, each) and self.repaired == 3 * each

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.listing_seconds + self.comparing_seconds + self.repairing_seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers; returns 0 if all was found and repaired that differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconciliation", description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=SIZES, help="sizes, smallest first")
    parser.add_argument("--json", type=Path, default=FOLDER / "reconciliation.json", help="where the numbers go")
    parser.add_argument("--reconcile", nargs=2, metavar=("DATABASE_URL", "TARGET_URL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.reconcile:
        print(json.dumps(_reconcile_here(*chosen.reconcile)))
        return 0
    results = measure(chosen.records)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(report(results))
    return 0 if all(result.right for result in results) else 1


def measure(sizes: Sequence[int], *, folder: Path = FOLDER, database: str = DATABASE) -> list[Measured]:
    """Reconcile each of *sizes*; logs go to *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with server() as server_url:
        for size in sizes:
            print(f"Reconciling {size:,} records …", flush=True)
            url = make_database(server_url, database)
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    apply_migrations(connection)
                    connection.execute(_TABLE)
                    connection.execute(_FILL, [size])  # before it is captured: the log stays empty
                    connection.execute("vacuum analyze orders")
                    install_capture(connection, _SOURCE)
                results.append(_measure_one(url, size, folder))
            finally:
                drop_database(server_url, database)
    return results


def report(results: Sequence[Measured]) -> str:
    """Return the table."""
    lines = [
        f"{'records':>10} {'listing s':>10} {'comparing s':>12} {'repair s':>9} {'records/s':>10} {'idle MB':>8} "
        f"{'peak MB':>8} {'found and repaired':>20}"
    ]
    lines += [
        f"{one.records:>10,} {one.listing_seconds:>10.1f} {one.comparing_seconds:>12.1f} {one.repairing_seconds:>9.1f} "
        f"{one.records / one.seconds:>10,.0f} {one.idle_bytes / _MEGABYTE:>8.1f} {one.peak_bytes / _MEGABYTE:>8.1f} "
        f"{'all' if one.right else f'{one.found}, {one.repaired}':>20}"
        for one in results
    ]
    return "\n".join(lines)


def _measure_one(database_url: str, size: int, folder: Path) -> Measured:
    port = free_port(0)
    with Programs(folder) as programs:
        serve = ["-m", "benchmarks.listing", "--port", str(port), "--records", str(size)]
        target = programs.start("reconciliation_target", serve, env={})
        url = f"http://127.0.0.1:{port}"
        target.wait_until_it_answers(f"{url}/orders", seconds=20)
        command = ["-m", "benchmarks.reconciliation", "--reconcile", database_url, url]
        found = json.loads(_output_of(programs.start("reconciliation", command, env={})))
    return Measured(records=size, **{**found, "found": tuple(found["found"])})


def _output_of(program: Program) -> str:
    try:
        code = program.guard.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        raise ProgramFailed(f"{program.name} should have ended well and did not: {code}. {program.last_words()}")
    return program.log.read_text().splitlines()[-1]


# In the process that is measured -------------------------------------------------------------------------------------


def _reconcile_here(database_url: str, target_url: str) -> dict[str, object]:
    page = {"style": "cursor", "parameter": "after", "next": "$.next", "size": 1000, "size_parameter": "limit"}
    config = TargetConfig.model_validate(
        {
            "name": "orders",
            "base_url": target_url,
            "routes": {
                "orders": {
                    "upsert": {"path": "/orders"},
                    "delete": {"path": "/orders/${_key}"},
                    "read": {"path": "/orders", "items": "$.items", "key": "id", "total": "$.total", "page": page},
                    "reconcile": {"repair": "all", "delete_extra": True},
                }
            },
        }
    )
    PostgresLedger(database_url).register({config.name: "beginning"})
    subject = subject_of(config, "orders", compile_routes(config))
    clock = SystemClock()
    client = HttpTargetClient(endpoint(config, lambda name: name))
    idle = psutil.Process(os.getpid()).memory_info().rss
    started = time.monotonic()
    with PostgresWorkspaces(database_url, _SOURCE).open("orders", "orders", run_id="benchmark") as workspace:
        outcome = Reconciliation(
            subject=subject,
            workspace=workspace,
            reader=reader_of(config, client, clock, None),
            meaning=meaning_of(config, "orders", _SOURCE.tables["orders"], loaded=False),
            limits=Limits.of(subject.settings),
            now=clock.now(),
        ).run()
    seconds = time.monotonic() - started
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "listing_seconds": outcome.listing_seconds,
        "comparing_seconds": outcome.comparing_seconds,
        "repairing_seconds": seconds - outcome.listing_seconds - outcome.comparing_seconds,
        "idle_bytes": idle,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "found": (outcome.count("missing"), outcome.count("stale"), outcome.count("extra")),
        "repaired": outcome.appended.snapshots + outcome.appended.deletes,
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProgramFailed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
