"""The judge of what a target saw: each defect, made by hand, is found, and what is none is not."""

import json
from itertools import count
from typing import Any

import pytest

from pipelines_tests.fakes.history import EXAMPLES, Findings, History, Lost, Overtaken, Repeat, Version, examine
from pipelines_tests.fakes.http_server import Request

_numbers = count()


def asked(key: str | None, *versions: tuple[str, int], method: str = "POST", path: str = "/rows") -> Request:
    """Return a request under an idempotency key, with a list of records."""
    return Request(
        number=next(_numbers),
        at=0.0,
        method=method,
        path=path,
        headers={} if key is None else {"idempotency-key": key},
        body=json.dumps([{"id": record, "change": change} for record, change in versions]).encode(),
    )


def deleted(key: str, path: str) -> Request:
    """Return a request without a body."""
    return Request(
        number=next(_numbers), at=0.0, method="DELETE", path=path, headers={"idempotency-key": key}, body=b""
    )


def judged(*applied: Request, **expected: Any) -> Findings:
    """Judge a history in which all that arrived took effect, in that order."""
    return examine(applied, applied, expected)


# What is as it should be ----------------------------------------------------------------------------------------------


def test_changes_in_order_and_once_are_fine() -> None:
    findings = judged(asked("k1", ("ada", 1), ("bob", 2)), asked("k2", ("ada", 3)), ada=[1, 3], bob=2)

    assert not findings.broken
    assert (findings.requests, findings.applied, findings.repeats, findings.strangers) == (2, 3, 0, [])


def test_nothing_expected_and_nothing_seen_is_fine() -> None:
    assert not judged().broken


def test_a_state_that_was_superseded_is_not_lost() -> None:
    assert not judged(asked("k", ("ada", 9)), ada=9).broken


def test_events_of_other_keys_may_come_in_any_order() -> None:
    assert not judged(asked("k1", ("bob", 2)), asked("k2", ("ada", 1)), ada=[1], bob=[2]).broken


def test_what_did_not_take_effect_may_come_again() -> None:
    """That is what a retry of a refused request is."""
    again = asked("k", ("ada", 1))

    findings = examine([again, again], [again], {"ada": 1})

    assert not findings.broken
    assert (findings.requests, findings.repeats) == (2, 0)


def test_a_repeat_under_the_same_key_is_counted_and_allowed() -> None:
    again = asked("k", ("ada", 1), ("bob", 2))

    findings = judged(again, again, ada=[1], bob=[2])

    assert not findings.broken
    assert findings.repeats == 2


def test_a_repeat_that_takes_a_key_through_its_states_once_more_is_no_step_back() -> None:
    """What counts is where the request leaves the key."""
    again = asked("k", ("ada", 1), ("ada", 2))

    assert not judged(again, again, ada=[1, 2]).broken


# What is lost ---------------------------------------------------------------------------------------------------------


def test_a_key_that_never_came_is_lost() -> None:
    findings = judged(asked("k", ("ada", 1)), ada=1, bob=2, cleo=[3, 4])

    assert findings.lost == [Lost("bob", (2,), None), Lost("cleo", (3, 4), None)]
    assert findings.broken == {"lost": 2}


def test_a_key_that_stands_at_an_older_state_is_lost() -> None:
    assert judged(asked("k", ("ada", 1)), ada=5).lost == [Lost("ada", (5,), 1)]


def test_an_event_that_is_missing_in_the_middle_is_lost() -> None:
    findings = judged(asked("k1", ("ada", 1)), asked("k2", ("ada", 3)), ada=[1, 2, 3])

    assert findings.lost == [Lost("ada", (2,), 3)]


def test_what_arrived_without_taking_effect_is_lost() -> None:
    assert examine([asked("k", ("ada", 1))], [], {"ada": 1}).lost == [Lost("ada", (1,), None)]


def test_a_deletion_counts_as_a_change() -> None:
    """Its key and version are in its path."""
    expected = {"a/b c": 2}
    made, gone = asked("k1", ("a/b c", 1)), deleted("k2", "/v1/rows/a%2Fb%20c?change=2")

    assert not examine([made, gone], [made, gone], expected).broken
    assert examine([made], [made], expected).lost == [Lost("a/b c", (2,), 1)]


def test_a_key_of_which_nothing_was_expected_is_a_stranger() -> None:
    assert judged(asked("k", ("ada", 1), ("eve", 2)), ada=1).strangers == ["eve"]


# What is out of order -------------------------------------------------------------------------------------------------


def test_an_older_state_under_a_key_of_its_own_is_out_of_order_for_everybody() -> None:
    findings = judged(asked("k2", ("ada", 2)), asked("k1", ("ada", 1)), ada=[1, 2])

    assert findings.out_of_order == findings.out_of_order_if_careless == (Overtaken("ada", 2, 1),)


