"""Order per key under failure: each change must meet a list of statuses before its target takes or refuses it.

RudderStack's order test (`TestEventOrderGuarantee`: jobs that carry the statuses they are to be answered with) over a
drain: 50 keys with 40 changes each, committed in turns while drains come and go.
"""

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from threading import Lock
from typing import Any
from uuid import UUID

import pytest

from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import Route
from pipelines.delivery.sending import RetryPolicy
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, no_answer, routes_of
from resources.system_clock import SystemClock

pytestmark = pytest.mark.usefixtures("both_ways")

KEYS, CHANGES, TURNS = 50, 40, 8
RESULTS: Any = {"items": "$.results", "id": "id", "status": "status"}
SHAPES: Mapping[str, Any] = {
    "one by one": {"path": "/rows"},
    "in batches": {"path": "/rows", "batch": {"max_records": 7}},
    "in batches with results": {"path": "/rows", "batch": {"max_records": 7}, "results": RESULTS},
}
LOST_BEFORE, LOST_AFTER = -1, -2
FAULTS = (500, 502, 503, 504, 429, 408, LOST_BEFORE, LOST_AFTER)
REFUSED = 400


@dataclass
class Api:
    """A target that answers each change with its statuses in turn, and keeps what it applied, in that order."""

    statuses: Mapping[int, deque[int]]
    with_results: bool
    lock: Lock = field(default_factory=Lock)
    applied: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By key, what a target that honours idempotency keys did."""
    seen: dict[UUID, bytes] = field(default_factory=dict)
    known: set[tuple[UUID, int]] = field(default_factory=set)
    met: int = 0

    def __call__(self, request: SentRequest) -> Step:
        with self.lock:
            assert self.seen.setdefault(request.key, request.body) == request.body, "one key, two bodies"
            document = json.loads(request.body)
            rows = document if isinstance(document, list) else [document]
            return self._answer_each(request, rows) if self.with_results else self._answer_whole(request, rows)

    def _answer_whole(self, request: SentRequest, rows: Sequence[Any]) -> Step:
        for row in rows:
            waiting = self.statuses[row["change"]]
            if waiting and waiting[0] != REFUSED:
                self.met += 1
                status = waiting.popleft()
                if status == LOST_AFTER and not any(REFUSED in self.statuses[row["change"]] for row in rows):
                    self._apply(request, rows)
                return no_answer("the connection broke") if status < 0 else status
        if any(self.statuses[row["change"]] for row in rows):
            return REFUSED
        self._apply(request, rows)
        return 200

    def _answer_each(self, request: SentRequest, rows: Sequence[Any]) -> Step:
        listed = []
        for row in rows:
            waiting = self.statuses[row["change"]]
            if waiting and waiting[0] < 0:
                self.met += 1
                waiting.popleft()
                return no_answer("the connection broke")  # and what was listed so far is not known
        for row in rows:
            waiting = self.statuses[row["change"]]
            status = waiting[0] if waiting else 200
            if status not in (200, REFUSED):
                self.met += 1
                waiting.popleft()
            elif status == 200:
                self._apply(request, [row])
            listed.append({"id": row["id"], "status": status})
        return answer(207, json.dumps({"results": listed}).encode())

    def _apply(self, request: SentRequest, rows: Sequence[Any]) -> None:
        for row in rows:
            if (request.key, row["change"]) not in self.known:
                self.known.add((request.key, row["change"]))
                self.applied[row["id"]].append(row["change"])


def prescribe(dice: Random) -> dict[int, deque[int]]:
    """Return what each change is to meet: mostly nothing, some up to four faults, and one in forty a refusal."""
    prescribed = {}
    for change_id in range(1, KEYS * CHANGES + 1):
        faults = [dice.choice(FAULTS) for _ in range(dice.choice([0, 0, 0, 0, 0, 1, 2, 4]))]
        prescribed[change_id] = deque([*faults, REFUSED] if dice.random() < 0.025 else faults)
    return prescribed


def deliver(ledger: FakeLedger, api: Api, routes: Mapping[str, Route]) -> DrainReport:
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        return drain(
            policy=DrainPolicy(
                target="api",
                max_in_flight=6,
                retry=RetryPolicy(initial_backoff=0.0005, max_backoff=0.001, max_elapsed=0.005),
                failure_threshold=6,
                error_timeout=0.001,
                dead_letter_guard=1.0,
            ),
            routes=routes,
            ledger=target_ledger,
            connect=ScriptedTarget(api).connect,
            clock=SystemClock(),
            limits=DrainLimits(window_records=120),
        )


@pytest.mark.parametrize("on_dead", ["continue", "block"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["event", "state"])
def test_no_key_is_ever_out_of_order_whatever_its_changes_meet(mode: str, shape: str, on_dead: str) -> None:
    """Runs give up on the way, set batches aside and come back; in the end all is there that was not refused."""
    dice = Random(f"{mode} {shape} {on_dead}")
    prescribed = prescribe(dice)
    doomed = {change_id for change_id, statuses in prescribed.items() if REFUSED in statuses}
    api = Api(prescribed, with_results="results" in SHAPES[shape])
    routes = routes_of(rows={"mode": mode, "on_dead": on_dead, "upsert": SHAPES[shape]})
    ledger = FakeLedger(targets={"api": "beginning"}, clock=SystemClock())
    committed: dict[str, list[int]] = defaultdict(list)
    next_id, runs = 1, 0

    for _ in range(TURNS):
        for _ in range(CHANGES // TURNS):
            for key in map(str, dice.sample(range(KEYS), KEYS)):
                payload = b'{"id": "%b", "change": %d}' % (key.encode(), next_id)
                assert ledger.append("rows", key, payload=payload).change_id == next_id
                committed[key].append(next_id)
                next_id += 1
        deliver(ledger, api, routes)
        runs += 1
    while deliver(ledger, api, routes).end != "caught_up":
        runs += 1
        assert runs < 1000

    conservation = ledger.conservation("api")
    assert conservation.holds
    assert (conservation.claimed, conservation.pending) == (0, 0)
    buried = {record.change.change_id for _, record in ledger.dead_letters}
    refused = {record.change.change_id for _, record in ledger.dead_letters if record.blocked_by is None}
    assert refused <= doomed
    assert api.met > KEYS
    assert set(api.seen) <= {batch.idempotency_key for batch in ledger.batches}, "something was sent but not written"
    for key, changes in committed.items():
        applied = api.applied[key]
        assert applied == sorted(applied), f"key {key} went backwards"
        assert len(set(applied)) == len(applied), f"key {key} was given something twice under two keys"
        assert not set(applied) & buried
        if mode == "event":
            assert set(applied) | buried >= set(changes)
        elif changes[-1] not in buried:
            assert applied[-1] == changes[-1]
        if on_dead == "block" and (first := min((one for one in changes if one in refused), default=None)):
            assert all(one < first for one in applied), f"key {key} went on behind its dead letter"
    if mode == "event" and on_dead == "continue":
        assert refused == doomed
