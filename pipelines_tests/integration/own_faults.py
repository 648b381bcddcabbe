"""What tests of our own faults share: a log and a target, a drain in a process that halts where it is told, a verdict.

A drain is `deliver_to_target` as Dagster's step runs it, over a real Postgres and a real HTTP server. It halts without
any change to it: before and after a method of the ledger in its own process, in a commit by a trigger of the database,
in a request by the target.
"""

import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

import dagster as dg
import psycopg

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import Destination, TargetCatalog, policy_of
from pipelines.delivery.clock import Clock
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.ledger import Conservation, Ledger, TargetLedger
from pipelines.delivery.ops import DeliveryPlan, deliver_to_target
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import compile_routes
from pipelines.delivery.target import TargetClient
from pipelines_tests.fakes.history import examine, versions_in
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from resources.http_target import HttpTargetClient, endpoint
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader
from resources.system_clock import SystemClock

PATIENCE = 30.0
LANES = 3
STREAMS = {"events": "event", "states": "state"}

# --- the log and the target -------------------------------------------------------------------------------------------


def target_config(url: str, **more: Any) -> TargetConfig:
    """Return the target `api`: batches of four, the rows of `events` one and all, of `states` the latest."""
    record = {"id": "$id", "change": "$_change_id"}
    operations: Mapping[str, Any] = {
        "upsert": {"path": "/rows", "batch": {"max_records": 4}},
        "delete": {"path": "/rows/${_key}", "record": record},
    }
    document: dict[str, Any] = {
        "name": "api",
        "base_url": url,
        "max_in_flight": LANES,
        "timeout_seconds": 60.0,
        "retry": {"initial_backoff": 0.05, "max_backoff": 0.1, "max_elapsed": 5.0},
        "routes": {stream: {"mode": mode, "record": record, **operations} for stream, mode in STREAMS.items()},
    }
    return TargetConfig.model_validate(document | more)


def one_at_a_time(request: Request) -> Reply:
    """Refuse a request of several records as too large."""
    return Reply(status=413 if len(request.records) > 1 else 200)


class OneTarget(TargetCatalog):
    """A catalog of one target, with no file."""

    def __init__(self, config: TargetConfig) -> None:
        self._config = config

    def configs(self) -> Mapping[str, TargetConfig]:
        return {self._config.name: self._config}

    def destination(self, target: str) -> Destination:
        at = endpoint(self._config, lambda name: name)
        return Destination(
            policy=policy_of(self._config), routes=compile_routes(self._config), connect=lambda: HttpTargetClient(at)
        )

    def reader(self, target: str, *, max_response_bytes: int) -> TargetClient:
        return HttpTargetClient(endpoint(self._config, lambda name: name))


def append_changes(database: str, count: int = 60, *, seed: int = 1) -> None:
    """Commit *count* changes, of each of the keys one at least, and make the target known."""
    PostgresLedger(database).register({"api": "beginning"})
    dice = random.Random(seed)
    keys = [(stream, f"{stream}-{number}") for stream in STREAMS for number in range(9)]
    rows = dice.sample(keys, len(keys)) + dice.choices(keys, k=count - len(keys))
    with psycopg.connect(database) as connection:
        connection.cursor().executemany(
            "insert into distributary.change_log (stream, key, operation, payload)"
            " values (%s, %s, %s, jsonb_build_object('id', %s::text))",
            [(stream, key, dice.choice(["insert", "update", "update", "delete"]), key) for stream, key in rows],
        )


# --- a drain ----------------------------------------------------------------------------------------------------------


def deliver(
    database: str,
    config: TargetConfig,
    *,
    ledger: Ledger | None = None,
    clock: Clock | None = None,
    linger: float = 0.0,
    poll: float = 0.02,
) -> DrainReport:
    """Run one step of a run, here and now."""
    plan = DeliveryPlan(target="api", linger_seconds=linger, poll_seconds=poll, max_seconds=3600.0)
    with dg.build_op_context() as context:
        report = deliver_to_target(
            context,
            plan,
            ledger=ledger or PostgresLedger(database),
            targets=OneTarget(config),
            clock=clock or SystemClock(),
            loader=PostgresLoader(database, SourceConfig(tables={})),
        )
    assert isinstance(report, DrainReport)
    return report


def wait_until(found: Callable[[], Any], what: str) -> Any:
    """Return what *found* returns once that is something; raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE
    while not (found_now := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.01)
    return found_now


def wait_until_free(database: str) -> None:
    """Wait until nobody holds the target's lock: the server takes a moment to notice that a client was killed."""
    ledger = PostgresLedger(database)
    wait_until(lambda: not ledger.owed({"api": list(STREAMS)})[0].held, "the lock of a drain that is gone is free")


