"""A drain that is killed in mid-flight loses nothing, and what it repeats is recognisably a repeat.

The drain runs in a process of its own (`python -m pipelines_tests.integration.test_kill DATABASE API`), against a real
Postgres and a real HTTP server, and gets SIGKILL while the target has applied its requests and not answered them.
"""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipelines.delivery.catalog import policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import compile_routes
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from resources.http_target import HttpTargetClient, endpoint
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
RECORD = {"id": "$id", "change": "$_change_id"}
CHANGES = 400
LANES = 4


def target_config(url: str) -> TargetConfig:
    operations: Mapping[str, Any] = {
        "upsert": {"path": "/rows", "batch": {"max_records": 5}},
        "delete": {"path": "/rows/${_key}", "record": RECORD},
    }
    return TargetConfig.model_validate(
        {
            "name": "api",
            "base_url": url,
            "max_in_flight": LANES,
            "timeout_seconds": 60.0,
            "routes": {
                "events": {"mode": "event", "record": RECORD, **operations},
                "states": {"mode": "state", "record": RECORD, **operations},
            },
        }
    )


def drain_once(database: str, url: str) -> DrainReport:
    """Drain as soon as the target's lock is free: the server may not have noticed yet that its last holder is gone."""
    config = target_config(url)
    ledger = PostgresLedger(database)
    while True:
        with ledger.open_target("api", run_id="run") as target_ledger:
            if target_ledger is not None:
                return drain(
                    policy=policy_of(config),
                    routes=compile_routes(config),
                    ledger=target_ledger,
                    connect=lambda: HttpTargetClient(endpoint(config, lambda name: name)),
                    clock=SystemClock(),
                    limits=DrainLimits(window_records=120),
                )
        time.sleep(0.02)


def append_changes(database: str) -> dict[str, int]:
    """Append changes to some keys of two streams; return the latest change of each key."""
    dice = random.Random(5)
    latest: dict[str, int] = {}
    with psycopg.connect(database) as connection:
        for _ in range(CHANGES):
            stream = dice.choice(["events", "states"])
            key = f"{stream}-{dice.randrange(25)}"
            row = connection.execute(
                "insert into distributary.change_log (stream, key, operation, payload)"
                " values (%s, %s, %s, jsonb_build_object('id', %s::text)) returning change_id",
                (stream, key, dice.choice(["insert", "update", "update", "delete"]), key),
            ).fetchone()
            assert row is not None
            latest[key] = row[0]
    return latest


def leftover_keys(database: str) -> set[str]:
    with psycopg.connect(database) as connection:
        rows = connection.execute("select idempotency_key from distributary.batch where state = 'claimed'").fetchall()
    return {str(key) for (key,) in rows}


def kill_in_flight(database: str, api: HttpApi, *, after: int, held: int) -> None:
    """Start a drain, and kill it when *held* requests are out that were applied and not answered."""
    answered = 0
    never = threading.Event()  # while the process lives
    lock = threading.Lock()

    def script(_: Request) -> Reply:
        nonlocal answered
        with lock:
            answered += 1
            return Reply() if answered <= after else Reply(hold=never)

    before = len(api.requests)
    api.script(script)
    process = subprocess.Popen([sys.executable, "-m", __spec__.name, database, api.url], cwd=REPOSITORY)
    try:
        api.wait_for(before + after + held, seconds=60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        never.set()
    api.wait_until_left()
    api.script([])


def changes_in(request: Request) -> list[tuple[str, int]]:
    return [(row["id"], row["change"]) for row in request.records]


def test_a_killed_drain_loses_nothing_and_repeats_only_what_it_had_claimed(database: str) -> None:
    """Three kills, at the beginning and later; then a drain that is let finish."""
    PostgresLedger(database).register({"api": "beginning"})
    latest = append_changes(database)
    with HttpApi() as api:
        # Later kills find lanes that wait for the others' leftovers, so not each has a request out.
        for after, held in ((0, LANES), (7, 2), (23, 1)):
            kill_in_flight(database, api, after=after, held=held)
        seen, left = len(api.requests), leftover_keys(database)
        report = drain_once(database, api.url)
        requests, applied = api.requests, api.applied

    # It is all there, and the ledger knows it.
    assert report.end == "caught_up"
    conservation = PostgresLedger(database).conservation("api")
    assert conservation.holds
    assert (conservation.captured, conservation.pending, conservation.claimed) == (CHANGES, 0, 0)
    assert conservation.accepted + conservation.superseded == CHANGES
    assert leftover_keys(database) == set()

    # What was claimed went out first, under its old keys.
    assert {request.key for request in requests[seen : seen + len(left)]} == left

    # A repeat is a repeat: its key has one body and one path, and no change is under two keys.
    times: dict[str | None, int] = defaultdict(int)
    said: dict[str | None, set[tuple[str, str, bytes]]] = defaultdict(set)
    keys_of: dict[int, set[str | None]] = defaultdict(set)
    for request in requests:
        times[request.key] += 1
        said[request.key].add((request.method, request.path, request.body))
        for _, change_id in changes_in(request):
            keys_of[change_id].add(request.key)
    assert all(len(each) == 1 for each in said.values())
    assert all(len(each) == 1 for each in keys_of.values())
    assert sum(count > 1 for count in times.values()) >= LANES + 2

    # A target that passes over repeats never saw a key go backwards, and one that takes them again ends up at the same.
    careful: dict[str, int] = {}
    careless: dict[str, int] = {}
    known: set[str | None] = set()
    for request in applied:
        given = dict(changes_in(request))
        careless |= given
        if request.key not in known:
            known.add(request.key)
            assert all(careful.get(key, 0) < change_id for key, change_id in given.items())
            careful |= given
    assert careful == latest
    assert careless == latest
    events = {change_id for request in applied for key, change_id in changes_in(request) if key.startswith("events")}
    with psycopg.connect(database) as connection:
        every = connection.execute("select change_id from distributary.change_log where stream = 'events'").fetchall()
    assert events == {change_id for (change_id,) in every}


if __name__ == "__main__":
    drain_once(*sys.argv[1:3])
