"""How fast, at what cost: each sender delivers the same from a fresh database to the same receiver."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

from benchmarks.peers.broker import redis
from benchmarks.peers.roster import REDIS
from benchmarks.peers.running import OURS, Delivery, Sender, Setting
from benchmarks.peers.usage import Usage
from benchmarks.throughput import (
    Measured,
    NotDelivered,
    database_cpu,
    receiver,
    register,
    seen,
    sending_seconds,
    verdicts,
)
from benchmarks.workload import Workload, fill
from soak.deployment import drop_database, make_database

DATABASE = "distributary_bench_peers"
_LONGEST = 600.0
MARKS = "create table peer_mark (target text primary key, change_id bigint not null)"


def prepare(database_url: str, workload: Workload) -> None:
    """Make, in an empty database, the changes, the ledger's targets and the peers' marks."""
    fill(database_url, workload)
    register(database_url, workload)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(MARKS)


def measure(sender: Sender, server_url: str, workload: Workload, *, folder: Path, database: str = DATABASE) -> Measured:
    """Have *sender* deliver *workload*; raises NotDelivered if anything is missing, ProgramFailed if it ends."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with setting_of(sender, server_url, workload, folder=folder, database=database) as setting:
        with Delivery(sender, setting) as delivery, database_cpu(setting.database_url) as used:
            before, stored = seen(setting.url)["cpu_seconds"], Usage()
            with stored.watching(setting.broker_pids):
                said = delivery.deliver(_LONGEST)
            cpu_of_database, found = used(), seen(setting.url)
        measured = Measured(
            sender=sender.name,
            workload=workload,
            seconds=delivery.seconds,
            sending_seconds=sending_seconds(found),
            sender_cpu=delivery.usage.cpu_seconds,
            database_cpu=cpu_of_database + stored.cpu_seconds,
            receiver_cpu=found["cpu_seconds"] - before,
            peak_bytes=delivery.usage.peak_bytes,
            verdicts=verdicts(setting.url, workload),
        )
    if ends := {str(one["end"]) for one in said} - {"caught_up"}:
        raise NotDelivered(f"{sender.name} ended as {', '.join(ends)}")
    if sorted(measured.verdicts) != sorted(workload.names) or measured.count("missing"):
        raise NotDelivered(f"{sender.name}: {measured.count('missing')} records are missing of {workload}")
    return measured


@contextmanager
def setting_of(
    sender: Sender,
    server_url: str,
    workload: Workload,
    *,
    folder: Path,
    database: str = DATABASE,
    faults: Mapping[str, int] = {},
    timeout: float = 15.0,
) -> Iterator[Setting]:
    """Yield a fresh database with *workload*, a receiver, and a broker if *sender* needs one."""
    with ExitStack() as until_the_end:
        database_url = make_database(server_url, database)
        until_the_end.callback(drop_database, server_url, database)
        prepare(database_url, workload)
        url = until_the_end.enter_context(receiver(folder, latency=workload.latency, **faults))
        needs_broker = sender.peer is not None and REDIS in sender.peer.programs
        broker = until_the_end.enter_context(redis(folder / "redis")) if needs_broker else None
        yield Setting(
            workload=workload,
            database_url=database_url,
            url=url,
            folder=folder / "sender",
            timeout=timeout,
            broker_url=broker.url if broker else None,
            broker_pids=[broker.pid] if broker else [],
        )


def table(rows: Sequence[Sequence[Measured]]) -> str:
    """Return one line for each sender: its measurements at no latency, and its shares of what latency allows."""
    columns = [f"{one.workload.targets} targets, {one.workload.latency * 1000:g} ms" for one in rows[0]]
    first = next(row[0] for row in rows if row[0].sender == OURS)
    lines = [
        f"{columns[0]}, then the share of the most at {' and '.join(columns[1:])}",
        f"{'':<42} {'records/s':>10} {'CPU-s per 100k':>15} {'database':>9} {'peak MB':>8} "
        f"{' '.join(f'{one:>17}' for one in columns[1:])} {'ours is':>8} {'CPU':>6} {'stale':>7}",
    ]
    for row in rows:
        one = row[0]
        shares = " ".join(f"{each.of_most:>16.0%} " for each in row[1:])
        own = (f"{one.cpu_per_100k:.2f}", f"{one.peak_bytes / 1e6:.0f}") if one.sender_cpu else ("", "")
        more = f"{one.cpu_per_100k / first.cpu_per_100k:.1f}x" if one.sender_cpu else ""
        lines.append(
            f"{one.sender:<42} {one.per_second:>10,.0f} {own[0]:>15} "
            f"{one.database_cpu * 100_000 / one.workload.deliveries:>9.2f} {own[1]:>8} {shares}"
            f"{first.per_second / one.per_second:>7.1f}x {more:>6} {max(each.count('stale') for each in row):>7,}"
        )
    return "\n".join(lines)
