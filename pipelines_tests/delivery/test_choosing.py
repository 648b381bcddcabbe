"""Which targets a run is launched for, and what people are told of the others."""

from dataclasses import replace

import pytest

from pipelines.delivery.choosing import choose_targets
from pipelines.delivery.ledger import Owed

READY = Owed(target="crm", has_work=True, held=False, status="active", reason=None, waiting=False)
DOWN = replace(READY, waiting=True, reason="answered 503")
PAUSED = replace(READY, status="paused", waiting=True, reason="answered 401: credentials refused")
DISABLED = replace(READY, status="disabled", reason="answered 410")


def test_a_target_with_work_and_nobody_at_it_is_chosen():
    choice = choose_targets([READY])

    assert choice.targets == ["crm"]
    assert choice.left_out == {}


@pytest.mark.parametrize("idle", [READY, DOWN, PAUSED, DISABLED, replace(READY, held=True)])
def test_a_target_without_work_is_neither_chosen_nor_mentioned(idle):
    """Whatever else is the matter with it: there is nothing that a person would have to do."""
    choice = choose_targets([replace(idle, has_work=False)], impatient=True, insist_on=frozenset({"crm"}))

    assert (choice.targets, choice.left_out) == ([], {})


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (replace(READY, held=True), "a drain is at it"),
        (DOWN, "held back: answered 503"),
        (PAUSED, "held back: answered 401: credentials refused"),
        (DISABLED, "disabled: answered 410"),
    ],
)
def test_the_sensor_leaves_a_target_out_and_says_why(state, why):
    choice = choose_targets([state])

    assert choice.targets == []
    assert choice.left_out == {"crm": why}


def test_a_target_that_a_run_will_reach_is_left_to_that_run():
    choice = choose_targets([READY], on_their_way=frozenset({"crm"}))

    assert choice.left_out == {"crm": "a run is on its way"}


def test_one_target_that_is_left_out_keeps_no_other_from_its_turn():
    choice = choose_targets([DOWN, replace(READY, target="email"), replace(PAUSED, target="post")])

    assert choice.targets == ["email"]
    assert list(choice.left_out) == ["crm", "post"]


@pytest.mark.parametrize("state", [DOWN, PAUSED])
def test_a_persons_run_does_not_wait_for_a_held_back_targets_time(state):
    """They may have mended it a moment ago."""
    assert choose_targets([state], impatient=True).targets == ["crm"]


def test_a_disabled_target_is_tried_only_if_a_person_names_it():
    assert choose_targets([DISABLED], impatient=True).targets == []
    assert choose_targets([DISABLED], impatient=True, insist_on=frozenset({"crm"})).targets == ["crm"]


def test_a_target_that_a_drain_is_at_is_left_out_even_if_a_person_names_it():
    """Its lock could not be had."""
    choice = choose_targets([replace(READY, held=True)], impatient=True, insist_on=frozenset({"crm"}))

    assert choice.left_out == {"crm": "a drain is at it"}
