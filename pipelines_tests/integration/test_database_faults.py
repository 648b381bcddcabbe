"""The database fails a drain: its connection is cut, its server goes down or crashes, its disk is full."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest

from pipelines.delivery.report import DrainReport
from pipelines_tests.fakes.http_server import HttpApi, Reply, Script
from pipelines_tests.integration.own_faults import (
    PATIENCE,
    HeldCommit,
    append_changes,
    assert_all_is_well,
    changes_in,
    deliver,
    on_commit,
    one_at_a_time,
    read_ledger,
    target_config,
    wait_until,
    wait_until_free,
)
from resources import embedded_postgres
from resources.migrate import apply_migrations

pytestmark = pytest.mark.integration


def assert_failed(report: DrainReport, said: str = "the database failed: ") -> None:
    """It ended by itself, with one sentence of the database's, so that other targets' lines are printed."""
    assert report.end == "failed"
    assert report.reason is not None
    assert said in report.reason
    assert "\n" not in report.reason


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """For a drain beside the test."""
    with ThreadPoolExecutor(1) as threads:
        yield threads


def server_process(database: str) -> int:
    """Return the pid of the one server process that works for the drain."""
    with psycopg.connect(database) as connection:
        ((pid,),) = connection.execute(
            "select pid from pg_stat_activity"
            " where datname = current_database() and application_name = 'distributary drain api'"
        ).fetchall()
    return int(pid)


def cut(database: str) -> None:
    """End the drain's session, as a network or an administrator would."""
    with psycopg.connect(database) as connection:
        connection.execute("select pg_terminate_backend(%s, 10000)", [server_process(database)])


@pytest.mark.parametrize("where", ["lingering", "sending", "retrying", "in claim", "in split", "in settle"])
def test_a_cut_connection_ends_the_drain_and_another_takes_over(
    database: str, thread: ThreadPoolExecutor, where: str
) -> None:
    append_changes(database)
    answer = threading.Event()
    with HttpApi() as api, ExitStack() as stack:
        stack.callback(answer.set)
        config = target_config(api.url, retry={"initial_backoff": 0.05, "max_backoff": 0.1, "max_elapsed": 3600})
        if where.startswith("in "):
            commit = stack.enter_context(HeldCommit(database, where.removeprefix("in ")))
        scripts: dict[str, Script] = {
            "sending": Reply(hold=answer),
            "retrying": Reply(status=503),
            "in split": one_at_a_time,
        }
        api.script(scripts.get(where, Reply()))
        poll = 0.02 if where == "lingering" else 3600.0  # else it would notice as it looks for more
        first = thread.submit(deliver, database, config, linger=3600.0, poll=poll)
        match where:
            case "lingering":
                wait_until(lambda: read_ledger(database).conservation.pending == 0, "all is claimed")
                wait_until(lambda: read_ledger(database).conservation.claimed == 0, "all is delivered")
                cut(database)
            case "sending" | "retrying":
                api.wait_for(2, seconds=PATIENCE)
                cut(database)
            case _:
                commit.wait()
                commit.roll_back()
                commit.let_through()
        api.script([])
        if where == "sending":
            wait_until_free(database)
            append_changes(database, seed=2)
            assert deliver(database, config).end == "caught_up"  # while the first still waits for its answers
            answer.set()

        assert_failed(first.result(PATIENCE))

        wait_until_free(database)
        left, seen = read_ledger(database), len(api.requests)
        append_changes(database, seed=3)
        report = deliver(database, config)

        assert report.end == "caught_up"
        assert_all_is_well(database, api)
        assert left.settled.isdisjoint(changes_in(api.requests[seen:]))


# --- the server goes down ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server(tests_own_server: Path) -> Iterator[Path]:
    """Return the folder of a server that only these tests use."""
    folder = tests_own_server.with_name(f"{tests_own_server.name}-{uuid4().hex[:8]}")
    yield folder
    embedded_postgres.remove(folder)


@pytest.fixture
def own_database(own_server: Path) -> str:
    """Return the URL of a fresh database on that server."""
    url = embedded_postgres.start(own_server, durable=False)
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(f"create database {name} template template0")
    database = urlsplit(url)._replace(path=f"/{name}").geturl()
    with psycopg.connect(database, autocommit=True) as connection:
        apply_migrations(connection)
    return database


