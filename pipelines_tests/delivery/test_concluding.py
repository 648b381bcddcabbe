"""How a run's end is put in words, and when it counts as a failure."""

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from pipelines.delivery.concluding import Conclusion, conclude
from pipelines.delivery.ledger import Owed
from pipelines.delivery.report import DrainReport, Tally
from pipelines_tests.fakes.catalog import target_config

DAY = date(2026, 3, 1)
CAUGHT_UP = DrainReport(
    target="crm", end="caught_up", tallies={("people", DAY): Tally(accepted=1200)}, requests=12, seconds=1.0
)
DEFERRED = DrainReport(target="crm", end="deferred", reason="answered 503", requests=4, retries=3, seconds=1.0)
IDLE = Owed(target="crm", has_work=False, held=False, status="active", reason=None, waiting=False)
OWED = replace(IDLE, has_work=True)


def concluded(*reports: DrainReport, state: Owed = IDLE, asked_by_sensor: bool = False, **config: Any) -> Conclusion:
    return conclude(
        reports,
        configs={"crm": target_config("crm", **config)},
        owed=[state],
        scope=frozenset({"crm"}),
        asked_by_sensor=asked_by_sensor,
    )


def test_a_target_that_has_everything_is_one_line_with_its_numbers():
    conclusion = concluded(CAUGHT_UP)

    assert conclusion.lines == ["crm  1200 delivered, 12 requests, 1,200 records/s  caught up"]
    assert (conclusion.failures, conclusion.warnings) == ([], [])


def test_changes_that_came_after_the_drain_had_caught_up_are_the_next_runs():
    assert concluded(CAUGHT_UP, state=OWED).failures == []


@pytest.mark.parametrize("end", ["deferred", "paused"])
def test_a_target_that_could_not_be_served_fails_the_run_with_its_reason(end):
    conclusion = concluded(replace(DEFERRED, end=end), state=OWED)

    assert conclusion.lines == [f"crm  0 delivered, 4 requests, 3 retries  {end}: answered 503"]
    assert conclusion.failures == [f"crm: not caught up, {end}: answered 503"]


def test_dead_letters_fail_the_run_even_if_all_else_was_delivered():
    tallies = {("people", DAY): Tally(accepted=8, superseded=2, filtered=1, dead=3), ("pets", DAY): Tally(dead=1)}
    report = replace(CAUGHT_UP, tallies=tallies, refusals={"answered 422": 3, "answered 400": 1})

    conclusion = concluded(report)

    assert conclusion.lines == [
        "crm  8 delivered, 2 superseded, 1 filtered, 4 dead, 12 requests, 8 records/s  caught up"
    ]
    assert conclusion.failures == ["crm: 4 dead-lettered (1 x answered 400; 3 x answered 422)"]


def test_a_target_that_is_not_critical_only_warns():
    report = replace(DEFERRED, tallies={("people", DAY): Tally(dead=1)}, refusals={"answered 422": 1})

    conclusion = concluded(report, state=OWED, critical=False)

    assert conclusion.failures == []
    assert conclusion.warnings == [
        "crm: not caught up, deferred: answered 503",
        "crm: 1 dead-lettered (1 x answered 422)",
    ]


def test_a_drain_that_was_asked_to_stop_ends_green():
    """Otherwise every run that makes room for the next one (`max_seconds`) would be a false alarm."""
    conclusion = concluded(replace(DEFERRED, end="stopped", reason="max_seconds (900) passed"), state=OWED)

    assert conclusion.failures == []
    assert conclusion.warnings == ["crm: not caught up, stopped: max_seconds (900) passed"]
    assert conclusion.lines[0].endswith("stopped: max_seconds (900) passed")


def test_a_drain_that_was_asked_to_stop_once_all_was_delivered_is_not_worth_a_word():
    assert concluded(replace(DEFERRED, end="stopped", reason="asked"), state=IDLE).warnings == []


@pytest.mark.parametrize("reports", [[], [DrainReport(target="crm", end="held", reason="its lock is taken")]])
class TestATargetThatThisRunHadNoDrainFor:
    def test_is_up_to_date_if_nothing_is_owed(self, reports):
        conclusion = concluded(*reports)

        assert conclusion.lines == ["crm  up to date"]
        assert conclusion.failures == []

    def test_is_the_other_runs_to_judge_while_one_is_at_it_if_the_sensor_asked(self, reports):
        """That run fails if it must; a second alarm for one fault tells nobody anything."""
        conclusion = concluded(*reports, state=replace(OWED, held=True), asked_by_sensor=True)

        assert conclusion.lines == ["crm  another run is delivering to it"]
        assert (conclusion.failures, conclusion.warnings) == ([], [])

    def test_fails_a_persons_run_while_another_is_at_it_and_has_not_caught_up(self, reports):
        """CI asks whether everything is there; that somebody is on it is no yes."""
        conclusion = concluded(*reports, state=replace(OWED, held=True))

        assert conclusion.lines == ["crm  another run is delivering to it"]
        assert conclusion.failures == ["crm: not caught up: another run is delivering to it"]

    def test_fails_the_run_if_it_is_owed_something_and_nobody_is_at_it(self, reports):
        conclusion = concluded(*reports, state=replace(OWED, status="disabled", reason="answered 410"))

        assert conclusion.lines == ["crm  not caught up: answered 410"]
        assert conclusion.failures == ["crm: not caught up: answered 410"]

    def test_fails_the_run_with_words_if_the_ledger_has_no_reason(self, reports):
        conclusion = concluded(*reports, state=OWED)

        assert conclusion.failures == ["crm: not caught up: it has work, and no drain took it up"]


@pytest.mark.parametrize("status", ["paused", "disabled"])
def test_a_target_that_its_file_stops_is_named_and_left_in_peace(status):
    conclusion = conclude([], configs={"crm": target_config("crm", status=status)}, owed=[], scope=frozenset({"crm"}))

    assert conclusion.lines == [f"crm  {status} in its file"]
    assert (conclusion.failures, conclusion.warnings) == ([], [])


def test_lines_stand_under_each_other_and_tell_of_the_targets_asked_for_alone():
    configs = {name: target_config(name) for name in ("crm", "newsletter", "post")}
    owed = [replace(IDLE, target=name) for name in configs]

    conclusion = conclude([], configs=configs, owed=owed, scope=frozenset({"crm", "newsletter"}))

    assert conclusion.lines == ["crm         up to date", "newsletter  up to date"]
