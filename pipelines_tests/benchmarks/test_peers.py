"""The peers with next to no work: does everything arrive, is the mark kept, and is it an error if something is missing?

Only those peers are run that need nothing but what this environment has.
"""

import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest

from benchmarks.peers import broker, faults, roster, speed
from benchmarks.peers.roster import PEERS, REDIS, REQUIREMENTS
from benchmarks.peers.running import OURS, Sender, senders
from benchmarks.peers.script import Mark
from benchmarks.peers.usage import Usage
from benchmarks.throughput import Measured, NotDelivered
from benchmarks.workload import Workload
from demo.processes import ProgramFailed

HERE = ("httpx_threads", "tuned_asyncio", "dagster_asset")
SENDERS = senders([peer for peer in PEERS if peer.module in HERE], python=sys.executable)
WORK = Workload(changes=1200, targets=2, batch=10, in_flight=3)


def fresh() -> str:
    return f"peers_{uuid4().hex[:8]}"


@pytest.mark.integration
@pytest.mark.parametrize("sender", SENDERS, ids=lambda sender: sender.name)
def test_everything_arrives_from_everybody(sender: Sender, postgres_url: str, tmp_path: Path) -> None:
    found = speed.measure(sender, postgres_url, WORK, folder=tmp_path, database=fresh())

    assert (found.count("records"), found.count("missing"), found.count("repeats")) == (2400, 0, 0)
    # The kernel counts in hundredths of a second, and the barest of them is through with so little in less.
    assert found.sender_cpu > 0 or found.seconds < 0.1
    assert found.peak_bytes > 1_000_000


@pytest.mark.skipif(shutil.which(REDIS) is None, reason="redis-server is not installed")
def test_the_broker_is_there_as_long_as_it_is_needed(tmp_path: Path) -> None:
    with broker.redis(tmp_path) as up:
        port = urlsplit(up.url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"SET one 1\r\n")
            assert connection.recv(16) == b"+OK\r\n"

    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.integration
def test_a_peer_that_fails_is_not_measured(postgres_url: str, tmp_path: Path) -> None:
    peer = replace(next(peer for peer in PEERS if peer.module == "httpx_threads"), module="httpx_threats")

    with pytest.raises(ProgramFailed, match="httpx_threats"):
        speed.measure(Sender(name="one", peer=peer), postgres_url, WORK, folder=tmp_path, database=fresh())


