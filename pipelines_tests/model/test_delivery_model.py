"""Delivery against a model: random histories, faults, crashes and configurations, and what must hold after each.

`DISTRIBUTARY_MODEL_EXAMPLES=2000` searches longer than the suite does.
"""

import os
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipelines.delivery.judging import JudgingRules
from pipelines_tests.model.program import (
    Backfill,
    Begin,
    Commit,
    Continue,
    Drain,
    MakeSubject,
    Redrive,
    Register,
    Repair,
    Rival,
    SettleDown,
    Step,
    Write,
    reduced,
    written,
)
from pipelines_tests.model.simulation import SimulatedClock
from pipelines_tests.model.world import (
    FINE,
    Course,
    Crash,
    EmptiedPostgres,
    RouteSpec,
    Setup,
    SimulatedFake,
    Trouble,
    World,
)

EXAMPLES = int(os.environ.get("DISTRIBUTARY_MODEL_EXAMPLES", "0"))

keys = st.sampled_from(["a", "b", "c", "d"])
rows = st.tuples(st.sampled_from(["people", "visits"]), keys)
natures = st.sampled_from(["sound"] * 14 + ["refused", "unrenderable"])
writes = st.lists(
    st.builds(Write, rows, st.sampled_from([False, False, False, True]), natures), min_size=3, max_size=12
).map(tuple)
targets = st.sampled_from(["api", "late"])
which = st.integers(0, 3)

# --- what a target may say --------------------------------------------------------------------------------------------

FAULTS = [500, 502, 503, 504, 408, 423, 425, 429, 507]
PAUSES = [401, 403, 301, 302, 404, 405, 402, 415, 410, 207, 505]
REFUSALS = [400, 409, 413, 422, 418]
seconds = st.sampled_from([0.01, 0.0, 1.0, 20.0])
retry_afters = st.sampled_from([None, None, "1", "30", "9000", "date:20", "-5", "soon"])
applied: st.SearchStrategy[Any] = st.sampled_from(["nothing", "half", "all"])
troubles = st.one_of(
    st.builds(Trouble, kind=st.just("none"), seconds=seconds),
    st.builds(
        Trouble,
        kind=st.just("status"),
        status=st.sampled_from(FAULTS),
        retry_after=retry_afters,
        applied=applied,
        seconds=seconds,
    ),
    st.builds(Trouble, kind=st.just("no answer"), applied=applied, may_have_arrived=st.booleans(), seconds=seconds),
    st.builds(Trouble, kind=st.just("status"), status=st.sampled_from(REFUSALS), seconds=seconds),
    st.builds(
        Trouble,
        kind=st.just("items"),
        items=st.lists(st.sampled_from([0, 0, 503, 429, 422, 401, 500, 409, None]), min_size=1, max_size=5).map(tuple),
        seconds=seconds,
    ),
    st.builds(Trouble, kind=st.just("garbled"), seconds=seconds),
)
pauses = st.builds(Trouble, kind=st.just("status"), status=st.sampled_from(PAUSES), seconds=seconds)
outages = st.sampled_from(
    [FINE] * 5
    + [
        Trouble(kind="status", status=503),
        Trouble(kind="status", status=500, applied="all"),
        Trouble(kind="no answer", seconds=15.0),
        Trouble(kind="no answer", applied="all"),
        Trouble(kind="status", status=401),
    ]
)
points: Any = [
    "leftovers",
    "pending",
    "claim",
    "claimed",
    "split",
    "split up",
    "settle",
    "settled",
    "hold",
    "resume",
    "send",
    "sent",
]
crashes = st.none() | st.builds(
    Crash, point=st.sampled_from(points), nth=st.integers(1, 5), dies=st.booleans(), arrives=st.booleans()
)


# --- what others do while a drain is at work --------------------------------------------------------------------------

meanwhile = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.one_of(
            st.builds(Continue, index=which, then=st.sampled_from(["commit", "roll back"])),
            st.builds(Commit, writes=writes),
            st.builds(Redrive, name=targets, index=which),
            st.just(Rival()),
        ),
    ),
    max_size=3,
).map(tuple)

courses = st.builds(
    Course,
    seed=st.integers(0, 1000),
    multiplexed=st.booleans(),
    troubles=st.builds(
        lambda some, last: (*some, *last), st.lists(troubles, max_size=12), st.just([]) | st.lists(pauses, max_size=1)
    ),
    afterwards=outages,
    crash=crashes,
    stop_at=st.none() | st.integers(1, 4),
    max_seconds=st.sampled_from([None, None, None, 2.0]),
    linger_seconds=st.sampled_from([0.0, 0.0, 1.0]),
    meanwhile=meanwhile,
)

# --- how a target may be configured -----------------------------------------------------------------------------------


def _routes(mode: Any, on_dead: Any) -> st.SearchStrategy[RouteSpec]:
    return st.builds(
        RouteSpec,
        mode=st.just(mode),
        on_dead=st.sampled_from(on_dead),
        verbs=st.sampled_from(["upsert delete", "upsert delete", "upsert", "insert", "insert update delete"]),
        batch=st.sampled_from([0, 2, 3, 5]),
        results=st.sampled_from(["none", "items", "errors"]),
        falls_back=st.booleans(),
        version=st.integers(1, 2),
    )


