"""How batches come to be sent: by the express where nothing waits, by the lane's own thread else, in order either way.

What a drain does with its lanes is in test_drain.py and its like, which run both ways.
"""

import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from pipelines.delivery.batching import Batch
from pipelines.delivery.breaker import Breaker
from pipelines.delivery.clock import Clock
from pipelines.delivery.gate import TargetGate
from pipelines.delivery.holding import KeyHolds
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.lanes import LanePool, Told, Work
from pipelines.delivery.planning import claim_of
from pipelines.delivery.sending import RetryPolicy, Sender
from pipelines.delivery.target import TargetClient
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import LOG_ID
from pipelines_tests.fakes.target import (
    ScriptedTarget,
    SentRequest,
    Step,
    ThreadedMultiplexer,
    change,
    no_answer,
    routes_of,
)

ROUTE = routes_of(rows={"upsert": {"path": "/rows"}})["rows"]
QUICK = RetryPolicy(initial_backoff=0.001, max_backoff=0.001, max_elapsed=60)


class Pool:
    """Lanes over a scripted target, and what the drain is told by them, in order."""

    def __init__(self, target: ScriptedTarget, *, lanes: int = 1, clock: Clock | None = None) -> None:
        self.clock = clock or FakeClock()
        self.gate = TargetGate(
            clock=self.clock,
            breaker=Breaker(failure_threshold=100, error_timeout=30),
            bucket=None,
            dead_letter_guard=1.0,
        )
        self.target = target
        self.holds = KeyHolds()
        self.told: SimpleQueue[Any] = SimpleQueue()
        self.lanes = LanePool(
            lanes,
            sender=self._sender,
            tell=self.told.put,
            tell_all=self.told.put,
            broke=self.told.put,
            clock=self.clock,
        )

    def _sender(self) -> tuple[Sender, TargetClient]:
        client = self.target.connect()
        sender = Sender(
            log_id=LOG_ID,
            target="api",
            client=client,
            gate=self.gate,
            rules=JudgingRules(),
            retry=QUICK,
            clock=self.clock,
            split=lambda *_: (),
            holds=self.holds,
        )
        return sender, client

    def put(self, *ids: int, lane: int = 0, set_aside: int = 0) -> None:
        for number in ids:
            record = change(number, stream="rows")
            batch = Batch(
                lane=lane,
                route=ROUTE,
                operation=ROUTE.operations["upsert"],
                changes=[record],
                fragments=[record.payload],
            )
            key = claim_of(batch, log_id=LOG_ID, target="api").idempotency_key
            self.lanes.put(Work(number, batch, key, set_aside))

    def asked_for_permits(self) -> list[int]:
        """Return what grows by one whenever a lane's own thread asks whether it may send."""
        asked: list[int] = []
        entered = self.gate.enter

        def enter(**kwargs: Any) -> Any:
            asked.append(1)
            return entered(**kwargs)

        self.gate.enter = enter  # type: ignore[method-assign]
        return asked

    def tidings(self, number: int) -> list[Told]:
        """Return what the drain is told of the next so many batches."""
        found: list[Told] = []
        while len(found) < number:
            one = self.told.get(timeout=10)
            found += [one] if isinstance(one, Told) else one
        return found

    def hears(self, number: int) -> list[list[int]]:
        """Return the batches of the next tidings, until *number* are done; raises what ended a thread."""
        found: list[list[int]] = []
        while sum(map(len, found)) < number:
            one = self.told.get(timeout=10)
            if isinstance(one, BaseException):
                raise one
            tidings: Sequence[Told] = [one] if isinstance(one, Told) else one
            found.append([told.settlement.batch_id for told in tidings if told.done is not None])
        return found


@pytest.fixture(autouse=True)
def multiplexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedTarget, "multiplexed", True)


def ids_of(requests: Sequence[SentRequest]) -> list[bytes]:
    return [request.body for request in requests]


def test_a_lanes_batches_leave_one_after_another() -> None:
    pool = Pool(ScriptedTarget(), lanes=2)
    pool.put(*range(1, 20, 2), lane=0)
    pool.put(*range(2, 20, 2), lane=1)

    pool.hears(19)
    pool.lanes.close()

    for first in (1, 2):
        of_lane = [
            body for body in ids_of(pool.target.sent) if body in {change(n).payload for n in range(first, 20, 2)}
        ]
        assert of_lane == [change(number).payload for number in range(first, 20, 2)]


def test_what_went_before_is_told_before_a_lanes_own_thread_has_its_say() -> None:
    """Else a later state of a key could be written down, and the earlier one sent again after it."""
    held = threading.Event()

    def script(request: SentRequest) -> Step:
        if request.body == change(9).payload:
            assert held.wait(10)
        seen = [one.body for one in pool.target.sent].count(request.body)
        return 503 if request.body == change(3).payload and seen == 1 else 200

    pool = Pool(ScriptedTarget(script), lanes=2)
    pool.put(8, lane=1)
    pool.put(1, lane=0)
    assert sorted(pool.hears(2)) == [[1], [8]]  # by their own threads: nothing was connected yet
    pool.put(9, lane=1)  # stays out, so the express has no reason to tell anything yet; its clock stands still
    pool.put(2, 3, lane=0)

    told = pool.hears(2)
    held.set()
    pool.hears(1)
    pool.lanes.close()

    assert told == [[2], [3]]