# --- a drain in a process of its own ----------------------------------------------------------------------------------

# Forked from a server that has imported everything: a process takes a fraction of the time of a Python of its own.
_processes = multiprocessing.get_context("forkserver")
_PRELOAD = ["__main__", __name__, "dagster_postgres"]  # the last brings most of what Dagster imports late


class DrainProcess:
    """One step in a process of its own; with *halt_at*, `before claim` say, it stands there until told to go on."""

    def __init__(self, database: str, config: TargetConfig, *, halt_at: str | None = None, linger: float = 0.0) -> None:
        _processes.set_forkserver_preload(_PRELOAD)
        self._here, there = _processes.Pipe()
        self._process = _processes.Process(
            target=_deliver_and_tell, args=(there, database, config, halt_at, linger), daemon=True
        )
        self._process.start()
        there.close()

    def wait(self) -> None:
        """Wait until it is where it is to halt."""
        assert self._told() == "here"

    def go_on(self) -> None:
        """Let it go on, if it lives."""
        with suppress(BrokenPipeError):
            self._here.send("go on")

    def report(self) -> DrainReport:
        """Wait for its end, which is to be of its own, and return its report."""
        report = self._told()
        self._process.join(PATIENCE)
        assert self._process.exitcode == 0
        assert isinstance(report, DrainReport), report
        return report

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, and see it die."""
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._here.close()
        self._process.close()

    def _told(self) -> object:
        if not self._here.poll(PATIENCE):
            raise TimeoutError(f"the drain's process said nothing in {PATIENCE:g} s")
        return self._here.recv()


def _deliver_and_tell(
    parent: Connection, database: str, config: TargetConfig, halt_at: str | None, linger: float
) -> None:
    ledger = PostgresLedger(database) if halt_at is None else HaltingLedger(database, parent, halt_at)
    try:
        parent.send(deliver(database, config, ledger=ledger, linger=linger))
    except Exception as error:
        parent.send(repr(error))
        raise


class HaltingLedger(PostgresLedger):
    """Says so and waits, once: `before open`, or `before` or `after` a method of the target's ledger."""

    def __init__(self, url: str, parent: Connection, halt_at: str) -> None:
        super().__init__(url)
        self._parent = parent
        self._when, self._name = halt_at.split()
        self._halted = False

    @contextmanager
    def open_target(self, target: str, *, run_id: str) -> Iterator[TargetLedger | None]:
        if self._name == "open":
            self._halt()
        with super().open_target(target, run_id=run_id) as opened:
            if opened is not None and self._name != "open":
                setattr(opened, self._name, self._around(getattr(opened, self._name)))
            yield opened

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def halting(*arguments: Any, **named: Any) -> Any:
            if self._when == "before":
                self._halt()
            result = method(*arguments, **named)
            if self._when == "after":
                self._halt()
            return result

        return halting

    def _halt(self) -> None:
        if not self._halted:
            self._halted = True
            self._parent.send("here")
            self._parent.recv()


# --- commits that wait or fail ----------------------------------------------------------------------------------------

_COMMIT_OF = {
    "claim": ("insert on distributary.batch", "new.part_of is null"),
    "split": ("insert on distributary.batch", "new.part_of is not null"),
    "settle": ("update on distributary.target_state", "new.accepted > old.accepted"),
}


@contextmanager
def on_commit(connection: psycopg.Connection, of: str, then: str) -> Iterator[None]:
    """Let the server do *then*, a statement of PL/pgSQL, in each commit of a claim, of a split or of a settlement."""
    event, condition = _COMMIT_OF[of]
    connection.execute(
        f"create function at_{of}() returns trigger language plpgsql as $$ begin {then}; return null; end $$"
    )
    connection.execute(
        f"create constraint trigger at_{of} after {event} deferrable initially deferred"
        f" for each row when ({condition}) execute function at_{of}()"
    )
    try:
        yield
    finally:
        connection.execute(f"drop function at_{of} cascade")