@pytest.mark.integration
def test_a_peer_that_leaves_something_out_is_not_measured(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(database_url: str, workload: Workload) -> None:
        speed_prepare(database_url, workload)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("insert into peer_mark values ('target_2', 100)")

    speed_prepare = speed.prepare
    monkeypatch.setattr(speed, "prepare", prepare)
    for sender in [one for one in SENDERS if one.peer and not one.per_target]:
        with pytest.raises(NotDelivered, match="100 records are missing"):
            speed.measure(sender, postgres_url, WORK, folder=tmp_path, database=fresh())


def test_the_mark_never_passes_what_is_not_accepted(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(speed.MARKS)
        mark = Mark(connection, "one")
        for last in (10, 20, 30):
            mark.begin(last)

        reached = []
        for last in (20, 10, 30):
            mark.end(last, 10)
            mark.write()
            reached.append(Mark.read(connection, "one"))

    assert reached == [0, 20, 30]


def test_what_a_process_and_its_children_use_is_counted() -> None:
    burn = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    program = (
        f"import subprocess, sys; input(); exec({burn!r}); subprocess.run([sys.executable, '-c', {burn!r}]);"
        "print('done', flush=True); input()"
    )
    usage = Usage()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with usage.watching([process.pid]):
            process.stdin.write(b"go\n")
            process.stdin.flush()
            process.stdout.readline()

    assert usage.cpu_seconds >= 0.38  # the clock ticks a hundred times a second
    assert usage.peak_bytes > 1_000_000


def test_every_peer_is_pinned_and_there() -> None:
    pinned = roster.pins(REQUIREMENTS.read_text())

    for peer in PEERS:
        assert (REQUIREMENTS.parent / f"{peer.module}.py").exists()
        assert set(peer.needs) <= set(pinned)
    assert all("==" in line for line in pinned.values())


def test_a_peer_whose_program_is_missing_is_left_out_with_the_reason(tmp_path: Path) -> None:
    peer = replace(PEERS[0], programs=["no-such-program"])

    assert roster.environment([peer], tmp_path) == {peer.module: "no-such-program is not installed"}


def test_the_table_compares_with_ours() -> None:
    ours = Measured(
        sender=OURS,
        workload=Workload(changes=400, targets=1),
        seconds=1.0,
        sending_seconds=1.0,
        sender_cpu=1.0,
        database_cpu=0.5,
        receiver_cpu=0.1,
        peak_bytes=5_000_000,
        verdicts={"target_1": {"stale": 0}},
    )
    late = replace(ours.workload, latency=1.0)
    slow = replace(ours, sender="slow", seconds=3.0, sender_cpu=2.0, verdicts={"target_1": {"stale": 7}})

    unknown = replace(slow, sender="unknown", sender_cpu=0.0)

    found = speed.table([[one, replace(one, workload=late)] for one in (ours, slow, unknown)]).splitlines()

    assert found[2].split() == ["distributary", "400", "250.00", "125.00", "5", "50%", "1.0x", "1.0x", "0"]
    assert found[3].split() == ["slow", "133", "500.00", "125.00", "5", "17%", "3.0x", "2.0x", "7"]
    assert found[4].split() == ["unknown", "133", "125.00", "17%", "3.0x", "7"]


TROUBLE = Workload(changes=1200, targets=2, batch=10, in_flight=3, versions=10, latency=0.005)


@pytest.mark.integration
@pytest.mark.parametrize("trial", faults.TRIALS, ids=lambda trial: trial.name)
def test_ours_comes_through_all_trials(trial: faults.Trial, postgres_url: str, tmp_path: Path) -> None:
    found = faults.put_to(SENDERS[0], trial, postgres_url, TROUBLE, folder=tmp_path, database=fresh())

    assert found.ended == "caught_up"
    assert (found.lost, found.repeated, found.stale, found.wrong_at_the_end) == (0, 0, 0, 0)
    assert found.starts == (2 if trial.kill else 1)
    assert (found.known > 0) is (trial.name == "faults") or trial.kill


@pytest.mark.integration
@pytest.mark.parametrize("trial", faults.TRIALS[1:], ids=lambda trial: trial.name)
def test_a_script_comes_through_with_repeats_that_its_keys_tell(
    trial: faults.Trial, postgres_url: str, tmp_path: Path
) -> None:
    threads = next(one for one in SENDERS if one.peer and one.peer.module == "httpx_threads")

    found = faults.put_to(threads, trial, postgres_url, TROUBLE, folder=tmp_path, database=fresh())

    assert (found.ended, found.lost, found.repeated) == ("caught_up", 0, 0)
    assert found.known > 0
    assert found.starts == (2 if trial.kill else 1)


@pytest.mark.integration
def test_what_is_left_out_is_lost(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(database_url: str, workload: Workload) -> None:
        speed_prepare(database_url, workload)
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("insert into peer_mark values ('target_1', 1200), ('target_2', 200)")

    speed_prepare = speed.prepare
    monkeypatch.setattr(speed, "prepare", prepare)
    threads = next(one for one in SENDERS if one.peer and one.peer.module == "httpx_threads")

    found = faults.put_to(threads, faults.TRIALS[0], postgres_url, TROUBLE, folder=tmp_path, database=fresh())

    assert (found.ended, found.lost, found.repeated) == ("caught_up", 1400, 0)


def test_the_table_of_trials_tells_how_each_ended() -> None:
    fine = faults.Outcome(
        sender="one",
        trial="nothing",
        ended="caught_up",
        starts=1,
        seconds=1.0,
        lost=0,
        repeated=0,
        known=3,
        stale=0,
        wrong_at_the_end=0,
    )
    bad = replace(fine, trial="SIGKILL", ended="broke off", lost=4, repeated=5, stale=6, wrong_at_the_end=7)

    row = faults.table([fine, bad]).splitlines()[-1].split("|")

    assert row[0].split() == ["one", "0", "0", "0", "0", "1"]
    assert row[1].split() == ["not", "tried"]
    assert row[2].split() == ["4", "5", "6", "7", "1", "broke", "off"]
