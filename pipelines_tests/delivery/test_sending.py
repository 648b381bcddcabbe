"""What is sent next, after every answer: the same bytes under the same key, half of them, other bytes, or nothing."""

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_fields

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.batching import Batch
from pipelines.delivery.breaker import Breaker
from pipelines.delivery.gate import Halt, Permit, TargetGate
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.ledger import Claim, Settlement
from pipelines.delivery.planning import claim_of
from pipelines.delivery.sending import RetryPolicy, Sender, Sent
from pipelines.delivery.target import Answer, NoAnswer
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import LOG_ID
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, change, no_answer, routes_of

RESULTS: Any = {"items": "$.results", "id": "id", "status": "status"}
ROUTES = routes_of(
    rows={"upsert": {"path": "/rows", "batch": {"max_records": 1000}}, "delete": {"path": "/rows/${_key}"}},
    items={"upsert": {"path": "/items", "batch": {"max_records": 100}, "results": RESULTS}},
    pairs={
        "insert": {"path": "/pairs", "on_conflict": "update"},
        "update": {"path": "/pairs/${_key}", "on_missing": "insert"},
    },
    newest={"on_dead": "supersede", "upsert": {"path": "/newest"}},
    bulk={
        "insert": {"path": "/bulk", "batch": {"max_records": 100}, "results": RESULTS, "on_conflict": "update"},
        "update": {"path": "/bulk/${_key}", "record": {"id": "$id", "n": "$n"}},
    },
)


def a_batch(changes: Sequence[ChangeRecord], *, stream: str = "rows", kind: Any = "upsert") -> Batch:
    route = ROUTES[stream]
    operation = route.operations[kind]
    fragments = [operation.render_record(one) or b"" for one in changes]
    return Batch(lane=0, route=route, operation=operation, changes=changes, fragments=fragments)


@dataclass
class Lane:
    """A sender with everything around it, on a clock that only waits move."""

    target: ScriptedTarget
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    failure_threshold: int = 1000
    unwell: bool = False
    clock: FakeClock = field(default_factory=FakeClock)
    reported: list[Settlement] = field(default_factory=list)
    written: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    """The batches as which parts were written down, and their members."""
    undecided: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate = TargetGate(
            clock=self.clock,
            breaker=Breaker(
                failure_threshold=self.failure_threshold,
                error_timeout=30.0,
                open_until=self.clock.monotonic() if self.unwell else None,
            ),
            bucket=None,
            dead_letter_guard=1.0,
            one_probe=self.unwell,
        )

    def sender(self) -> Sender:
        return Sender(
            log_id=LOG_ID,
            target="api",
            client=self.target.connect(),
            gate=self.gate,
            rules=JudgingRules(),
            retry=self.retry,
            clock=self.clock,
            report=self.reported.append,
            split=self._split,
        )

    def send(
        self,
        changes: Sequence[ChangeRecord],
        *,
        stream: str = "rows",
        kind: Any = "upsert",
        first: Answer | NoAnswer | None = None,
    ) -> Sent:
        batch = a_batch(changes, stream=stream, kind=kind)
        key = claim_of(batch, log_id=LOG_ID, target="api").idempotency_key
        sent = self.sender().send(7, batch, key=key, first=first)
        told = [*self.reported, sent.settlement]
        whole = msgspec.structs.replace(
            sent.settlement,
            accepted=[one for part in told for one in part.accepted],
            dead=[one for part in told for one in part.dead],
            filtered=[one for part in told for one in part.filtered],
        )
        known = {*ids(whole.accepted), *ids(whole.filtered), *dead_ids(with_fields(sent, settlement=whole))}
        self.undecided = [one for one in ids(changes) if one not in known]
        return with_fields(sent, settlement=whole)

    def _split(self, batch_id: int, parts: Sequence[Claim]) -> Sequence[int]:
        first = 100 + len(self.written)
        self.written += [(first + at, ids(part.changes)) for at, part in enumerate(parts)]
        return range(first, first + len(parts))

    @property
    def halt(self) -> Halt:
        assert self.gate.halt is not None
        return self.gate.halt


def rows(count: int) -> list[ChangeRecord]:
    return [change(i) for i in range(1, count + 1)]


def ids(changes: Sequence[ChangeRecord]) -> list[int]:
    return [one.change_id for one in changes]


