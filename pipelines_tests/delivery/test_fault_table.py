"""Every row of the table in docs/faults.md as behaviour; a row without a test fails, and a test without a row too."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.drain import DrainLimits, DrainPolicy, drain
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.report import DrainReport
from pipelines.delivery.retrying import backoff
from pipelines.delivery.routing import Route
from pipelines.delivery.sending import RetryPolicy
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer, change, no_answer, routes_of

pytestmark = pytest.mark.usefixtures("both_ways")

TABLE = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()
BATCH: Any = {"path": "/rows", "batch": {"max_records": 3}}
RESULTS: Any = {**BATCH, "results": {"items": "$.results", "id": "id", "status": "status"}}
BATCHES = routes_of(customers={"upsert": BATCH, "delete": {"path": "/rows/${_key}"}})
SINGLY = routes_of(customers={"mode": "event", "upsert": {"path": "/rows"}})

covered: dict[str, str] = {}


def row(beginning: str) -> Callable[[Any], Any]:
    """Say of which row of the table a test is."""

    def note(test: Any) -> Any:
        covered[beginning] = test.__name__
        return test

    return note


def rows_of_the_table() -> list[str]:
    table = TABLE.split("| what came back |")[1].split("\n\n")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    rows = rows_of_the_table()

    assert len(rows) > 10
    assert [text for text in rows if not any(text.startswith(beginning) for beginning in covered)] == []
    assert [beginning for beginning in covered if not any(text.startswith(beginning) for text in rows)] == []


class World:
    """A target, a ledger with some changes for it, and a clock; each `run` is a run."""

    def __init__(self, target: ScriptedTarget, changes: int | Sequence[ChangeRecord] = 6) -> None:
        self.clock = FakeClock()
        records = [change(i) for i in range(1, changes + 1)] if isinstance(changes, int) else changes
        self.ledger = FakeLedger(targets={"api": "beginning"}, changes=records, clock=self.clock)
        self.target = target

    def run(self, routes: Mapping[str, Route] = BATCHES, **policy: Any) -> DrainReport:
        with self.ledger.open_target("api", run_id="run") as ledger:
            assert ledger is not None
            return drain(
                policy=DrainPolicy(target="api", max_in_flight=1, **policy),
                routes=routes,
                ledger=ledger,
                connect=self.target.connect,
                clock=self.clock,
                limits=DrainLimits(window_records=30),
            )

    def counts(self) -> dict[str, int]:
        """Return where the changes are, without the zeros, and that none is missing."""
        found = self.ledger.conservation("api")
        assert found.holds
        names = ("accepted", "superseded", "filtered", "dead", "claimed", "pending")
        return {name: count for name in names if (count := getattr(found, name))}

    @property
    def retry_in(self) -> timedelta | None:
        retry_at = self.ledger.states["api"].retry_at
        return None if retry_at is None else retry_at - self.clock.now()

    @property
    def status(self) -> str:
        return self.ledger.states["api"].status

    @property
    def dead(self) -> list[int]:
        return [letter.change.change_id for _, letter in self.ledger.dead_letters]


def ids(request: SentRequest) -> list[int]:
    document = json.loads(request.body)
    return [one["change"] for one in (document if isinstance(document, list) else [document])]


def refusing(*change_ids: int, status: int = 422) -> ScriptedTarget:
    return ScriptedTarget(lambda request: status if set(ids(request)) & set(change_ids) else 200)


def assert_repeats_are_repeats(target: ScriptedTarget) -> None:
    said: dict[Any, set[Any]] = {}
    for request in target.sent:
        said.setdefault(request.key, set()).add((request.path, request.body))
    assert all(len(each) == 1 for each in said.values())


# The target's fault ---------------------------------------------------------------------------------------------------


@row("DNS, connect or TLS error; 408")
@pytest.mark.parametrize(
    "fault",
    [
        no_answer("cannot connect", may_have_arrived=False),
        *(408, 420, 421, 423, 425, 429, 430, 500, 501, 502, 503, 504, 507, 520, 599),
    ],
    ids=str,
)
def test_a_fault_of_the_target_costs_waits_and_no_record(fault: Step) -> None:
    world = World(ScriptedTarget([fault] * 3))

    report = world.run()

    assert (report.end, world.counts()) == ("caught_up", {"accepted": 6})
    assert [request.key for request in world.target.sent].count(world.target.sent[0].key) == 4
    assert_repeats_are_repeats(world.target)
    assert len(world.clock.naps) >= 3


@row("DNS, connect or TLS error; 408")
def test_it_counts_for_the_breaker_which_outlives_the_run() -> None:
    """Closed, open after five in a row; then one probe; and in the next run one probe alone, until it succeeds."""
    world = World(ScriptedTarget(then=503))
    first = world.run(retry=RetryPolicy(max_elapsed=20), error_timeout=30)
    at_first, waited = len(world.target.sent), world.retry_in
    again = [world.run(error_timeout=30) for _ in range(2)]
    waited_longer = world.retry_in
    world.target = ScriptedTarget()

    last = world.run()

    assert (first.end, at_first) == ("deferred", 5)
    assert waited == timedelta(seconds=30)
    assert [report.requests for report in again] == [1, 1]
    assert waited_longer == timedelta(seconds=120)
    assert (last.end, world.counts(), world.retry_in) == ("caught_up", {"accepted": 6}, None)


def test_waits_keep_their_jitter_at_the_cap() -> None:
    """Lanes and processes that failed together do not come back together, however often they have failed."""
    random.seed(7)
    wait = backoff(initial_backoff=0.5, max_backoff=30.0)

    class State:
        attempt_number = 40

    waits = [wait(State()) for _ in range(400)]  # type: ignore[arg-type]

    assert max(waits) <= 30
    assert max(waits) > 25
    assert min(waits) < 5
    assert len(set(waits)) > 350


@row("time-out or reset after the request left")
@pytest.mark.parametrize(
    "fault", [no_answer("no answer within 15 s"), answer(200, b"<html>")], ids=["silence", "riddle"]
)
def test_an_unknown_outcome_stays_claimed_and_is_asked_for_under_the_same_key(fault: Step) -> None:
    world = World(ScriptedTarget(then=fault), 2)
    routes = routes_of(customers={"upsert": RESULTS})
    world.run(routes)
    assert world.counts() == {"claimed": 2}
    unanswered = world.target.sent[0]
    world.target = ScriptedTarget(
        lambda request: answer(
            200, json.dumps({"results": [{"id": str(i), "status": 200} for i in ids(request)]}).encode()
        )
    )

    report = world.run(routes)

    assert report.end == "caught_up"
    assert [(r.key, r.body) for r in world.target.sent] == [(unanswered.key, unanswered.body)]


@row("for longer than `retry.max_elapsed` one of these")
def test_what_fails_for_ever_while_others_succeed_is_set_aside() -> None:
    world = World(refusing(2, status=500), 9)

    report = world.run()

    assert report.end == "deferred"
    assert "set aside" in (report.reason or "")
    assert world.counts() == {"accepted": 6, "claimed": 3}
    assert world.status == "active"


@row("for longer than `retry.max_elapsed` one of these")
def test_one_record_that_is_answered_with_a_retry_after_for_ever_is_set_aside() -> None:
    """A gateway puts one on every 500. It is waited for; but it does not make one record's fault the target's."""
    unwell = answer(500, headers={"retry-after": "1"})
    world = World(ScriptedTarget(lambda request: unwell if 3 in ids(request) else 200), 12)

    first, second = world.run(SINGLY), world.run(SINGLY)

    for report in (first, second):
        assert report.end == "deferred"
        assert "1 set aside while others are accepted" in (report.reason or "")
        assert world.counts() == {"accepted": 11, "claimed": 1}
    assert_repeats_are_repeats(world.target)


@row("for longer than `retry.max_elapsed` one of these")
def test_a_retry_after_longer_than_that_is_the_targets_and_nothing_is_sent_meanwhile() -> None:
    world = World(ScriptedTarget(then=answer(500, headers={"retry-after": "600"})), 12)

    report = world.run(SINGLY)

    assert (report.end, len(world.target.sent), world.retry_in) == ("deferred", 1, timedelta(seconds=600))
    assert not world.dead


@row("`Retry-After`")
@pytest.mark.parametrize(
    ("header", "seconds"),
    [("40", 40), ("Wed, 01 Jan 2025 00:00:50 GMT", 50), ("-5", 0), ("0", 0), ("tomorrow", 0), ("9" * 30, 3600)],
)
def test_the_whole_target_waits_for_as_long_as_it_asked(header: str, seconds: int) -> None:
    """In seconds or to a date; what is negative or no time at all is an ordinary fault; the absurd is capped."""
    world = World(ScriptedTarget([answer(429, headers={"retry-after": header})]))

    report = world.run(retry=RetryPolicy(max_elapsed=60))

    if seconds <= 60:
        assert (report.end, world.counts()) == ("caught_up", {"accepted": 6})
        assert sum(world.clock.naps) >= seconds
        assert len(world.target.sent) == 3
    else:
        assert (report.end, len(world.target.sent)) == ("deferred", 1)
        assert world.retry_in == timedelta(seconds=seconds)


@row("401 403 407 419 440 498")
@pytest.mark.parametrize("status", [401, 403, 407, 419, 440, 498])
@pytest.mark.parametrize("where", ["whole", "items"])
def test_refused_credentials_pause_the_target_until_a_probe_succeeds(status: int, where: str) -> None:
    def items(request: SentRequest) -> Step:
        return answer(207, json.dumps({"results": [{"id": str(i), "status": status} for i in ids(request)]}).encode())

    routes = routes_of(customers={"upsert": RESULTS if where == "items" else BATCH})
    world = World(ScriptedTarget(then=status) if where == "whole" else ScriptedTarget(items))
    first = world.run(routes)
    second = world.run(routes, probe_interval=300)
    assert (first.end, second.end, world.status) == ("paused", "paused", "paused")
    assert "credentials" in (second.reason or "")
    assert [first.requests, second.requests] == [1, 1]
    assert world.retry_in == timedelta(seconds=300)
    assert world.dead == []
    world.target = (
        ScriptedTarget()
        if where == "whole"
        else ScriptedTarget(
            lambda request: answer(
                207, json.dumps({"results": [{"id": str(i), "status": 200} for i in ids(request)]}).encode()
            )
        )
    )

    assert world.run(routes).end == "caught_up"
    assert (world.status, world.counts()) == ("active", {"accepted": 6})


@row("3xx (never followed)")
@pytest.mark.parametrize("what", [300, 301, 302, 307, 308, 402, 404, 405, 406, 411, 415, 426, 428, 505, 207])
def test_a_wrong_configuration_pauses_the_target_until_a_probe_succeeds(what: int) -> None:
    world = World(ScriptedTarget(then=what))

    report = world.run()

    assert (report.end, world.status, world.dead) == ("paused", "paused", [])
    assert world.retry_in == timedelta(seconds=300)
    world.target = ScriptedTarget()
    assert world.run().end == "caught_up"
    assert world.counts() == {"accepted": 6}


@row("410 where the path names no record")
def test_a_collection_that_is_gone_disables_the_target() -> None:
    world = World(ScriptedTarget(then=410))

    report = world.run()

    assert (report.end, world.status, world.retry_in) == ("paused", "disabled", None)
    assert world.counts() == {"claimed": 6}


# The record's fault ---------------------------------------------------------------------------------------------------


@row("400 409 422 and other 4xx on one record")
@pytest.mark.parametrize("status", [400, 409, 413, 414, 418, 422, 431, 451])
def test_a_refused_record_is_a_dead_letter_and_the_next_goes_on(status: int) -> None:
    said = answer(status, b'{"error": "no such country"}')
    world = World(ScriptedTarget(lambda request: said if ids(request) == [2] else 200), 4)

    report = world.run(SINGLY)

    [(_, letter)] = world.ledger.dead_letters
    assert (letter.change.change_id, letter.status, letter.response) == (2, status, '{"error": "no such country"}')
    assert (report.end, world.counts()) == ("caught_up", {"accepted": 3, "dead": 1})
    assert len(world.target.sent) == 4


@row("400 409 422 and other 4xx on one record")
def test_drop_on_makes_a_dead_letter_of_any_status() -> None:
    world = World(refusing(2, status=503), 4)

    world.run(SINGLY, rules=JudgingRules(drop_on=frozenset({503})))

    assert (world.dead, world.counts()) == ([2], {"accepted": 3, "dead": 1})


@row("409 to a repeat whose outcome is not known")
@pytest.mark.parametrize(("routes", "changes"), [(SINGLY, 1), (BATCHES, 3)], ids=["one record", "a batch"])
def test_a_409_while_the_first_attempt_is_still_in_work_buries_and_splits_nothing(
    routes: dict[str, Route], changes: int
) -> None:
    world = World(ScriptedTarget([no_answer("no answer within 15 s"), 409, 409, 200]), changes)

    report = world.run(routes)

    assert (report.end, world.counts()) == ("caught_up", {"accepted": changes})
    assert len(set(world.target.keys)) == 1
    assert_repeats_are_repeats(world.target)


@row("409 to a repeat whose outcome is not known")
def test_a_409_that_stays_is_the_records() -> None:
    world = World(ScriptedTarget([no_answer()], then=409), 1)

    report = world.run(SINGLY, retry=RetryPolicy(max_elapsed=20))

    assert (report.end, world.dead, world.counts()) == ("caught_up", [1], {"dead": 1})
    assert len(world.target.sent) >= 6  # the longest that five waits can be is 15.5 s
    assert len(set(world.target.keys)) == 1


@row("409 to a repeat whose outcome is not known")
@pytest.mark.parametrize(
    ("before", "rules"),
    [([], JudgingRules()), ([429], JudgingRules()), ([500], JudgingRules(drop_on=frozenset({409})))],
)
def test_a_409_that_cannot_be_that_is_a_refusal_at_once(before: list[Step], rules: JudgingRules) -> None:
    world = World(ScriptedTarget([*before, 409]), 1)

    world.run(SINGLY, rules=rules)

    assert (world.counts(), len(world.target.sent)) == ({"dead": 1}, len(before) + 1)


@row("the same on a batch")
@pytest.mark.parametrize("status", [400, 409, 413, 422])
def test_a_batch_whose_error_names_no_record_is_halved_until_the_bad_one_stands_alone(status: int) -> None:
    world = World(refusing(5, status=status), 9)

    report = world.run(dead_letter_guard=1.0)

    assert (report.end, world.dead) == ("caught_up", [5])
    assert world.counts() == {"accepted": 8, "dead": 1}
    assert_repeats_are_repeats(world.target)


@row("the same on a batch")
def test_after_a_413_the_batches_are_smaller_for_the_rest_of_the_run() -> None:
    world = World(ScriptedTarget(lambda request: 413 if len(ids(request)) > 1 else 200), 90)

    world.run()

    assert world.counts() == {"accepted": 90}
    assert {len(ids(request)) for request in world.target.sent if ids(request)[0] > 60} == {1}


@row("2xx with `results`")
def test_each_record_of_a_batch_is_judged_by_its_own_result() -> None:
    """Accepted, refused, to be sent again, and one without a word."""

    def script(request: SentRequest) -> Step:
        fates = {1: 200, 2: 422, 3: 429} if request.number == 0 else {}
        listed = [{"id": str(i), "status": fates.get(i, 200)} for i in ids(request) if request.number or i != 4]
        return answer(207, json.dumps({"results": listed}).encode())

    world = World(ScriptedTarget(script), 4)
    results = {**RESULTS, "batch": {"max_records": 4}}

    report = world.run(routes_of(customers={"upsert": results}))

    assert [ids(request) for request in world.target.sent] == [[1, 2, 3, 4], [3, 4]]
    assert (report.end, world.dead, world.counts()) == ("caught_up", [2], {"accepted": 3, "dead": 1})


@row("404 or 410 on deleting a record")
@pytest.mark.parametrize("status", [404, 410])
def test_deleting_what_is_gone_is_done(status: int) -> None:
    world = World(ScriptedTarget(then=status), [change(1, operation="delete")])

    report = world.run()

    assert (report.end, world.status, world.counts()) == ("caught_up", "active", {"accepted": 1})


@row("409 on `insert` with `on_conflict: update`")
@pytest.mark.parametrize(
    ("operation", "refusal", "methods"), [("insert", 409, "POST PATCH"), ("update", 404, "PATCH POST")]
)
def test_an_api_without_an_upsert_is_told_the_other_way_round(operation: Any, refusal: int, methods: str) -> None:
    routes = routes_of(
        customers={
            "insert": {"path": "/rows", "on_conflict": "update"},
            "update": {"path": "/rows/${_key}", "on_missing": "insert"},
        }
    )
    world = World(ScriptedTarget([refusal, 200]), [change(1, operation=operation)])

    report = world.run(routes)

    assert [request.request.method for request in world.target.sent] == methods.split()
    assert len(set(world.target.keys)) == 2
    assert (report.end, world.counts()) == ("caught_up", {"accepted": 1})


@row("a change that its template cannot render")
def test_what_cannot_be_rendered_is_a_dead_letter_and_never_sent() -> None:
    routes = routes_of(customers={"record": {"n": "$n"}, "upsert": {"path": "/rows/${n}"}})
    sound = [change(i, payload=b'{"n": %d}' % i) for i in (1, 2, 3)]
    missing, empty = change(4, payload=b"{}"), change(5, payload=b'{"n": ""}')
    world = World(ScriptedTarget(), [*sound, missing, empty])

    report = world.run(routes)

    assert [request.path for request in world.target.sent] == ["/rows/1", "/rows/2", "/rows/3"]
    assert (report.end, world.dead, world.counts()) == ("caught_up", [4, 5], {"accepted": 3, "dead": 2})


@row("more than `dead_letter_guard` of a run's last 200 records")
def test_a_wrong_mapping_stops_before_it_buries_everything() -> None:
    world = World(ScriptedTarget(then=422), 1000)

    report = world.run(SINGLY)

    assert (report.end, world.status, world.retry_in) == ("paused", "paused", None)
    assert len(world.dead) == 20
    assert world.counts()["dead"] + world.counts()["claimed"] + world.counts()["pending"] == 1000


@row("more than `dead_letter_guard` of a run's last 200 records")
def test_a_mapping_that_fits_no_row_buries_nothing() -> None:
    routes = routes_of(customers={"record": {"n": "$nn"}, "upsert": {"path": "/rows"}})
    world = World(ScriptedTarget(), 100)

    report = world.run(routes)

    assert (report.end, world.target.sent, world.counts()) == ("paused", [], {"pending": 100})
    assert re.search(r"\d+ of \d+ records cannot be rendered", report.reason or "")
