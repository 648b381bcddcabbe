"""Whose fault is it? Every row of the fault table, and answers that are worse than any table."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.delivery.judging import JudgingRules, excerpt, judge
from pipelines.delivery.outcome import Accepted, Fallback, Items, Pause, Rejected, Split, TargetFault, Verdict
from pipelines.delivery.routing import RouteOperation
from pipelines.delivery.target import Answer, NoAnswer
from pipelines_tests.fakes.target import answer, change, no_answer, routes_of

NOW = datetime(2025, 3, 1, 12, tzinfo=UTC)
THREE = [change(1), change(2), change(3)]
ONE = THREE[:1]

_ROUTES = routes_of(
    plain={
        "upsert": {"path": "/rows", "batch": {"max_records": 100}},
        "delete": {"path": "/rows/${_key}"},
    },
    single={
        "insert": {"path": "/rows"},
        "update": {"path": "/rows/${_key}"},
        "delete": {"method": "DELETE", "path": "/rows", "batch": {"max_records": 10, "body": {"ids": "$keys"}}},
    },
    falling={
        "insert": {"path": "/rows", "on_conflict": "update"},
        "update": {"path": "/rows/${_key}", "on_missing": "insert"},
    },
    put={"upsert": {"method": "PUT", "path": "/rows/${_key}"}},
)
UPSERT_MANY = _ROUTES["plain"].operations["upsert"]
DELETE_ONE = _ROUTES["plain"].operations["delete"]
INSERT_ONE = _ROUTES["single"].operations["insert"]
UPDATE_ONE = _ROUTES["single"].operations["update"]
DELETE_MANY = _ROUTES["single"].operations["delete"]
INSERT_OR_UPDATE = _ROUTES["falling"].operations["insert"]
UPDATE_OR_INSERT = _ROUTES["falling"].operations["update"]
PUT_ONE = _ROUTES["put"].operations["upsert"]


def judged(what: Answer | NoAnswer | int, operation: RouteOperation, changes: list[Any] = ONE, **rules: Any) -> Verdict:
    what = answer(what) if isinstance(what, int) else what
    return judge(what, operation=operation, changes=changes, rules=JudgingRules(**rules), now=NOW)


# The table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("may_have_arrived", "unknown"),
    [pytest.param(False, False, id="DNS, connect, TLS"), pytest.param(True, True, id="time-out, reset")],
)
def test_no_answer_is_the_targets_fault(may_have_arrived: bool, unknown: bool) -> None:
    verdict = judged(no_answer("no way", may_have_arrived=may_have_arrived), UPSERT_MANY, THREE)

    assert verdict == TargetFault(reason="no way", outcome_unknown=unknown, may_be_the_records=unknown)


@pytest.mark.parametrize("changes", [ONE, THREE], ids=["one record", "a batch"])
@pytest.mark.parametrize("operation", [UPSERT_MANY, INSERT_ONE, UPDATE_ONE, DELETE_ONE, PUT_ONE], ids=lambda o: o.kind)
@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 507, 520, 599])
def test_a_target_that_cannot_answer_now_is_to_blame_for_it(
    status: int, operation: RouteOperation, changes: list[Any]
) -> None:
    verdict = judged(status, operation, changes)

    assert isinstance(verdict, TargetFault)
    assert verdict.status == status


@pytest.mark.parametrize(
    ("status", "unknown"),
    [(429, False), (503, False), (425, False), (500, True), (502, True), (504, True), (408, True)],
)
def test_after_a_gateways_answer_the_outcome_is_unknown(status: int, unknown: bool) -> None:
    verdict = judged(status, UPSERT_MANY)

    assert isinstance(verdict, TargetFault)
    assert verdict.outcome_unknown == unknown


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("Sat, 01 Mar 2025 12:00:09 GMT", 9.0), ("999999999", 3600.0), ("-1", None), ("soon", None)],
)
def test_retry_after_is_taken_from_the_answer(value: str, seconds: float | None) -> None:
    verdict = judged(answer(503, headers={"retry-after": value}), UPSERT_MANY)

    assert isinstance(verdict, TargetFault)
    assert verdict.retry_after == seconds


@pytest.mark.parametrize("status", [401, 403, 407])
@pytest.mark.parametrize("changes", [ONE, THREE], ids=["one record", "a batch"])
def test_refused_credentials_pause_the_target(status: int, changes: list[Any]) -> None:
    verdict = judged(status, UPSERT_MANY, changes)

    assert isinstance(verdict, Pause)
    assert (verdict.cause, verdict.status) == ("credentials", status)


@pytest.mark.parametrize(
    ("status", "operation"),
    [
        (301, UPSERT_MANY),
        (302, DELETE_ONE),
        (304, UPDATE_ONE),
        (307, UPSERT_MANY),
        (308, UPSERT_MANY),
        (405, UPSERT_MANY),
        (405, DELETE_ONE),
        (415, INSERT_ONE),
        (404, UPSERT_MANY),
        (404, INSERT_ONE),
        (404, DELETE_MANY),
        (404, PUT_ONE),
        (410, PUT_ONE),
    ],
)
def test_what_no_record_can_bring_about_pauses_the_target_for_its_configuration(
    status: int, operation: RouteOperation
) -> None:
    verdict = judged(status, operation)

    assert isinstance(verdict, Pause)
    assert (verdict.cause, verdict.status) == ("configuration", status)


def test_a_redirect_says_where_it_pointed_and_is_not_followed() -> None:
    verdict = judged(answer(301, headers={"location": "https://elsewhere.test/"}), UPSERT_MANY)

    assert isinstance(verdict, Pause)
    assert "https://elsewhere.test/" in verdict.reason
    assert "base_url" in verdict.reason


@pytest.mark.parametrize("operation", [UPSERT_MANY, INSERT_ONE, DELETE_MANY], ids=lambda o: o.kind)
def test_a_collection_that_is_gone_is_gone(operation: RouteOperation) -> None:
    verdict = judged(410, operation)

    assert isinstance(verdict, Pause)
    assert verdict.cause == "gone"


@pytest.mark.parametrize("status", [420, 421, 423, 430])
def test_a_target_that_is_busy_in_its_own_words_is_busy(status: int) -> None:
    assert isinstance(judged(status, UPSERT_MANY, THREE), TargetFault)


@pytest.mark.parametrize("status", [419, 440, 498])
def test_a_session_that_ended_is_the_credentials_fault(status: int) -> None:
    verdict = judged(status, UPSERT_MANY, THREE)

    assert isinstance(verdict, Pause)
    assert verdict.cause == "credentials"


@pytest.mark.parametrize("status", [400, 409, 413, 422, 412, 414, 418, 431, 451])
def test_one_record_that_is_refused_is_refused_for_its_own_sake(status: int) -> None:
    verdict = judged(answer(status, b'{"error": "bad e-mail"}'), UPSERT_MANY, ONE)

    assert verdict == Rejected(reason=f"answered {status}", status=status, response='{"error": "bad e-mail"}')


@pytest.mark.parametrize("status", [400, 409, 413, 422, 418])
def test_a_batch_that_is_refused_is_halved(status: int) -> None:
    verdict = judged(status, UPSERT_MANY, THREE)

    assert isinstance(verdict, Split)
    assert verdict.too_large == (status == 413)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
@pytest.mark.parametrize("changes", [ONE, THREE], ids=["one record", "a batch"])
def test_a_2xx_accepts_every_record_where_no_results_are_configured(status: int, changes: list[Any]) -> None:
    assert judged(status, UPSERT_MANY, changes) == Accepted()


def test_a_207_whose_results_nobody_reads_is_not_a_success() -> None:
    verdict = judged(207, UPSERT_MANY, THREE)

    assert isinstance(verdict, Pause)
    assert verdict.cause == "configuration"
    assert "results" in verdict.reason


@pytest.mark.parametrize("status", [404, 410])
def test_a_record_to_be_deleted_that_is_not_there_is_gone_already(status: int) -> None:
    assert judged(status, DELETE_ONE) == Accepted()


@pytest.mark.parametrize("status", [404, 410])
def test_an_update_of_what_is_not_there_is_refused_unless_it_may_insert(status: int) -> None:
    refused = judged(status, UPDATE_ONE)

    assert isinstance(refused, Rejected)
    assert judged(status, UPDATE_OR_INSERT) == Fallback(kind="insert")


def test_an_insert_of_what_is_there_is_refused_unless_it_may_update() -> None:
    assert isinstance(judged(409, INSERT_ONE), Rejected)
    assert judged(409, INSERT_OR_UPDATE) == Fallback(kind="update")


# Overrides ------------------------------------------------------------------------------------------------------------


def test_success_on_makes_a_status_a_success() -> None:
    assert judged(409, INSERT_ONE, success_on=frozenset({409})) == Accepted()
    assert judged(404, UPSERT_MANY, success_on=frozenset({404})) == Accepted()


def test_retryable_status_codes_make_a_status_the_targets_fault() -> None:
    for status in (403, 404, 409, 302):
        assert isinstance(judged(status, UPSERT_MANY, THREE, retryable_status_codes=frozenset({status})), TargetFault)


def test_drop_on_makes_a_status_the_records_fault() -> None:
    for status in (403, 404, 500, 200):
        dropping = frozenset({status})
        assert isinstance(judged(status, UPSERT_MANY, drop_on=dropping), Rejected)
        assert isinstance(judged(status, UPSERT_MANY, THREE, drop_on=dropping), Split)


# Results per item -----------------------------------------------------------------------------------------------------


def operation_with(results: dict[str, Any], kind: str = "upsert", **operation: Any) -> RouteOperation:
    spec = {"path": "/rows", "batch": {"max_records": 100}, "results": results, **operation}
    others = {"update": {"path": "/rows/${_key}"}} if kind == "insert" else {}
    return routes_of(customers={kind: spec, **others})["customers"].operations[kind]  # type: ignore[index]


BY_ID = operation_with({"items": "$.results", "id": "id", "status": "status", "message": "error"})
BY_ORDER = operation_with({"items": "$.results", "status": "status"})
BY_INDEX = operation_with({"items": "$.results", "index": "at", "status": "status"})
ERRORS = operation_with({"errors": "$.errors", "index": "at", "message": "why"})
ERRORS_WITH_STATUS = operation_with({"errors": "$.errors", "id": "id", "status": "status"})


def told(document: Any, operation: RouteOperation, *, status: int = 200, **rules: Any) -> Verdict:
    return judged(answer(status, json.dumps(document).encode()), operation, THREE, **rules)


def items(document: Any, operation: RouteOperation, **rules: Any) -> Items:
    verdict = told(document, operation, **rules)
    assert isinstance(verdict, Items), verdict
    return verdict


@pytest.mark.parametrize("status", [200, 207])
def test_each_record_gets_its_own_verdict(status: int) -> None:
    """A 2xx with one failure in it is not a success, and one with a success not a failure."""
    found = items(
        {
            "results": [
                {"id": "3", "status": 503},
                {"id": "1", "status": 201},
                {"id": "2", "status": 422, "error": "bad e-mail"},
            ]
        },
        BY_ID,
        status=status,
    )

    assert list(found.accepted) == [0]
    assert found.rejected == {1: Rejected(reason="answered 422 within the batch", status=422, response="bad e-mail")}
    assert list(found.retry) == [2]


def test_a_number_names_the_record_whose_key_is_its_text() -> None:
    found = items({"results": [{"id": n, "status": 200} for n in (1, 2, 3)]}, BY_ID)

    assert list(found.accepted) == [0, 1, 2]


def test_items_without_names_come_in_the_requests_order() -> None:
    found = items({"results": [{"status": 200}, {"status": 400}, {"status": 200}]}, BY_ORDER)

    assert list(found.accepted) == [0, 2]
    assert list(found.rejected) == [1]


def test_items_may_name_their_position() -> None:
    found = items({"results": [{"at": 2, "status": 200}, {"at": 0, "status": 400}, {"at": 1, "status": 500}]}, BY_INDEX)

    assert (list(found.accepted), list(found.rejected), list(found.retry)) == ([2], [0], [1])


def test_true_and_false_are_statuses_too() -> None:
    found = items({"results": [{"status": True}, {"status": False}, {"status": True}]}, BY_ORDER)

    assert (list(found.accepted), list(found.rejected)) == ([0, 2], [1])


def test_a_record_of_which_nothing_is_said_is_sent_again() -> None:
    found = items({"results": [{"id": "2", "status": 200}]}, BY_ID)

    assert (list(found.accepted), list(found.retry)) == ([1], [0, 2])


def test_an_item_without_a_status_is_no_success() -> None:
    found = items({"results": [{"id": "1"}, {"id": "2", "status": None}, {"id": "3", "status": 200}]}, BY_ID)

    assert list(found.accepted) == [2]


def test_where_only_errors_are_listed_the_others_are_accepted() -> None:
    found = items({"errors": [{"at": 1, "why": "bad e-mail"}]}, ERRORS)

    assert list(found.accepted) == [0, 2]
    assert found.rejected == {1: Rejected(reason="refused within the batch", response="bad e-mail")}


@pytest.mark.parametrize("document", [{}, {"errors": None}, {"errors": []}])
def test_no_list_of_errors_is_none_refused(document: Any) -> None:
    assert list(items(document, ERRORS).accepted) == [0, 1, 2]


def test_an_error_that_may_pass_is_sent_again() -> None:
    found = items({"errors": [{"id": "2", "status": 429}, {"id": "3", "status": 422}]}, ERRORS_WITH_STATUS)

    assert (list(found.accepted), list(found.retry), list(found.rejected)) == ([0], [1], [2])


def test_retryable_names_the_items_to_send_again_and_no_others() -> None:
    operation = operation_with({"items": "$.results", "status": "status", "retryable": [409]})
    found = items({"results": [{"status": 409}, {"status": 503}, {"status": 200}]}, operation)

    assert (list(found.retry), list(found.rejected), list(found.accepted)) == ([0], [1], [2])


def test_the_targets_overrides_hold_for_items_as_well() -> None:
    """An option that is honoured for an answer and not for the items in it would be silently ignored."""
    document = {"results": [{"status": 409}, {"status": 418}, {"status": 503}]}

    assert list(items(document, BY_ORDER, success_on=frozenset({409})).accepted) == [0]
    assert list(items(document, BY_ORDER, retryable_status_codes=frozenset({418})).retry) == [1, 2]
    assert list(items(document, BY_ORDER, drop_on=frozenset({503})).retry) == []


def test_an_item_to_be_deleted_that_is_not_there_is_gone_already() -> None:
    deleting = operation_with({"items": "$.results", "status": "status"}, kind="delete")
    found = items({"results": [{"status": 404}, {"status": 410}, {"status": 200}]}, deleting)

    assert list(found.accepted) == [0, 1, 2]


def test_an_item_in_conflict_falls_back_where_that_is_configured() -> None:
    inserting = operation_with({"items": "$.results", "status": "status"}, kind="insert", on_conflict="update")
    found = items({"results": [{"status": 201}, {"status": 409}, {"status": 404}]}, inserting)

    assert (list(found.accepted), list(found.fallback), list(found.rejected)) == ([0], [1], [2])


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        (BY_ID, b""),
        (BY_ID, b"<html>502 Bad Gateway</html>"),
        (BY_ID, b"{}"),
        (BY_ID, b"null"),
        (BY_ID, b"[]"),
        (BY_ID, b'{"results": null}'),
        (BY_ID, b'{"results": {"1": 200}}'),
        (BY_ID, b'{"results": [1, 2, 3]}'),
        (BY_ID, b'{"results": [{"status": 200}]}'),
        (BY_ID, b'{"results": [{"id": "9", "status": 200}]}'),
        (BY_ID, b'{"results": [{"id": null, "status": 200}]}'),
        (BY_ID, b'{"results": [{"id": "1", "status": 200}, {"id": "1", "status": 400}]}'),
        (BY_ID, b'{"results": [{"id": "1", "status": "ok"}]}'),
        (BY_ID, b'{"results": [{"id": "1", "status": [200]}]}'),
        (BY_ORDER, b'{"results": [{"status": 200}, {"status": 200}, {"status": 200}, {"status": 200}]}'),
        (BY_INDEX, b'{"results": [{"at": 3, "status": 200}]}'),
        (BY_INDEX, b'{"results": [{"at": -1, "status": 200}]}'),
        (BY_INDEX, b'{"results": [{"at": 0.0, "status": 200}]}'),
        (ERRORS, b'{"errors": [{"why": "somewhere"}]}'),
        (ERRORS, b'{"errors": "all of them"}'),
        (ERRORS, b"[]"),
        (BY_ID, b"[" * 100_000),
        (BY_ID, b'{"results": ' + b"[" * 100_000),
        (BY_ID, b'{"results": [{"id": "\xff", "status": 200}]}'),
    ],
)
def test_results_that_cannot_be_read_leave_the_outcome_unknown(operation: RouteOperation, body: bytes) -> None:
    """Neither a success nor a refusal: the same bytes under the same key may ask again, and nothing breaks."""
    verdict = judged(answer(200, body), operation, THREE)

    assert isinstance(verdict, TargetFault)
    assert verdict.outcome_unknown


def test_results_that_were_cut_are_not_read() -> None:
    whole = json.dumps({"results": [{"id": "1", "status": 200}]}).encode()
    verdict = judged(Answer(status=200, body=whole, truncated=True), BY_ID, ONE)

    assert isinstance(verdict, TargetFault)
    assert "max_response_bytes" in verdict.reason


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["results", "errors", "id", "at", "status", "why"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("operation", [BY_ID, BY_ORDER, BY_INDEX, ERRORS, ERRORS_WITH_STATUS])
@given(document=_json | st.lists(_json, max_size=3).map(lambda listed: {"results": listed, "errors": listed}))
def test_no_answer_whatever_breaks_the_judging_or_loses_a_record(operation: RouteOperation, document: Any) -> None:
    """Each record gets exactly one verdict, or the answer as a whole is unreadable."""
    verdict = told(document, operation)

    if isinstance(verdict, Items):
        decided = [*verdict.accepted, *verdict.rejected, *verdict.retry, *verdict.fallback]
        assert sorted(decided) == [0, 1, 2]
    else:
        assert isinstance(verdict, TargetFault)


# What is kept of an answer --------------------------------------------------------------------------------------------


def test_an_excerpt_is_short_and_printable() -> None:
    assert excerpt(b"bad\x00\n\xff" + b"x" * 10_000).startswith("bad  \N{REPLACEMENT CHARACTER}xxx")
    assert len(excerpt(b"x" * 10_000)) == 500
    assert len(excerpt("ä".encode() * 10_000)) == 500
    assert excerpt(b"") == ""


def test_a_reason_quotes_the_answer_but_not_all_of_it() -> None:
    verdict = judged(answer(503, b"down for repair " * 100), UPSERT_MANY)

    assert isinstance(verdict, TargetFault)
    assert verdict.reason.startswith("answered 503 (down for repair")
    assert len(verdict.reason) < 300


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_every_item_was_refused_for_are_no_records_fault(status: int) -> None:
    verdict = told({"results": [{"status": status}] * 3}, BY_ORDER, status=207)

    assert isinstance(verdict, Pause)
    assert verdict.cause == "credentials"


def test_one_item_that_may_not_be_written_is_that_records_affair() -> None:
    found = items({"results": [{"status": 200}, {"status": 403}, {"status": 200}]}, BY_ORDER)

    assert set(found.rejected) == {1}