def crash(server: Path) -> None:
    """Let the server end at once, without writing anything more: what is committed is in its log alone."""
    pid = int((server / "data" / "postmaster.pid").read_text().split("\n")[0])
    os.kill(pid, signal.SIGQUIT)
    wait_until(lambda: embedded_postgres.running_url(server) is None, "the server is gone")


@pytest.mark.parametrize("go_down", [embedded_postgres.stop, crash], ids=["stopped", "crashed"])
def test_what_is_claimed_survives_a_server_that_goes_down(
    own_server: Path, own_database: str, thread: ThreadPoolExecutor, go_down: Callable[[Path], None]
) -> None:
    """It comes back with the claims and their keys; while it is away, a drain says so in one sentence."""
    append_changes(own_database)
    answer = threading.Event()
    with HttpApi(Reply(hold=answer)) as api, ExitStack() as stack:
        stack.callback(answer.set)
        config = target_config(api.url)
        first = thread.submit(deliver, own_database, config)
        api.wait_for(2, seconds=PATIENCE)
        before = read_ledger(own_database)
        go_down(own_server)
        assert_failed(deliver(own_database, config), "Cannot reach the database")
        api.script([])
        answer.set()
        assert_failed(first.result(PATIENCE))

        embedded_postgres.start(own_server, durable=False)
        assert read_ledger(own_database) == before
        seen = len(api.requests)
        report = deliver(own_database, config)

        assert report.end == "caught_up"
        assert_all_is_well(own_database, api)
        repeated = api.requests[seen : seen + len(before.claimed_keys)]
        assert {request.key for request in repeated} == set(before.claimed_keys)


# --- the disk is full -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["claim", "split", "settle"])
def test_a_commit_that_fails_is_as_if_it_had_never_been(database: str, of: str) -> None:
    """If it is a claim nothing was sent; if it is a settlement the next drain repeats it under the same keys."""
    append_changes(database)
    with (
        HttpApi(one_at_a_time if of == "split" else ()) as api,
        psycopg.connect(database, autocommit=True) as connection,
    ):
        full = "raise exception 'could not extend file: No space left on device' using errcode = 'disk_full'"
        with on_commit(connection, of, full):
            assert_failed(deliver(database, target_config(api.url)), "No space left on device")
        left, sent = read_ledger(database), api.requests
        assert bool(left.claimed_keys) == bool(sent) == (of != "claim")
        assert {request.key for request in sent if left.settled.isdisjoint(changes_in([request]))} <= set(
            left.claimed_keys
        )

        report = deliver(database, target_config(api.url))

        assert report.end == "caught_up"
        assert_all_is_well(database, api)
        assert left.settled.isdisjoint(changes_in(api.requests[len(sent) :]))


@contextmanager
def no_room_for(table: str, server: Path, database: str) -> Iterator[None]:
    """Put *table*, empty and yet in no server process's hands, where every write finds the disk full."""
    with psycopg.connect(database) as connection:
        ((place,),) = connection.execute("select pg_relation_filepath(%s)", [table]).fetchall()
    file = server / "data" / place
    empty = file.with_name(f"{file.name}.empty")
    assert file.stat().st_size == 0
    file.rename(empty)
    file.symlink_to("/dev/full")
    try:
        yield
    finally:
        empty.rename(file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("table", ["batch", "dead_letter"])
def test_a_full_disk_costs_nothing_but_time(own_server: Path, own_database: str, table: str) -> None:
    """The server's own words, at a claim and at a settlement that buries a record."""
    append_changes(own_database)
    with HttpApi() as api:
        api.script(lambda request: Reply(status=422 if table == "dead_letter" else 200))
        with no_room_for(f"distributary.{table}", own_server, own_database):
            assert_failed(deliver(own_database, target_config(api.url)), "could not extend file")
        left, sent = read_ledger(own_database), api.requests
        assert bool(left.claimed_keys) == bool(sent) == (table == "dead_letter")
        assert left.conservation.accepted == left.conservation.dead == 0

        api.script([])
        report = deliver(own_database, target_config(api.url))

        assert report.end == "caught_up"
        assert_all_is_well(own_database, api)
