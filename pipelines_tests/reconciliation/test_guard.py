"""What is repaired, and what is not: a list that was cut short must cost nothing."""

from typing import Any

import pytest

from pipelines.delivery.reading import ReconcileConfig
from pipelines.reconciliation.guard import Guard, Limits, guard

ALL = {"repair": "all", "delete_extra": True}


def decide(settings: dict[str, Any], *, run: dict[str, Any] | None = None, **counts: Any) -> Guard:
    found = {"source": 1000, "listed": 1000, "missing": 0, "stale": 0, "extra": 0, "confirmed": False} | counts
    found.setdefault("owed", found["source"])
    return guard(Limits.of(ReconcileConfig.model_validate(settings), **(run or {})), **found)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ()),
        ({"repair": "missing"}, ("missing",)),
        ({"repair": "stale"}, ("stale",)),
        ({"repair": "all"}, ("missing", "stale")),
        (ALL, ("missing", "stale", "extra")),
    ],
)
def test_only_what_is_wanted_is_repaired(settings: dict[str, Any], kinds: tuple[str, ...]) -> None:
    assert decide(settings, missing=5, stale=5, extra=5).kinds == kinds


def test_what_is_not_there_needs_no_repair() -> None:
    assert decide(ALL).kinds == ()
    assert decide(ALL, stale=1).kinds == ("stale",)


@pytest.mark.parametrize(("missing", "repaired"), [(50, True), (51, False), (1000, False)])
def test_no_more_is_repaired_than_a_part_of_all(missing: int, repaired: bool) -> None:
    decided = decide({"repair": "all"}, missing=missing)

    assert bool(decided.kinds) is repaired
    assert decided.would == {"missing": missing}
    assert (decided.refused is None) is repaired


def test_all_kinds_together_are_the_part() -> None:
    assert decide(ALL, missing=20, stale=20, extra=20).kinds == ()


def test_one_record_may_always_be_repaired_unless_none_may() -> None:
    assert decide({"repair": "missing"}, source=5, listed=4, missing=1).kinds == ("missing",)
    assert decide({"repair": "missing", "min_listed_fraction": 0.5}, source=5, listed=3, missing=2).kinds == ()
    assert decide({"repair": "missing", "max_repair_fraction": 0.0}, missing=1).kinds == ()


def test_an_empty_source_does_not_empty_the_target() -> None:
    assert decide(ALL, source=0, listed=1000, extra=1000).kinds == ()


@pytest.mark.parametrize(
    ("listed", "more", "believed"),
    [
        (1000, {}, True),
        (800, {}, True),
        (799, {}, False),
        (600, {}, False),
        (0, {}, False),
        (600, {"confirmed": True}, True),
        (0, {"confirmed": True}, True),
        (600, {"run": {"trust_listing": True}}, True),
        (0, {"run": {"trust_listing": True}}, True),
    ],
)
def test_a_list_that_lacks_too_many_is_not_believed_unless_somebody_vouches_for_it(
    listed: int, more: dict[str, Any], believed: bool
) -> None:
    settings = {"repair": "missing", "max_repair_fraction": 1.0}
    decided = decide(settings, listed=listed, missing=1000 - listed, **more)

    assert decided.believed is believed
    assert bool(decided.kinds) is (believed and listed < 1000)
    assert decide({}, listed=listed, missing=1000 - listed, **more).believed is believed


def test_a_list_that_lacks_what_is_there_is_not_believed_whoever_vouches_for_it() -> None:
    vouched = {"trust_listing": True, "repair": "all", "max_repair_fraction": 1.0}
    decided = decide({}, listed=990, missing=10, confirmed=True, refuted=True, run=vouched)

    assert (decided.believed, decided.kinds) == (False, ())


def test_records_of_others_do_not_make_a_list_longer() -> None:
    assert not decide({}, listed=5000, missing=900, extra=4900).believed


def test_rows_that_are_not_owed_do_not_make_a_list_shorter() -> None:
    assert decide({}, source=1000, owed=100, listed=99, missing=1).believed


@pytest.mark.parametrize(("owed", "missing", "believed"), [(2, 1, True), (4, 1, True), (4, 2, False), (1, 1, False)])
def test_of_few_records_one_may_be_missing_from_a_list_that_has_any(owed: int, missing: int, believed: bool) -> None:
    assert decide({}, source=owed, listed=owed - missing, missing=missing).believed is believed
    assert not decide({"min_listed_fraction": 1.0}, source=owed, listed=owed - missing, missing=missing).believed


def test_a_total_that_agrees_does_not_lift_the_other_bound() -> None:
    assert decide({"repair": "missing"}, listed=0, missing=1000, confirmed=True).kinds == ()


def test_a_source_without_rows_believes_an_empty_list() -> None:
    assert decide(ALL, source=0, listed=0).believed


def test_a_dry_run_says_what_would_be_and_does_nothing() -> None:
    decided = decide(ALL, missing=1, extra=2, run={"dry_run": True})

    assert (decided.kinds, decided.would) == ((), {"missing": 1, "extra": 2})
    assert decided.refused == "dry_run: nothing is repaired"


def test_a_run_sets_its_own_in_place_of_the_routes() -> None:
    assert decide({}, missing=1, run={"repair": "missing"}).kinds == ("missing",)
    assert decide(ALL, missing=1, run={"repair": "off"}).kinds == ()
    assert decide(ALL, missing=900, run={"max_repair_fraction": 1.0, "trust_listing": True}, listed=100).kinds == (
        "missing",
    )
    assert decide({"repair": "all"}, extra=1, run={"delete_extra": True}).kinds == ("extra",)
    assert decide(ALL, extra=1, run={"delete_extra": False}).kinds == ()