people_routes = st.one_of(
    _routes("state", ["continue", "block", "supersede"]),
    _routes("event", ["continue", "block"]),
    st.sampled_from([None, RouteSpec(), RouteSpec(batch=5), RouteSpec(batch=5, results="items")]),
)
# Only events are replayed: in mode `state` a replay of an old change would be taken for the row's latest state.
visits_routes = _routes("event", ["continue", "block"]) | st.sampled_from(
    [None, *[RouteSpec(mode="event", batch=3)] * 3]
)
overrides = st.sampled_from(
    [
        JudgingRules(),
        JudgingRules(success_on=frozenset({409})),
        JudgingRules(retryable_status_codes=frozenset({422})),
        JudgingRules(drop_on=frozenset({500, 418})),
        JudgingRules(max_retry_after=10.0),
    ]
)
setups = st.builds(
    Setup,
    people=people_routes,
    visits=visits_routes,
    lanes=st.integers(1, 4),
    window_records=st.integers(2, 20),
    window_bytes=st.sampled_from([1_000_000, 1_000_000, 60]),
    failure_threshold=st.sampled_from([1, 3, 100]),
    dead_letter_guard=st.sampled_from([0.5, 1.0]),
    rules=overrides,
)
pieces = st.one_of(
    st.tuples(st.just("people"), people_routes),
    st.tuples(st.just("visits"), visits_routes),
    st.tuples(st.just("lanes"), st.integers(1, 4)),
    st.tuples(st.just("window_records"), st.integers(2, 12)),
    st.tuples(st.just("rules"), overrides),
).map(lambda piece: (piece,))

drains = st.builds(
    Drain,
    name=targets,
    seconds=st.sampled_from([0.0, 60.0, 4000.0]),
    configure=st.just(()) | pieces,
    writes=writes,
    course=courses,
)


class Delivery(RuleBasedStateMachine):
    """A source, two targets, and drains between them."""

    make_subject: MakeSubject
    last: "Delivery"

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.make_subject)
        self.program: list[Step] = []
        type(self).last = self

    def take(self, step: Step) -> None:
        self.program.append(step)
        step(self.world)

    @initialize(setup=setups, honours_keys=st.booleans())
    def begin(self, setup: Setup, honours_keys: bool) -> None:
        self.take(Register(name="api", honours_keys=honours_keys, setup=setup))

    @precondition(lambda self: "late" not in self.world.places)
    @rule(start=st.sampled_from(["now", "beginning"]), setup=setups, honours_keys=st.booleans())
    def register(self, start: Any, setup: Setup, honours_keys: bool) -> None:
        self.take(Register(name="late", start=start, honours_keys=honours_keys, setup=setup))

    @rule(step=st.builds(Begin, writes=writes))
    def open_transaction(self, step: Begin) -> None:
        self.take(step)

    @precondition(lambda self: self.world.open)
    @rule(step=st.builds(Continue, index=which, writes=writes, then=st.sampled_from(["wait", "commit", "roll back"])))
    def go_on_with_transaction(self, step: Continue) -> None:
        self.take(step)

    @rule(step=st.builds(Repair, name=targets, key=keys))
    def repair(self, step: Repair) -> None:
        self.take(step)

    @rule(step=st.builds(Backfill, name=targets, first=st.integers(0, 50), count=st.integers(1, 4)))
    def backfill(self, step: Backfill) -> None:
        self.take(step)

    @rule(step=st.builds(Redrive, name=targets, index=which))
    def redrive(self, step: Redrive) -> None:
        self.take(step)

    @rule(step=drains)
    def drain(self, step: Drain) -> None:
        self.take(step)

    @rule(step=drains)
    def drain_again(self, step: Drain) -> None:
        self.take(step)

    @rule(step=st.builds(SettleDown, name=targets))
    def settle_down(self, step: SettleDown) -> None:
        self.take(step)

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.world.close)
            if self.world.sound:  # else what failed first is the thing to see
                self.world.finish()


def search(make_subject: MakeSubject, *, examples: int, steps: int) -> None:
    """Look for a program that the model does not agree with; fail with the smallest like it."""
    machine = type("DeliveryOn", (Delivery,), {"make_subject": staticmethod(make_subject)})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=not EXAMPLES,
                database=None,
                report_multiple_bugs=False,
                phases=[Phase.generate],  # it would cut for minutes and hardly drop a step
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        program, words = reduced(make_subject, machine.last.program)
        error.add_note(f"In fewer steps: {words}\nrun({make_subject.__name__}, {written(program)})")
        raise


@pytest.mark.timeout(0 if EXAMPLES else 120)
def test_whatever_happens_the_model_holds() -> None:
    """Nothing is lost, nothing is out of order, every key is stable, on the ledger in plain Python."""
    search(SimulatedFake, examples=EXAMPLES or 100, steps=20)


@pytest.mark.timeout(0 if EXAMPLES else 120)
def test_whatever_happens_the_model_holds_on_postgres(database: str) -> None:
    """The same machine on the real ledger."""

    def postgres(_: SimulatedClock, stack: ExitStack) -> EmptiedPostgres:
        return EmptiedPostgres(database, stack)

    search(postgres, examples=EXAMPLES or 10, steps=20)