def test_a_repeat_that_comes_after_a_newer_state_hurts_those_who_do_not_know_it() -> None:
    old, new = asked("k1", ("ada", 1)), asked("k2", ("ada", 2))

    findings = judged(old, new, old, ada=2)

    assert not findings.out_of_order
    assert findings.out_of_order_if_careless == (Overtaken("ada", 2, 1),)
    assert not findings.lost


def test_a_deletion_that_is_overtaken_is_out_of_order() -> None:
    assert judged(deleted("k2", "/rows/ada?change=2"), asked("k1", ("ada", 1)), ada=2).out_of_order


def test_states_of_a_key_that_go_backwards_within_a_request_are_out_of_order() -> None:
    findings = judged(asked("k", ("ada", 2), ("ada", 1)), ada=[1, 2])

    assert findings.out_of_order == findings.out_of_order_if_careless == (Overtaken("ada", 2, 1),)


def test_a_key_that_ends_at_an_older_state_is_lost_too() -> None:
    assert judged(asked("k2", ("ada", 2)), asked("k1", ("ada", 1)), ada=2).lost == [Lost("ada", (2,), 1)]


# What cannot be recognised as a repeat --------------------------------------------------------------------------------


def test_a_change_that_comes_again_under_another_key_is_found() -> None:
    findings = judged(asked("k1", ("ada", 1)), asked("k2", ("ada", 1), ("bob", 2)), ada=[1], bob=[2])

    assert findings.repeats_under_another_key == (Repeat("ada", 1, "k2"),)
    assert findings.repeats == 0


def test_a_change_that_comes_again_with_another_body_is_found() -> None:
    findings = judged(asked("k", ("ada", 1)), asked("k", ("ada", 1), ("bob", 2)), ada=[1], bob=[2])

    assert findings.repeats_under_another_key == (Repeat("ada", 1, "k"),)
    assert findings.keys_with_two_bodies == ("k",)


@pytest.mark.parametrize("other", [{"path": "/people"}, {"method": "PUT"}])
def test_a_key_that_comes_with_another_path_or_method_is_found(other: dict[str, str]) -> None:
    """Even if nothing of it took effect."""
    findings = examine([asked("k", ("ada", 1)), asked("k", ("ada", 1), **other)], [], {})

    assert findings.broken == {"keys_with_two_bodies": 1}


def test_a_request_without_a_key_is_found() -> None:
    findings = judged(asked(None, ("ada", 1)), asked(None, ("ada", 1)), ada=1)

    assert findings.without_key == 2
    assert findings.repeats_under_another_key  # each is new to whoever looks at keys


# While it runs --------------------------------------------------------------------------------------------------------


def test_a_request_may_take_effect_in_part() -> None:
    """What was left out comes again, and is new then even to a target that knows the key."""
    batch = asked("k", ("ada", 1), ("bob", 2))
    history = History()
    history.arrive(batch)
    history.apply(batch, [0])

    assert history.taken("k") == {0}
    assert history.findings({"ada": 1, "bob": 2}).lost == [Lost("bob", (2,), None)]

    history.apply(batch)

    findings = history.findings({"ada": 1, "bob": 2})
    assert not findings.broken
    assert findings.repeats == 1
    assert history.taken("k") == {0, 1}


def test_a_history_can_be_asked_at_any_time() -> None:
    history = History()
    for change in (1, 2, 3):
        request = asked(f"k{change}", ("ada", change))
        history.arrive(request)
        history.apply(request)
        assert not history.findings({"ada": change}).broken
        assert not history.findings({"ada": range(1, change + 1)}).broken


def test_defects_are_counted_without_end_and_kept_with_one() -> None:
    backwards = [asked(f"k{change}", ("ada", change)) for change in range(2 * EXAMPLES, 0, -1)]

    findings = judged(*backwards, ada=1)

    assert findings.broken["out_of_order"] == 2 * EXAMPLES - 1
    assert len(findings.out_of_order) == EXAMPLES


def test_records_may_be_read_in_another_way() -> None:
    def read(request: Request) -> list[Version]:
        return [Version(f"{request.path}/{record['id']}", record["change"]) for record in request.records]

    requests = [asked("k1", ("1", 4), path="/orders"), asked("k2", ("1", 3), path="/people")]

    assert not examine(requests, requests, {"/orders/1": 4, "/people/1": 3}, read=read).broken


def test_findings_are_one_sentence() -> None:
    findings = judged(asked("k2", ("ada", 2)), asked("k1", ("ada", 1)), ada=2)

    assert str(findings) == (
        "2 requests, 2 records applied, 0 repeated; 1 lost, 1 out of order, 1 out of order if careless"
    )
