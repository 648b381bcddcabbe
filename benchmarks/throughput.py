"""How many records a second, at what cost? `python -m benchmarks.throughput` drains the same backlog again and again.

Each case is a fresh database, the receiver (benchmarks/receiver.py) in one process and each target's `drain()` in
another, as `delivery_job` has it. The clock runs from the moment that all drains are told to begin until the last
has everything settled. What arrived is examined afterwards: nothing missing, nothing repeated, no id out of order.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg

from benchmarks.workload import TABLE, Workload, fill
from demo.processes import ROOT, ProgramFailed, Programs, free_port
from soak import deployment
from soak.deployment import EXECUTE, drop_database, make_database, server

FOLDER = ROOT / ".data" / "benchmarks"
DATABASE = "distributary_bench_throughput"
_LONGEST = 600.0


class NotDelivered(Exception):
    """A benchmark's target does not have what it should: the numbers mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What delivering one workload took. CPU is in seconds, memory in bytes."""

    sender: str
    workload: Workload
    seconds: float
    sending_seconds: float
    """From the first request of all to the last answer, as the receiver saw it."""
    sender_cpu: float
    """0 where it is not measured; so is `peak_bytes`."""
    database_cpu: float
    receiver_cpu: float
    peak_bytes: int
    """Of the largest of the sender's processes; of a peer's, all together."""
    verdicts: Mapping[str, Mapping[str, int]] = field(repr=False)

    @property
    def per_second(self) -> float:
        """Records accepted a second, over all targets."""
        return self.workload.deliveries / self.seconds

    @property
    def cpu_per_100k(self) -> float:
        """The sender's own CPU seconds for 100,000 records; the database's are counted apart."""
        return self.sender_cpu * 100_000 / self.workload.deliveries

    @property
    def of_most(self) -> float:
        """The share of what latency and requests in flight allow; 0 without latency."""
        return self.per_second / self.workload.most

    def count(self, what: str) -> int:
        """Return one of the verdict's counts over all targets."""
        return sum(verdict[what] for verdict in self.verdicts.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers; returns 0 if every record arrived once and in order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("--changes", type=int, default=Workload().changes)
    parser.add_argument("--targets", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.05], help="seconds")
    parser.add_argument("--variant", nargs="+", default=["rows", "template"], choices=["rows", "template"])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[Workload().in_flight])
    parser.add_argument("--batch", type=int, nargs="+", default=[Workload().batch])
    parser.add_argument("--rounds", type=int, default=3, help="of each case; the median round is shown")
    parser.add_argument("--job", action="store_true", help="each case by `dagster job execute` too")
    parser.add_argument("--json", type=Path, default=FOLDER / "throughput.json", help="where the numbers go")
    chosen = parser.parse_args(arguments)
    cases = [
        Workload(
            changes=chosen.changes,
            targets=targets,
            latency=latency,
            variant=variant,
            in_flight=in_flight,
            batch=batch,
        )
        for variant in chosen.variant
        for latency in chosen.latency
        for targets in chosen.targets
        for in_flight in chosen.in_flight
        for batch in chosen.batch
    ]
    results = []
    with server() as server_url:
        for case in cases:
            print(_told(result := median_of(chosen.rounds, server_url, case)), flush=True)
            results.append(result)
        for case in cases if chosen.job else ():
            print(_told(result := measure_job(server_url, case)), flush=True)
            results.append(result)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps([as_json(result) for result in results], indent=1))
    print(f"Every number is in {chosen.json}.")
    return 0


def median_of(rounds: int, server_url: str, workload: Workload, *, folder: Path = FOLDER) -> Measured:
    """Measure *workload* several times; return the round of median speed."""
    found = sorted((measure(server_url, workload, folder=folder) for _ in range(rounds)), key=lambda one: one.seconds)
    return found[statistics.median_low(range(rounds))]


