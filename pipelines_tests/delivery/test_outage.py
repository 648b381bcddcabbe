"""A target that is away for ten minutes: run after run, called only by `retry_at`, until it has everything.

The clock is a fake one, so ten minutes take no time; who decides when to run is what decides in `change_sensor`.
"""

import json
from collections.abc import Callable

import pytest

from pipelines.delivery.choosing import choose_targets
from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, no_answer, routes_of

pytestmark = pytest.mark.usefixtures("both_ways")

OUTAGE = 600.0
TICK = 5.0
"""Between two looks of the sensor."""
LONGEST_HOLD = 300.0
KEYS = 40

ROUTES = {
    "state": routes_of(customers={"upsert": {"path": "/rows", "batch": {"max_records": 10}}}),
    "event": routes_of(customers={"mode": "event", "upsert": {"path": "/rows", "batch": {"max_records": 10}}}),
    "singly": routes_of(customers={"mode": "event", "upsert": {"path": "/rows"}}),
}
AWAY: dict[str, Callable[[], Step]] = {
    "nothing listens": lambda: no_answer("cannot connect: refused", may_have_arrived=False),
    "it answers 503": lambda: 503,
    "it answers 500": lambda: 500,
    "it answers 429 with Retry-After": lambda: answer(429, headers={"retry-after": "45"}),
    "it never answers": lambda: no_answer("no answer within 15 s"),
}


class Target:
    """Takes what it is sent but for its ten minutes, and goes by the same clock as the drains."""

    def __init__(self, clock: FakeClock, away: Callable[[], Step]) -> None:
        self._clock, self._away = clock, away
        self._from, self._until = clock.monotonic() + 60.0, clock.monotonic() + 60.0 + OUTAGE
        self.while_away = 0
        self.taken: list[tuple[str, int]] = []
        self.client = ScriptedTarget(self._answer)

    @property
    def seconds_since(self) -> float:
        """How long it has been well again; negative: it is not yet."""
        return self._clock.monotonic() - self._until

    def _answer(self, request: SentRequest) -> Step:
        if self._from <= self._clock.monotonic() < self._until:
            self.while_away += 1
            step = self._away()
            # A request that nobody answers takes its time.
            self._clock.advance(15.0 if step == no_answer("no answer within 15 s") else 0.01)
            return step
        document = json.loads(request.body)
        self.taken += [(row["id"], row["change"]) for row in (document if isinstance(document, list) else [document])]
        return 200


@pytest.mark.parametrize("how", AWAY)
@pytest.mark.parametrize("mode", ROUTES)
def test_ten_minutes_away_bury_nothing_and_are_made_up_for_by_retry_at_alone(mode: str, how: str) -> None:
    """Changes go on meanwhile; nobody launches a run but the sensor's choice, and that waits for `retry_at`."""
    clock = FakeClock()
    ledger = FakeLedger(targets={"api": "beginning"}, clock=clock)
    target = Target(clock, AWAY[how])
    last_of: dict[str, int] = {}
    every: dict[str, list[int]] = {}
    changes, runs, caught_up_after = 0, 0, None

    while caught_up_after is None:
        assert target.seconds_since < LONGEST_HOLD + 60.0, "it is well, and still owed something"
        if target.seconds_since < 0:  # one change of some key for each tick
            changes += 1
            key = str(changes % KEYS)
            last_of[key] = changes
            every.setdefault(key, []).append(changes)
            ledger.append("customers", key, payload=b'{"id": "%b", "change": %d}' % (key.encode(), changes))
        if choose_targets(ledger.owed({"api": ["customers"]})).targets:
            runs += 1
            with ledger.open_target("api", run_id=f"run {runs}") as opened:
                assert opened is not None
                drain(
                    policy=DrainPolicy(target="api", max_in_flight=1),
                    routes=ROUTES[mode],
                    ledger=opened,
                    connect=target.client.connect,
                    clock=clock,
                    limits=DrainLimits(),
                )
        elif target.seconds_since >= 0 and ledger.conservation("api").pending + ledger.conservation("api").claimed == 0:
            caught_up_after = target.seconds_since
        clock.advance(TICK)

    assert not ledger.dead_letters
    found = ledger.conservation("api")
    assert found.holds
    assert (found.dead, found.pending, found.claimed) == (0, 0, 0)
    assert found.accepted + found.superseded == changes
    taken: dict[str, list[int]] = {}
    for key, change in target.taken:
        taken.setdefault(key, []).append(change)
    # Each once and in order: what was never answered was never taken.
    if mode == "state":
        assert {key: ids[-1] for key, ids in taken.items()} == last_of
        assert all(ids == sorted(set(ids)) for ids in taken.values())
    else:
        assert taken == every
    assert 0 < target.while_away < 30, "ten minutes are no time to hammer at a door"
