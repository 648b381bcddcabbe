"""The verdict on a target's counts and refusals."""

from dataclasses import replace

from demo.ledger_counts import Counts, DeadLetter
from demo.run import conservation_problems, refusal_problems

COUNTS = Counts(target="board", captured=10, accepted=6, superseded=2, filtered=1, dead=1, claimed=0, pending=0)
LETTER = DeadLetter(target="board", stream="planes", key="N1", reason="no", response=None)


def test_counts_that_add_up_are_no_problem() -> None:
    assert conservation_problems(COUNTS, 10) == []


def test_a_change_that_was_not_captured_is_a_problem() -> None:
    assert conservation_problems(COUNTS, 11) == ["11 changes were made for it, and 10 captured"]


def test_a_change_that_is_nowhere_is_a_problem() -> None:
    assert len(conservation_problems(replace(COUNTS, accepted=5), 10)) == 1


def test_a_change_that_is_still_owed_is_a_problem() -> None:
    owing = replace(COUNTS, accepted=5, pending=1)
    assert conservation_problems(owing, 10) == ["1 changes are still owed"]


def test_the_one_refusal_that_was_asked_for_is_no_problem() -> None:
    assert refusal_problems([LETTER], "N1") == []
    assert refusal_problems([], None) == []


def test_any_other_refusal_is_a_problem() -> None:
    assert refusal_problems([LETTER], None) == ["planes N1 was refused and should not have been"]
    assert refusal_problems([LETTER, replace(LETTER, key="N2")], "N1") == [
        "planes N2 was refused and should not have been"
    ]


def test_a_refusal_that_did_not_come_is_a_problem() -> None:
    assert refusal_problems([], "N1") == ["planes N1 should have been refused once"]


def test_a_refusal_is_told_in_the_targets_own_words() -> None:
    assert replace(LETTER, response='{"ok": false, "error": "too few seats"}').why() == "no: too few seats"
    assert replace(LETTER, response="too few seats").why() == "no: too few seats"
    assert replace(LETTER, response="[1]").why() == "no: [1]"
    assert LETTER.why() == "no"