def measure(server_url: str, workload: Workload, *, folder: Path = FOLDER, database: str = DATABASE) -> Measured:
    """Deliver *workload* from a fresh database; raises NotDelivered."""
    folder.mkdir(parents=True, exist_ok=True)
    database_url = make_database(server_url, database)
    try:
        fill(database_url, workload)
        register(database_url, workload)
        with receiver(folder, latency=workload.latency) as url:
            measured = _drain(database_url, url, workload)
    finally:
        drop_database(server_url, database)
    refuse_unless_delivered(measured)
    return measured


def measure_job(server_url: str, workload: Workload, *, folder: Path = FOLDER, name: str = "bench_job") -> Measured:
    """Deliver *workload* by `dagster job execute`, from its start to its exit; raises NotDelivered."""
    folder.mkdir(parents=True, exist_ok=True)
    made = deployment.make(folder, server_url, name)
    try:
        fill(made.database_url, workload)
        with receiver(folder, latency=workload.latency) as url, database_cpu(made.database_url) as used:
            files = [workload.target_file(target, url) for target in workload.names]
            made.configure(source={"tables": {"orders": {"key": "id"}}}, targets=files)
            with made.connect() as connection:
                connection.execute(TABLE)
            with Programs(folder) as programs:
                made.migrate(programs)
            started, at_receiver = time.monotonic(), seen(url)
            with (folder / "job.log").open("wb") as log:
                code = subprocess.run(
                    [sys.executable, *EXECUTE], env=os.environ | made.env, cwd=ROOT, stdout=log, stderr=log
                ).returncode
            seconds = time.monotonic() - started
            if code:
                raise ProgramFailed(f"the job ended with exit code {code}; see {folder / 'job.log'}")
            found = seen(url)
            measured = Measured(
                sender="distributary, by delivery_job",
                workload=workload,
                seconds=seconds,
                sending_seconds=sending_seconds(found),
                sender_cpu=0.0,  # what its forked steps use is nobody's to read once they are gone
                database_cpu=used(),
                receiver_cpu=found["cpu_seconds"] - at_receiver["cpu_seconds"],
                peak_bytes=0,
                verdicts=verdicts(url, workload),
            )
    finally:
        deployment.drop(server_url, name)
    refuse_unless_delivered(measured)
    return measured


def register(database_url: str, workload: Workload) -> None:
    """Make the targets known to the ledger, to be given everything there is."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("insert into distributary.target_state (target) select unnest(%s::text[])", [workload.names])


@contextmanager
def receiver(
    folder: Path, *, latency: float = 0.0, refuse: int = 0, lose_answer: int = 0, hang: int = 0
) -> Iterator[str]:
    """Yield the URL of a receiver that is up until the context ends."""
    port = free_port(0)
    faults = ["--refuse", str(refuse), "--lose-answer", str(lose_answer), "--hang", str(hang)]
    options = ["--latency", str(latency), *faults]
    with Programs(folder) as programs:
        program = programs.start("receiver", ["-m", "benchmarks.receiver", "--port", str(port), *options], env={})
        program.wait_until_it_answers(f"http://127.0.0.1:{port}/seen", seconds=20)
        yield f"http://127.0.0.1:{port}"


def sending_seconds(found: Any) -> float:
    """Return the seconds from the first request of all to the last answer."""
    targets = found["targets"].values()
    return float(max(one["last_at"] for one in targets) - min(one["first_at"] for one in targets))


def seen(url: str) -> Any:
    """Return what the receiver counted."""
    return httpx.get(f"{url}/seen", timeout=60).raise_for_status().json()


def verdicts(url: str, workload: Workload) -> Mapping[str, Mapping[str, int]]:
    """Have the receiver examine what came; per target, by the names in `benchmarks.receiver.Verdict`."""
    asked = f"{url}/verdict?ids={workload.ids}&versions={workload.versions}"
    found: Mapping[str, Mapping[str, int]] = httpx.get(asked, timeout=_LONGEST).raise_for_status().json()
    return found


def refuse_unless_delivered(measured: Measured) -> None:
    """Raise NotDelivered unless each target has everything, once and in order."""
    if sorted(measured.verdicts) != sorted(measured.workload.names):
        raise NotDelivered(f"only {sorted(measured.verdicts)} were sent anything")
    for name, verdict in measured.verdicts.items():
        wrong = {what: number for what, number in verdict.items() if number and what != "records"}
        if wrong:
            raise NotDelivered(f"{measured.sender}: {name} has {wrong} of {measured.workload}")


@contextmanager
def database_cpu(database_url: str) -> Iterator[Callable[[], float]]:
    """Yield what returns the CPU seconds that the server's processes, but for this session's, used since."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        own = connection.info.backend_pid
        postmaster = psutil.Process(own).parent()
        assert postmaster is not None

        def total() -> float:
            ended = postmaster.cpu_times()
            found: float = ended.children_user + ended.children_system
            for process in [postmaster, *postmaster.children()]:
                with suppress(psutil.Error):  # it ended while we looked: the postmaster has its time
                    used = process.cpu_times()
                    found += (used.user + used.system) * (process.pid != own)
            return found

        before = total()
        yield lambda: total() - before


