"""What fails a soak: each of these on its own, and nothing that is as it should be."""

from dataclasses import replace
from typing import Any

import pytest

from demo.ledger_counts import Counts, DeadLetter
from soak.verdict import Account, Truth, capture_problems, problems

ADA, BOB = {"id": "ada", "revision": 2}, {"id": "bob", "revision": 1}
TRUTH = Truth(
    written={"ada": 2, "bob": 1, "gone": 2, "bad": 1},
    captured={"ada": [1, 4], "bob": [2], "gone": [3, 5], "bad": [6]},
    rows={"ada": ADA, "bob": BOB, "bad": {"id": "bad"}},
)
COUNTS = Counts(target="crm", captured=6, accepted=5, superseded=0, filtered=0, dead=1, claimed=0, pending=0)
LETTER = DeadLetter(target="crm", stream="people", key="bad", reason="answered 422", response=None)
GOOD = Account(
    target="crm",
    counts=COUNTS,
    findings={"broken": {}, "strangers": [], "lost": [], "out_of_order": []},
    held={"ada": ADA, "bob": BOB},
    dead=[LETTER],
)


def told(account: Account) -> list[str]:
    return [problem.removeprefix("crm: ") for problem in problems(account, TRUTH, refuses=["bad"])]


def findings(**found: Any) -> dict[str, Any]:
    return {**GOOD.findings, **found}


def test_nothing_is_wrong_with_a_target_that_has_everything_but_the_bad_record() -> None:
    assert told(GOOD) == []
    assert capture_problems(TRUTH) == []


def test_each_mode_expects_its_own() -> None:
    assert TRUTH.expected(mode="event", without=["bad"]) == {"ada": [1, 4], "bob": [2], "gone": [3, 5]}
    assert TRUTH.expected(mode="state", without=["bad"]) == {"ada": 4, "bob": 2, "gone": 5}


@pytest.mark.parametrize(
    ("account", "sentence"),
    [
        (replace(GOOD, held={"ada": ADA}), "1 records are missing, such as bob"),
        (replace(GOOD, held={**GOOD.held, "gone": {}}), "1 records are there that the source has not, such as gone"),
        (replace(GOOD, held={"ada": {**ADA, "revision": 1}, "bob": BOB}), "1 records are not as in the source"),
        (replace(GOOD, findings=findings(broken={"lost": 1}, lost=[["ada", [4], 1]])), "1 lost, such as "),
        (replace(GOOD, findings=findings(broken={"out_of_order": 2}, out_of_order=[])), "2 out of order"),
        (replace(GOOD, findings=findings(broken={"without_key": 3}, without_key=3)), "3 without key"),
        (replace(GOOD, findings=findings(strangers=["eve"])), "1 keys that nobody wrote, such as eve"),
        (replace(GOOD, counts=replace(COUNTS, accepted=4)), "its counts do not add up"),
        (replace(GOOD, counts=replace(COUNTS, accepted=4, pending=1)), "1 changes are still owed"),
        (replace(GOOD, counts=replace(COUNTS, accepted=4, claimed=1)), "1 changes are still owed"),
        (
            replace(GOOD, counts=replace(COUNTS, captured=5, accepted=4)),
            "5 changes are counted for it, and 6 were made",
        ),
        (
            replace(GOOD, dead=[LETTER, replace(LETTER, key="ada")]),
            "ada is dead-lettered (answered 422) and is no bad record",
        ),
        (replace(GOOD, dead=[]), "bad should have been dead-lettered"),
    ],
)
def test_one_thing_that_is_wrong_is_one_sentence(account: Account, sentence: str) -> None:
    (problem,) = told(account)
    assert problem.startswith(sentence)


def test_a_set_back_that_only_a_careless_target_sees_is_no_problem() -> None:
    """It takes a request that it applied after having let it time out: no sender can prevent that."""
    assert told(replace(GOOD, findings=findings(broken={"out_of_order_if_careless": 1}))) == []


def test_a_change_that_was_not_captured_is_found_and_so_is_one_that_was_not_made() -> None:
    missed = replace(TRUTH, captured={**TRUTH.captured, "ada": [1]})
    invented = replace(TRUTH, captured={**TRUTH.captured, "eve": [7]})

    assert capture_problems(missed) == ["ada was changed 2 times and captured 1 times"]
    assert capture_problems(invented) == ["eve was changed 0 times and captured 1 times"]


def test_many_of_a_kind_are_a_few_examples_and_a_number() -> None:
    written = {f"key-{number}": 1 for number in range(10)}

    found = capture_problems(Truth(written=written, captured={}, rows={}))

    assert found[-1] == "and 7 more of these"
    assert len(found) == 4