def dead_ids(sent: Sent) -> list[int]:
    return [dead.change.change_id for dead in sent.settlement.dead]


def members(request: SentRequest) -> list[int]:
    document = json.loads(request.body)
    return [row["change"] for row in (document if isinstance(document, list) else [document])]


def assert_all_the_same(requests: Sequence[SentRequest]) -> None:
    assert len({request.key for request in requests}) == 1
    assert len({(request.request.method, request.path, request.body) for request in requests}) == 1


# The target's fault ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        no_answer("cannot connect", may_have_arrived=False),
        no_answer("no answer within 15 s"),
        *(408, 425, 429, 500, 502, 503, 504),
    ],
    ids=str,
)
def test_a_fault_of_the_target_is_answered_with_the_same_bytes_under_the_same_key(fault: Step) -> None:
    lane = Lane(ScriptedTarget([fault, fault, fault, 200]))

    sent = lane.send(rows(3))

    assert len(lane.target.sent) == 4
    assert_all_the_same(lane.target.sent)
    assert ids(sent.settlement.accepted) == [1, 2, 3]
    assert lane.undecided == []
    assert sent.settlement.dead == []
    assert (sent.retries, sent.settlement.attempts) == (3, 4)


def test_the_waits_are_full_jitter_and_grow_to_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    lane = Lane(ScriptedTarget([503] * 7), retry=RetryPolicy(initial_backoff=0.5, max_backoff=4.0, max_elapsed=60.0))

    lane.send(rows(1))

    assert lane.clock.naps == (0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_no_wait_is_beyond_its_bound(seed: int) -> None:
    random.seed(seed)
    lane = Lane(ScriptedTarget([503] * 6))

    lane.send(rows(1))

    assert all(0 <= nap <= 0.5 * 2**n for n, nap in enumerate(lane.clock.naps))


def test_a_retry_after_is_waited_for_and_not_a_moment_less() -> None:
    lane = Lane(ScriptedTarget([answer(429, headers={"retry-after": "40"}), 200]))

    sent = lane.send(rows(1))

    assert ids(sent.settlement.accepted) == [1]
    assert sum(lane.clock.naps) == pytest.approx(40.0)


def test_after_max_elapsed_the_drain_defers_and_the_batch_stays_as_it_is() -> None:
    """No record is to blame, so none is settled; the run sends nothing more."""
    lane = Lane(ScriptedTarget(then=503))

    sent = lane.send(rows(3))

    assert lane.undecided
    assert (sent.settlement.accepted, sent.settlement.dead) == ([], [])
    assert (lane.halt.cause, lane.halt.reason) == ("deferred", "answered 503")
    assert sum(lane.clock.naps) <= 60.0
    assert_all_the_same(lane.target.sent)
    requests = len(lane.target.sent)
    assert requests > 3
    lane.send([change(9)])
    assert lane.undecided == [9]
    assert len(lane.target.sent) == requests


def test_a_budget_of_nought_is_one_attempt() -> None:
    lane = Lane(ScriptedTarget(then=503), retry=RetryPolicy(max_elapsed=0.0))

    sent = lane.send(rows(1))

    assert len(lane.target.sent) == 1
    assert (sent.retries, len(lane.undecided)) == (0, 1)


def test_a_retry_after_beyond_the_budget_defers_at_once_and_is_remembered() -> None:
    lane = Lane(ScriptedTarget([answer(503, headers={"retry-after": "600"})]))

    lane.send(rows(1))

    assert len(lane.target.sent) == 1
    assert lane.clock.naps == ()
    assert lane.halt.retry_after == pytest.approx(600.0)


def test_the_breaker_opens_within_the_budget_and_one_request_probes() -> None:
    lane = Lane(ScriptedTarget([503, 503, 503, 200]), failure_threshold=3)

    sent = lane.send(rows(1))

    assert len(lane.target.sent) == 4
    assert ids(sent.settlement.accepted) == [1]
    assert 30.0 <= sum(lane.clock.naps) <= 32.0
    assert lane.gate.healthy


def test_an_unwell_target_that_fails_its_probe_gets_exactly_one_request() -> None:
    lane = Lane(ScriptedTarget(then=503), unwell=True)

    sent = lane.send(rows(3))

    assert len(lane.target.sent) == 1
    assert lane.halt.cause == "deferred"
    assert (sent.retries, len(lane.undecided)) == (0, 3)


# Credentials and configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "cause"),
    [(401, "credentials"), (403, "credentials"), (302, "configuration"), (404, "configuration"), (410, "gone")],
)
def test_a_pause_sends_nothing_more_and_blames_no_record(status: int, cause: str) -> None:
    lane = Lane(ScriptedTarget(then=status))

    first = lane.send(rows(3))
    second = lane.send([change(9)])

    assert len(lane.target.sent) == 1
    assert lane.halt.cause == cause
    for sent in (first, second):
        assert lane.undecided
        assert sent.settlement.dead == []