class HeldCommit:
    """While this lasts, a commit of a claim, of a split or of a settlement does not come to its end."""

    def __init__(self, database: str, of: str) -> None:
        self._stack = ExitStack()
        self._connection = self._stack.enter_context(psycopg.connect(database, autocommit=True))
        self._connection.execute("select pg_advisory_lock(7)")
        self._stack.enter_context(on_commit(self._connection, of, "perform pg_advisory_xact_lock(7)"))

    def wait(self) -> int:
        """Wait until a commit waits; return the pid of its server process."""
        waiting = (
            "select pid from pg_locks where locktype = 'advisory' and not granted and objid = 7"
            " and database = (select oid from pg_database where datname = current_database())"
        )
        (pid,) = wait_until(lambda: self._connection.execute(waiting).fetchone(), "a commit waits")
        return int(pid)

    def roll_back(self) -> None:
        """End the session whose commit waits."""
        self._connection.execute("select pg_terminate_backend(%s, 10000)", [self.wait()])

    def let_through(self) -> None:
        """Let the commit be done, and all that come after."""
        self._connection.execute("select pg_advisory_unlock_all()")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_through()
        self._stack.close()


# --- a halt, wherever -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """A drain's process that stands at some point."""

    process: DrainProcess
    go_on: Callable[[], None]
    roll_back: Callable[[], None] = lambda: None


@contextmanager
def halted(point: str, database: str, api: HttpApi) -> Iterator[Halted]:
    """Start a drain; yield it where it is: `before` or `after` a call of the ledger, `in` a commit, or `sending`."""
    config = target_config(api.url)
    with ExitStack() as stack:
        if point == "sending":
            answer = threading.Event()
            stack.callback(answer.set)
            api.script(Reply(hold=answer))
            stack.callback(api.script, [])
            process = stack.enter_context(DrainProcess(database, config))
            api.wait_for(len(api.requests) + 2, seconds=PATIENCE)
            yield Halted(process=process, go_on=answer.set)
        elif point.startswith("in "):
            commit = stack.enter_context(HeldCommit(database, point.removeprefix("in ")))
            process = stack.enter_context(DrainProcess(database, config))
            commit.wait()
            yield Halted(process=process, go_on=commit.let_through, roll_back=commit.roll_back)
        else:
            process = stack.enter_context(DrainProcess(database, config, halt_at=point))
            process.wait()
            yield Halted(process=process, go_on=process.go_on)


# --- the verdict ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """What is written down at some moment."""

    claimed_keys: list[str]
    """Of the batches in flight, oldest first."""
    settled: frozenset[int]
    conservation: Conservation


def read_ledger(database: str) -> LedgerState:
    """Read what is written down, which adds up at every moment."""
    with psycopg.connect(database) as connection:
        keys = connection.execute(
            "select idempotency_key::text from distributary.batch where state = 'claimed' order by batch_id"
        ).fetchall()
        settled = connection.execute(
            "select change_id from distributary.change_log, distributary.target_state where settled @> change_id"
        ).fetchall()
    conservation = PostgresLedger(database).conservation("api")
    assert conservation.holds, conservation
    return LedgerState(
        claimed_keys=[key for (key,) in keys],
        settled=frozenset(change_id for (change_id,) in settled),
        conservation=conservation,
    )


def changes_in(requests: Iterable[Request]) -> set[int]:
    """Return the changes that *requests* carry."""
    return {version.change for request in requests for version in versions_in(request)}


def assert_all_is_well(database: str, api: HttpApi, *, repeats: bool = True) -> None:
    """Nothing is lost, nothing is out of order, and what was repeated, if anything may be, is recognisably a repeat."""
    after = read_ledger(database)
    found = after.conservation
    assert (found.pending, found.claimed, found.dead, after.claimed_keys) == (0, 0, 0, [])
    with psycopg.connect(database) as connection:
        log = connection.execute(
            "select key, stream = 'events', array_agg(change_id order by change_id) from distributary.change_log"
            " group by key, stream"
        ).fetchall()
    assert sum(len(changes) for *_, changes in log) == found.captured == len(after.settled)
    latest = {key: changes[-1] for key, _, changes in log}
    every = {key: changes for key, is_event, changes in log if is_event}

    requests, applied = api.requests, api.applied
    findings = examine(requests, applied, latest | every)
    broken = dict(findings.broken)
    if repeats:
        # Of the requests that come again, a target that takes each as new undoes what came after them, until that comes
        # again too; no one can help it. But it ends up at the same.
        broken.pop("out_of_order_if_careless", None)
        careless = {version.key: version.change for request in applied for version in versions_in(request)}
        assert careless == latest
    else:
        keys = [request.key for request in requests]
        assert len(set(keys)) == len(keys), "a request came twice"
    assert (broken, findings.strangers) == ({}, []), findings
