"""Two drains for one target at the same moment, and a clock that jumps."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import datetime, timedelta
from email.utils import format_datetime
from threading import Condition

import psycopg
import pytest

from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines.delivery.report import DrainReport
from pipelines.delivery.sending import RetryPolicy
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.http_server import HttpApi, Reply
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import ScriptedTarget, answer, routes_of
from pipelines_tests.integration.own_faults import (
    PATIENCE,
    DrainProcess,
    append_changes,
    assert_all_is_well,
    deliver,
    target_config,
)
from resources.system_clock import SystemClock

HOUR = timedelta(hours=1)
YEAR = timedelta(days=365)

# --- two drains at once -----------------------------------------------------------------------------------------------

Start = Callable[[str, str], Callable[[], DrainReport]]


@pytest.fixture(params=["threads", "processes"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Return what makes a drain ready; the two calls of what it returns then begin at the same moment."""
    together = threading.Barrier(2, timeout=PATIENCE)
    with ExitStack() as stack:

        def thread(database: str, url: str) -> Callable[[], DrainReport]:
            def run() -> DrainReport:
                together.wait()
                return deliver(database, target_config(url))

            return run

        def process(database: str, url: str) -> Callable[[], DrainReport]:
            drain = stack.enter_context(DrainProcess(database, target_config(url), halt_at="before open"))
            drain.wait()

            def run() -> DrainReport:
                together.wait()
                drain.go_on()
                return drain.report()

            return run

        yield thread if request.param == "threads" else process


@pytest.mark.integration
def test_of_two_drains_at_the_same_moment_one_holds_the_target(database: str, start: Start) -> None:
    """The other reports so at once, while the first is at it; and no request goes out twice."""
    with HttpApi() as api, ThreadPoolExecutor(2) as threads:
        for seed in range(3):
            append_changes(database, seed=seed)
            done = threading.Event()
            api.script(Reply(hold=done))
            drains = [threads.submit(start(database, api.url)) for _ in range(2)]
            try:
                first, rest = wait(drains, timeout=PATIENCE, return_when=FIRST_COMPLETED)
                assert [drain.result().end for drain in first] == ["held"]
            finally:
                done.set()
            assert [drain.result(PATIENCE).end for drain in rest] == ["caught_up"]
        assert_all_is_well(database, api, repeats=False)


# --- clocks that jump -------------------------------------------------------------------------------------------------

JUMPS = pytest.mark.parametrize("jump", [-HOUR, YEAR], ids=["an hour back", "a year ahead"])


class JumpingClock(FakeClock):
    """Its time of day is what somebody sets it to; seconds pass as ever."""

    off = timedelta()
    at_the_first_wait = timedelta()

    def now(self) -> datetime:
        return super().now() + self.off

    def wait(self, condition: Condition, seconds: float | None) -> None:
        super().wait(condition, seconds)
        self.off += self.at_the_first_wait
        self.at_the_first_wait = timedelta()


class WrongClock(SystemClock):
    """Real time, on a machine whose time of day is off."""

    def __init__(self, off: timedelta) -> None:
        self._off = off

    def now(self) -> datetime:
        return super().now() + self._off


def drain_once(ledger: FakeLedger, target: ScriptedTarget, clock: FakeClock) -> DrainReport:
    with ledger.open_target("api", run_id="run") as opened:
        assert opened is not None
        return drain(
            policy=DrainPolicy(target="api", max_in_flight=1, retry=RetryPolicy(max_elapsed=60.0)),
            routes=routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 3}}}),
            ledger=opened,
            connect=target.connect,
            clock=clock,
            limits=DrainLimits(),
        )


def a_ledger(clock: FakeClock) -> FakeLedger:
    ledger = FakeLedger(targets={"api": "beginning"}, clock=clock)
    for number in range(10):
        ledger.append("customers", str(number % 4))
    return ledger


@JUMPS
def test_a_clock_that_jumps_while_a_target_wants_to_be_left_alone_changes_nothing(jump: timedelta) -> None:
    """A dated `Retry-After` is turned into seconds at once, and those pass as ever."""
    clock = JumpingClock()
    clock.at_the_first_wait = jump
    later = format_datetime(clock.now() + timedelta(seconds=20), usegmt=True)
    ledger, target = a_ledger(clock), ScriptedTarget([answer(503, headers={"retry-after": later})])

    report = drain_once(ledger, target, clock)

    assert report.end == "caught_up"
    assert 20.0 <= sum(clock.naps) < 20.0 + 1.0
    assert min(clock.naps) >= 0.0
    assert_delivered(ledger, target)


@JUMPS
def test_a_clock_that_is_wrong_makes_no_wait_negative_or_endless(jump: timedelta) -> None:
    """A date that is long past is no wait at all; one that is too far off is believed for `max_retry_after` at most."""
    clock = JumpingClock()
    later = format_datetime(clock.now() + timedelta(seconds=20), usegmt=True)
    clock.off = jump
    ledger, target = a_ledger(clock), ScriptedTarget([answer(503, headers={"retry-after": later})])

    report = drain_once(ledger, target, clock)
    if report.end == "deferred":
        (owed,) = ledger.owed({"api": ["customers"]})
        assert owed.waiting
        clock.advance(3600.0)
        (owed,) = ledger.owed({"api": ["customers"]})
        assert not owed.waiting
        report = drain_once(ledger, target, clock)

    assert report.end == "caught_up"
    assert min(clock.naps, default=0.0) >= 0.0
    assert_delivered(ledger, target)


def assert_delivered(ledger: FakeLedger, target: ScriptedTarget) -> None:
    found = ledger.conservation("api")
    assert found.holds
    assert (found.accepted + found.superseded, found.pending, found.claimed) == (10, 0, 0)
    assert len(set(target.keys)) == len(target.sent) - 1  # the first request came twice


@pytest.mark.integration
@JUMPS
def test_a_wrong_clock_holds_a_target_no_longer_and_no_shorter(database: str, jump: timedelta) -> None:
    """What a drain writes down is compared with the database's clock, so it is that clock's time that it must be."""
    append_changes(database)
    with HttpApi(Reply(status=503)) as api:
        config = target_config(
            api.url,
            retry={"initial_backoff": 0.01, "max_backoff": 0.01, "max_elapsed": 0.05},
            circuit_breaker={"error_timeout": 45.0},
        )
        deferred = deliver(database, config, clock=WrongClock(jump))
        with psycopg.connect(database) as connection:
            ((seconds,),) = connection.execute(
                "select extract(epoch from retry_at - clock_timestamp())::float8 from distributary.target_state"
            ).fetchall()
        api.script([])
        report = deliver(database, config)

        assert (deferred.end, report.end) == ("deferred", "caught_up")
        assert_all_is_well(database, api)
        assert 30.0 < seconds <= 45.0


@pytest.mark.integration
def test_a_wrong_clock_makes_no_change_arrive_before_it_was_made(database: str) -> None:
    append_changes(database)
    with HttpApi() as api:
        report = deliver(database, target_config(api.url), clock=WrongClock(-HOUR))

    assert report.end == "caught_up"
    assert report.lag_p50 is not None
    assert report.lag_p50 >= 0.0