def test_what_went_well_is_told_together() -> None:
    """While something is out and no time passes: the drain need not be woken for each."""
    held = threading.Event()

    def script(request: SentRequest) -> Step:
        if request.body == change(9).payload:
            assert held.wait(10)
        return 200

    pool = Pool(ScriptedTarget(script), lanes=2)
    pool.put(8, lane=1)
    pool.put(1, lane=0)
    pool.hears(2)
    pool.put(9, lane=1)
    pool.put(2, 3, 4, lane=0)
    while len(pool.target.sent) < 6:
        threading.Event().wait(0.001)
    held.set()

    told = pool.hears(4)
    pool.lanes.close()

    assert sorted(map(sorted, told)) == [[2, 3, 4, 9]]


def test_a_suspect_is_the_lanes_own() -> None:
    """The express asks nobody for a permit to wait, and tries nothing only once."""
    pool = Pool(ScriptedTarget())
    asked = pool.asked_for_permits()
    pool.put(1)
    pool.put(2, set_aside=1)
    pool.hears(2)
    pool.lanes.close()

    assert asked == [1, 1]


@pytest.mark.parametrize("how", ["held", "blocked"])
def test_a_key_that_waits_keeps_nobody_else_from_the_express(how: str) -> None:
    pool = Pool(ScriptedTarget())
    asked = pool.asked_for_permits()
    pool.put(1)
    pool.hears(1)
    if how == "held":
        pool.holds.hold([change(2, stream="rows")])
    else:
        pool.holds.block(change(1, "2", stream="rows"))
    pool.put(2, 3)

    told = [one.settlement for one in pool.tidings(2)]
    pool.lanes.close()

    assert [(one.batch_id, len(one.accepted), len(one.dead)) for one in told] == [(2, 0, how == "blocked"), (3, 1, 0)]
    assert [request.body for request in pool.target.sent] == [change(1).payload, change(3).payload]
    assert asked == [1]


def test_what_was_lost_on_its_way_is_sent_again_as_it_was_though_its_key_must_wait_by_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have arrived: parts of it under keys of their own could not be told from it."""
    told_apart = ThreadedMultiplexer.ended

    def ended(self: ThreadedMultiplexer, seconds: float | None) -> Any:
        return [(lane, None if answer == no_answer() else answer) for lane, answer in told_apart(self, seconds)]

    def script(request: SentRequest) -> Step:
        if request.body != change(2).payload or pool.holds.is_held(change(2, stream="rows")):
            return 200
        pool.holds.hold([change(2, stream="rows")])
        return no_answer()

    monkeypatch.setattr(ThreadedMultiplexer, "ended", ended)
    pool = Pool(ScriptedTarget(script))
    pool.put(1, 2)
    told = pool.tidings(2)
    pool.lanes.close()

    assert [len(one.settlement.accepted) for one in told] == [1, 1]
    assert pool.target.keys[1] == pool.target.keys[2]


def test_what_is_out_already_is_tried_again_though_its_key_must_wait_by_now() -> None:
    """A later batch of the key was set aside meanwhile: that is no reason to give this one up half-way."""

    def script(request: SentRequest) -> Step:
        if request.body == change(2).payload and not pool.holds.is_held(change(2, stream="rows")):
            pool.holds.hold([change(2, stream="rows")])
            return 503
        return 200

    pool = Pool(ScriptedTarget(script))
    pool.put(1)
    pool.hears(1)
    pool.put(2)
    told = pool.told.get(timeout=10)
    pool.lanes.close()

    assert [one.change_id for one in told.settlement.accepted] == [2]


def test_a_lane_that_broke_keeps_nobody_from_ending() -> None:
    pool = Pool(ScriptedTarget([200, 200, ZeroDivisionError()]), lanes=2)
    pool.put(1, lane=0)
    pool.hears(1)
    pool.put(2, lane=1)
    pool.hears(1)
    pool.put(3, 4, 5, lane=0, set_aside=1)  # so it is the lane's own thread that sends

    with pytest.raises(ZeroDivisionError):
        pool.hears(1)
    pool.lanes.close()

    assert len(pool.target.sent) == 3


def test_an_express_that_broke_keeps_nobody_from_ending_and_tells_what_it_knows() -> None:
    pool = Pool(ScriptedTarget([200, 200, 200, ZeroDivisionError()]), lanes=2)
    pool.put(1, lane=0)
    pool.put(2, lane=1)
    pool.hears(2)
    pool.put(3, 4, 5, lane=0)

    assert pool.hears(1) == [[3]]
    with pytest.raises(ZeroDivisionError):
        pool.hears(1)
    pool.put(6, lane=1)
    pool.lanes.close()

    assert len(pool.target.sent) == 4


def test_closing_waits_for_what_was_given() -> None:
    pool = Pool(ScriptedTarget(), lanes=3)
    for number in range(1, 31):
        pool.put(number, lane=number % 3)
    pool.lanes.close()

    assert len(pool.target.sent) == 30
    assert sorted(batch for told in pool.hears(30) for batch in told) == list(range(1, 31))


def test_once_the_run_halts_nothing_more_is_sent() -> None:
    pool = Pool(ScriptedTarget())
    pool.put(1)
    pool.hears(1)
    pool.gate.stop("enough")
    pool.put(2, 3)
    pool.lanes.close()

    assert len(pool.target.sent) == 1
    assert pool.hears(2) == [[2], [3]]  # as what they are: not sent, still claimed