def as_json(measured: Measured) -> dict[str, Any]:
    """Return all numbers, the derived ones too."""
    derived = {
        "per_second": measured.per_second,
        "cpu_per_100k": measured.cpu_per_100k,
        "of_most": measured.of_most,
    }
    return asdict(measured) | derived


def _drain(database_url: str, url: str, workload: Workload) -> Measured:
    drains = [_Drain(database_url, workload.target_file(name, url)) for name in workload.names]
    try:
        for one in drains:
            one.expect("ready")
        with database_cpu(database_url) as used:
            before = seen(url)["cpu_seconds"]
            for one in drains:
                one.tell("go")
            found = [json.loads(one.line()) for one in drains]
            cpu_of_database = used()
            at_receiver = seen(url)
    finally:
        for one in drains:
            one.stop()
    for one in found:
        if one["end"] != "caught_up":
            raise NotDelivered(f"a drain ended as {one['end']}: {one['reason']}")
    return Measured(
        sender="distributary",
        workload=workload,
        seconds=max(one["ended"] for one in found) - min(one["started"] for one in found),
        sending_seconds=sending_seconds(at_receiver),
        sender_cpu=sum(one["cpu_seconds"] for one in found),
        database_cpu=cpu_of_database,
        receiver_cpu=at_receiver["cpu_seconds"] - before,
        peak_bytes=max(one["peak_bytes"] for one in found),
        verdicts=verdicts(url, workload),
    )


class _Drain:
    """One process of benchmarks/drainer.py."""

    def __init__(self, database_url: str, target_file: Mapping[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.drainer", database_url, json.dumps(target_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProgramFailed(f"a drain's process ended with exit code {self._process.wait(10)}")
        return line.strip()

    def expect(self, word: str) -> None:
        found = self.line()
        assert found == word, found

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _told(one: Measured) -> str:
    work, scale = one.workload, 100_000 / one.workload.deliveries
    share = f", {one.of_most:.0%} of the most" if work.latency else ""
    own = f"CPU s per 100k {one.cpu_per_100k:.2f}, peak {one.peak_bytes / 1e6:.0f} MB; " if one.sender_cpu else ""
    return (
        f"{one.sender}, {work.variant}, {work.targets} targets, {work.latency * 1000:g} ms, "
        f"{work.in_flight} in flight, {work.batch} a request: {one.per_second:,.0f} records/s{share} "
        f"(while sending {work.deliveries / one.sending_seconds:,.0f}); {own}"
        f"database {one.database_cpu * scale:.2f}, receiver {one.receiver_cpu * scale:.2f}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ProgramFailed, NotDelivered) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is left running.")