# One record's fault ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_a_record_that_is_refused_is_never_sent_a_second_time(status: int) -> None:
    lane = Lane(ScriptedTarget([answer(status, b"bad e-mail")]))

    sent = lane.send(rows(1))

    assert len(lane.target.sent) == 1
    assert lane.clock.naps == ()
    (dead,) = sent.settlement.dead
    assert (dead.change.change_id, dead.status, dead.response) == (1, status, "bad e-mail")
    assert lane.undecided == []


def test_a_refusal_after_faults_is_the_records_and_the_breaker_is_closed_by_it() -> None:
    lane = Lane(ScriptedTarget([503, 503, 422]))

    sent = lane.send(rows(1))

    assert dead_ids(sent) == [1]
    assert lane.gate.failures == 0


def test_deleting_what_is_gone_is_done() -> None:
    lane = Lane(ScriptedTarget([404]))

    sent = lane.send([change(1, operation="delete")], kind="delete")

    assert ids(sent.settlement.accepted) == [1]


# A batch's fault: bisecting -------------------------------------------------------------------------------------------


def refusing(bad: Collection[int], status: int = 400) -> Callable[[SentRequest], Step]:
    return lambda request: status if set(members(request)) & set(bad) else 200


@pytest.mark.parametrize("count", [2, 3, 8, 100, 1000])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_halving_finds_the_one_bad_record_and_the_others_are_accepted(count: int, where: str) -> None:
    bad = {"first": 1, "middle": count // 2 + 1, "last": count}[where]
    lane = Lane(ScriptedTarget(refusing([bad])))

    sent = lane.send(rows(count))

    assert len(lane.target.sent) <= 2 * (count - 1).bit_length() + 1
    assert dead_ids(sent) == [bad]
    assert sorted(ids(sent.settlement.accepted)) == [i for i in range(1, count + 1) if i != bad]
    assert lane.undecided == []
    assert sent.retries == 0


@given(count=st.integers(1, 60), data=st.data())
@settings(max_examples=40, deadline=None)
def test_halving_finds_exactly_the_bad_records_in_order(count: int, data: st.DataObject) -> None:
    """Whatever is bad: each good record is taken once, each bad one refused once, and never out of order."""
    bad = data.draw(st.sets(st.integers(1, count)))
    lane = Lane(ScriptedTarget(refusing(bad)))

    sent = lane.send(rows(count))

    assert set(dead_ids(sent)) == bad
    assert ids(sent.settlement.accepted) == [i for i in range(1, count + 1) if i not in bad]
    fates = [members(r) for r in lane.target.sent if not set(members(r)) & bad or len(members(r)) == 1]
    assert [one for taken in fates for one in taken] == list(range(1, count + 1))


def test_a_half_that_was_accepted_is_reported_before_the_next_is_sent() -> None:
    """After a crash in between it must not go out again within the whole, under the whole's key."""
    known_at: dict[int, list[int]] = {}

    def script(request: SentRequest) -> Step:
        known_at[members(request)[0]] = [one.change_id for part in lane.reported for one in part.accepted]
        return 413 if len(members(request)) > 2 else 200

    lane = Lane(ScriptedTarget(script))

    lane.send(rows(4))

    assert known_at == {1: [], 3: [1, 2]}


def test_what_is_sent_in_parts_is_written_down_as_parts_before() -> None:
    """Else a part that was applied before a crash could go out again within another, under that one's key."""
    lane = Lane(ScriptedTarget(refusing([5])))
    written_at: dict[tuple[int, ...], list[Sequence[int]]] = {}
    script = refusing([5])
    lane.target = ScriptedTarget(
        lambda request: (
            written_at.update({tuple(members(request)): [part for _, part in lane.written]}) or script(request)
        )  # type: ignore[func-returns-value]
    )

    lane.send(rows(8))

    whole = tuple(range(1, 9))
    assert written_at.pop(whole) == []
    assert all(list(part) in written for part, written in written_at.items())
    settled = {
        part.batch_id: [*ids(part.accepted), *(dead.change.change_id for dead in part.dead)] for part in lane.reported
    }
    of_part = dict(lane.written)
    assert all(set(known) <= set(of_part[batch_id]) for batch_id, known in settled.items() if known)


def test_the_keys_of_the_halves_are_the_same_after_a_crash() -> None:
    """A part that was accepted before the crash is known by its key when it comes again."""
    first, second = Lane(ScriptedTarget(refusing([5]))), Lane(ScriptedTarget(refusing([5])))

    first.send(rows(16))
    second.send(rows(16))

    assert [(r.key, r.body) for r in first.target.sent] == [(r.key, r.body) for r in second.target.sent]
    bodies: dict[UUID, set[bytes]] = {}
    for request in first.target.sent:
        bodies.setdefault(request.key, set()).add(request.body)
    assert all(len(each) == 1 for each in bodies.values())


def test_an_outage_amid_the_halving_settles_what_is_known_and_keeps_the_rest() -> None:
    lane = Lane(ScriptedTarget([400, 200, 400, 422], then=503))  # 1-8, 1-4, 5-8, 5-6 and then nothing more of 5, 6

    sent = lane.send(rows(8))

    assert ids(sent.settlement.accepted) == [1, 2, 3, 4]
    assert dead_ids(sent) == []
    assert lane.undecided
    assert lane.halt.cause == "deferred"


def test_a_413_is_halved_and_what_was_too_large_is_learned() -> None:
    lane = Lane(ScriptedTarget(lambda request: 413 if len(members(request)) > 3 else 200))

    sent = lane.send(rows(10))

    assert ids(sent.settlement.accepted) == list(range(1, 11))
    assert sent.too_large == 5
    assert max(len(members(request)) for request in lane.target.sent[-2:]) <= 3


def test_one_record_that_is_too_large_is_dead() -> None:
    lane = Lane(ScriptedTarget(refusing([2], status=413)))

    sent = lane.send(rows(3))

    assert dead_ids(sent) == [2]
    assert ids(sent.settlement.accepted) == [1, 3]


# Results per item -----------------------------------------------------------------------------------------------------


def item_wise(*rounds: dict[int, int]) -> Callable[[SentRequest], Step]:
    """Answer each round with these statuses by change id; 200 for all others."""

    def script(request: SentRequest) -> Step:
        statuses = rounds[request.number] if request.number < len(rounds) else {}
        results = [{"id": row["id"], "status": statuses.get(row["change"], 200)} for row in json.loads(request.body)]
        return answer(200, json.dumps({"results": results}).encode())

    return script


def test_only_the_records_that_failed_are_sent_again() -> None:
    lane = Lane(ScriptedTarget(item_wise({2: 503, 3: 422, 4: 429})))

    sent = lane.send(rows(5), stream="items")

    assert [members(request) for request in lane.target.sent] == [[1, 2, 3, 4, 5], [2, 4]]
    assert sorted(ids(sent.settlement.accepted)) == [1, 2, 4, 5]
    assert dead_ids(sent) == [3]
    assert lane.target.keys[0] != lane.target.keys[1]


def test_records_that_are_put_off_wait_like_any_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that takes one record of a hundred at a time is not asked a hundred times at once."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    lane = Lane(ScriptedTarget(item_wise({2: 429, 3: 429}, {3: 429})))

    sent = lane.send(rows(3), stream="items")

    assert ids(sent.settlement.accepted) == [1, 2, 3]
    assert lane.clock.naps == (0.5, 0.5)
    assert sent.retries == 2


def test_when_not_one_record_is_decided_the_same_bytes_follow_under_the_same_key() -> None:
    lane = Lane(ScriptedTarget(item_wise({1: 503, 2: 503}, {1: 503, 2: 503})))

    sent = lane.send(rows(2), stream="items")

    assert len(lane.target.sent) == 3
    assert_all_the_same(lane.target.sent)
    assert ids(sent.settlement.accepted) == [1, 2]


def test_when_no_record_is_ever_decided_the_batch_is_set_aside() -> None:
    lane = Lane(ScriptedTarget(item_wise(*[{1: 503, 2: 503}] * 1000)))

    sent = lane.send(rows(2), stream="items")

    assert lane.undecided
    assert (sent.settlement.set_aside, sent.set_aside) == (True, 2)
    assert lane.gate.in_doubt
    assert sum(lane.clock.naps) <= 60.0


def test_one_record_that_is_put_off_for_ever_is_set_aside_and_the_others_are_settled() -> None:
    lane = Lane(ScriptedTarget(item_wise(*[{2: 503}] * 1000)))

    sent = lane.send(rows(3), stream="items")

    assert ids(sent.settlement.accepted) == [1, 3]
    assert lane.undecided
    assert (sent.settlement.set_aside, sent.set_aside) == (True, 1)
    assert lane.gate.halt is None


def test_results_that_cannot_be_read_are_asked_for_again_under_the_same_key() -> None:
    lane = Lane(ScriptedTarget([answer(200, b"<html>"), answer(200, b'{"results": [{"id": "1", "status": 200}]}')]))

    sent = lane.send(rows(1), stream="items")

    assert_all_the_same(lane.target.sent)
    assert ids(sent.settlement.accepted) == [1]


# Fallbacks ------------------------------------------------------------------------------------------------------------


def test_an_insert_of_what_is_there_becomes_an_update() -> None:
    lane = Lane(ScriptedTarget([409, 200]))

    sent = lane.send([change(1, "a", operation="insert")], stream="pairs", kind="insert")

    assert [(r.request.method, r.path) for r in lane.target.sent] == [("POST", "/pairs"), ("PATCH", "/pairs/a")]
    assert ids(sent.settlement.accepted) == [1]
    assert len(set(lane.target.keys)) == 2


def test_an_update_of_what_is_not_there_becomes_an_insert() -> None:
    lane = Lane(ScriptedTarget([404, 201]))

    sent = lane.send([change(1, "a")], stream="pairs", kind="update")

    assert [(r.request.method, r.path) for r in lane.target.sent] == [("PATCH", "/pairs/a"), ("POST", "/pairs")]
    assert ids(sent.settlement.accepted) == [1]


def test_a_record_does_not_fall_back_and_forth() -> None:
    lane = Lane(ScriptedTarget([409, 404]))

    sent = lane.send([change(1, "a", operation="insert")], stream="pairs", kind="insert")

    assert len(lane.target.sent) == 2
    assert dead_ids(sent) == [1]
    assert lane.undecided == []


def test_the_fallback_keeps_its_key_through_an_outage() -> None:
    lane = Lane(ScriptedTarget([409, 503, 503, 200]))

    sent = lane.send([change(1, "a", operation="insert")], stream="pairs", kind="insert")

    assert_all_the_same(lane.target.sent[1:])
    assert ids(sent.settlement.accepted) == [1]


def test_items_fall_back_one_by_one_and_what_cannot_be_rendered_is_dead() -> None:
    def payload(number: int) -> bytes:
        return b'{"id": "%d", "change": %d%b}' % (number, number, b"" if number == 3 else b', "n": 0')

    in_conflict = item_wise({2: 409, 3: 409, 4: 409})
    updated = {"/bulk/2": 200, "/bulk/4": 422}
    lane = Lane(ScriptedTarget(lambda request: updated.get(request.path) or in_conflict(request)))

    sent = lane.send(
        [change(n, operation="insert", payload=payload(n)) for n in (1, 2, 3, 4)], stream="bulk", kind="insert"
    )

    assert [r.path for r in lane.target.sent] == ["/bulk", "/bulk/2", "/bulk/4"]
    assert ids(sent.settlement.accepted) == [1, 2]
    assert sorted(dead_ids(sent)) == [3, 4]
    assert lane.undecided == []


# Halts from elsewhere -------------------------------------------------------------------------------------------------


def test_a_stop_lets_the_request_in_flight_be_answered_and_sends_no_other() -> None:
    """A graceful stop finishes what is out; a failure of it is not retried."""

    def stop_then(status: int) -> Callable[[SentRequest], Step]:
        def script(_: SentRequest) -> Step:
            lane.gate.stop("the run was asked to stop")
            return status

        return script

    for status, accepted in ((200, [1]), (503, [])):
        lane = Lane(ScriptedTarget(stop_then(status)))
        sent = lane.send(rows(1))

        assert ids(sent.settlement.accepted) == accepted
        assert len(lane.target.sent) == 1
        assert lane.halt.cause == "stopped"


def test_a_stop_amid_the_halving_keeps_what_is_known() -> None:
    lane = Lane(ScriptedTarget())

    def script(request: SentRequest) -> Step:
        if request.number == 1:
            lane.gate.stop("the run was asked to stop")
        return 400 if request.number == 0 else 200

    lane.target = ScriptedTarget(script)
    sent = lane.send(rows(4))

    assert ids(sent.settlement.accepted) == [1, 2]
    assert lane.undecided


def test_what_is_known_of_the_last_answer_is_written_down() -> None:
    lane = Lane(ScriptedTarget([503, no_answer("reset"), answer(422, b"bad")]))

    sent = lane.send(rows(1))

    assert (sent.settlement.batch_id, sent.settlement.attempts, sent.settlement.status) == (7, 3, 422)
    assert sent.settlement.error == "answered 422"
    assert sent.settlement.seconds == 0.01
    assert list(sent.latencies) == [0.01, 0.01]


# A first attempt that somebody else made ------------------------------------------------------------------------------


def items_of(statuses: Mapping[int, int]) -> Answer:
    listed = [{"id": str(number), "status": status} for number, status in statuses.items()]
    return answer(200, json.dumps({"results": listed}).encode())


def told_of(sent: Sent) -> tuple[object, ...]:
    """Return all that it says; of nothing there are a list and a tuple."""
    one = sent.settlement
    known = (one.batch_id, list(one.accepted), list(one.dead), list(one.filtered), one.supersedes, one.set_aside)
    return (*known, one.attempts, one.status, one.seconds, one.error, list(sent.latencies), sent.retries)


@pytest.mark.parametrize(
    ("stream", "said"),
    [("rows", answer(200)), ("items", items_of({1: 200, 2: 201})), ("newest", answer(204))],
    ids=["all at once", "one by one", "what is newer counts"],
)
def test_an_answer_that_settles_all_of_a_batch_comes_to_what_sending_it_does(stream: str, said: Answer) -> None:
    changes = [change(1, stream=stream)] if stream == "newest" else [change(1, stream=stream), change(2, stream=stream)]
    lane, other = Lane(ScriptedTarget()), Lane(ScriptedTarget([said]))
    for _ in range(2):
        for gate in (lane.gate, other.gate):
            gate.failed(Permit(probe=False), "answered 503")

    sent = lane.sender().end(7, a_batch(changes, stream=stream), said)

    assert sent is not None
    assert told_of(sent) == told_of(other.send(changes, stream=stream))
    assert sent.settlement.supersedes == (stream == "newest")
    assert (lane.gate.failures, lane.gate.successes) == (other.gate.failures, other.gate.successes) == (0, 1)


def test_what_was_accepted_at_once_counts_for_the_guard() -> None:
    """Twenty refusals are too many of forty records, and not of two hundred."""
    lane = Lane(ScriptedTarget())
    lane.gate._guard = 0.5
    for number in range(1, 181):
        assert lane.sender().end(7, a_batch([change(number, stream="rows")]), answer(200)) is not None
    lane.gate.judge_records(accepted=0, dead=20, of=("rows", "upsert"))

    assert lane.gate.halt is None


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ("rows", answer(503)),
        ("rows", answer(401)),
        ("rows", answer(422)),
        ("rows", no_answer()),
        ("items", items_of({1: 200, 2: 422})),
        ("items", items_of({1: 200, 2: 503})),
        ("items", answer(200, b"not JSON")),
    ],
    ids=str,
)
def test_any_other_first_answer_is_gone_on_from_as_if_the_lane_had_had_it(stream: str, said: Answer | NoAnswer) -> None:
    changes = [change(1, stream=stream), change(2, stream=stream)]
    later: list[Step] = [items_of({1: 200, 2: 200})] if stream == "items" else []
    lane, other = Lane(ScriptedTarget(later)), Lane(ScriptedTarget([said, *later]))

    assert lane.sender().end(7, a_batch(changes, stream=stream), said) is None
    random.seed(1)
    sent = lane.send(changes, stream=stream, first=said)

    random.seed(1)
    assert told_of(sent) == told_of(other.send(changes, stream=stream))
    assert [one.request for one in lane.target.sent] == [one.request for one in other.target.sent][1:]
    assert lane.clock.naps == other.clock.naps
    assert (lane.gate.failures, lane.gate.halt) == (other.gate.failures, other.gate.halt)
    assert lane.written == other.written
