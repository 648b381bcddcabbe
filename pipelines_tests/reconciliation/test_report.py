"""What a person reads: sentences, bars, and what to do."""

from dataclasses import replace

import pytest

from pipelines.delivery.ledger import Conservation
from pipelines.reconciliation import report
from pipelines.reconciliation.guard import Guard
from pipelines.reconciliation.meaning import Meaning
from pipelines.reconciliation.reconcile import Outcome
from pipelines.reconciliation.workspace import Appended, Finding, Kind, Summary

CLEAN = Outcome(
    target="crm",
    stream="people",
    meaning=Meaning(),
    source=1000,
    owed=1000,
    listed=1000,
    unkeyed=0,
    matched=1000,
    filtered=0,
    summary=Summary(counts={}, fields=(), samples={}, moving=0),
    guard=Guard(believed=True),
    appended=Appended(),
)


def found(counts: dict[Kind, int], outcome: Outcome = CLEAN) -> Outcome:
    samples = {kind: [Finding(match="7", key="7", kind=kind)] for kind in counts}
    summary = Summary(counts=counts, fields=[("name", 3)], samples=samples, moving=0)
    return replace(outcome, summary=summary)


def said(outcome: Outcome) -> dict[str, report.Verdict]:
    return {verdict.name: verdict for verdict in report.verdicts(outcome)}


def test_what_agrees_passes() -> None:
    assert [verdict.passed for verdict in report.verdicts(CLEAN)] == [True, True, True]
    assert report.line(CLEAN) == "crm/people  1,000 rows, 1,000 records: they agree"


@pytest.mark.parametrize("kind", ["missing", "stale", "extra"])
def test_each_kind_fails_its_own_check_with_keys_and_what_to_do(kind: Kind) -> None:
    verdicts = said(found({kind: 3}))

    assert {name for name, one in verdicts.items() if not one.passed} == {f"nothing_{kind}"}
    failed = verdicts[f"nothing_{kind}"]
    assert (failed.keys, failed.numbers[kind]) == (["7"], 3)
    assert "launch this asset with `repair:" in failed.what_to_do


@pytest.mark.parametrize("kind", ["in_flight", "dead", "unrenderable"])
def test_what_is_no_drift_fails_nothing(kind: Kind) -> None:
    assert all(verdict.passed for verdict in report.verdicts(found({kind: 3})))


def test_what_is_not_judged_passes_and_says_why() -> None:
    meaning = Meaning(missing="of a", stale="of b", extra="of c")
    verdicts = said(replace(CLEAN, meaning=meaning))

    assert [one.passed for one in verdicts.values()] == [True, True, True]
    assert [one.sentence for one in verdicts.values()] == [f"not judged: of {letter}" for letter in "abc"]


def test_a_list_that_is_not_believed_has_nothing_missing_but_fails() -> None:
    outcome = replace(found({"missing": 900}), guard=Guard(believed=False), listed=100)

    assert report.numbers(outcome)["missing"] == 0
    assert report.numbers(outcome)["not listed"] == 900
    assert "900 not in a list that is not believed" in report.line(outcome)
    verdict = said(outcome)["nothing_missing"]
    assert not verdict.passed
    assert "looks cut short: it lacks 900 of 1,000 records" in verdict.sentence
    assert "trust_listing: true" in verdict.what_to_do


def test_a_list_that_is_seen_to_be_cut_is_said_to_be() -> None:
    outcome = replace(found({"missing": 30}), guard=Guard(believed=False), asked=25, there=20)

    verdict = said(outcome)["nothing_missing"]

    assert not verdict.passed
    assert "lacks 30 of 1,000 records, and of 25 of those that were asked for one by one 20 are there" in (
        verdict.sentence
    )
    assert "mend the route's `read`" in verdict.what_to_do


def test_what_was_refused_says_so_where_it_belongs() -> None:
    outcome = replace(
        found({"missing": 3, "extra": 3}), guard=Guard(believed=True, would={"missing": 3}, refused="too many")
    )

    assert said(outcome)["nothing_missing"].what_to_do == "too many"
    assert "delete_extra" in said(outcome)["nothing_extra"].what_to_do


def test_what_the_route_cannot_repair_says_so() -> None:
    outcome = replace(found({"stale": 3}), guard=Guard(believed=True, cannot={"stale": "it has no upsert"}))

    assert said(outcome)["nothing_stale"].what_to_do == "this cannot be repaired from here: it has no upsert"


def test_a_single_record_can_be_seen_in_the_chart() -> None:
    bars = {line[:14].strip(): line.count("█") for line in report.chart(found({"stale": 1})).splitlines()}

    assert bars["matched"] == 40
    assert bars["stale"] == 1
    assert bars["missing"] == 0
    assert "dead" not in bars


def test_ratios_are_of_the_sources_rows_and_an_empty_source_divides_nothing() -> None:
    assert report.numbers(replace(found({"missing": 50}), matched=950))["drift ratio"] == 0.05
    assert report.numbers(replace(CLEAN, source=0, matched=0, listed=0))["matched ratio"] == 0.0


def test_conservation_says_what_does_not_add_up() -> None:
    counts = Conservation(target="crm", captured=10, accepted=5, superseded=1, filtered=1, dead=1, claimed=1, pending=1)

    assert report.conservation(counts).passed
    lost = report.conservation(replace(counts, accepted=4))
    assert (lost.passed, lost.sentence) == (False, "10 changes were captured, but 9 are accounted for")
