"""A target's routes turn changes into the same requests every time, and name their mapping by what it sends."""

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.routing import HttpRequest, Route, RouteOperation, Transform, compile_routes
from pipelines.delivery.template import RecordUnrenderable

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
BATCH = {"max_records": 100}


def change(change_id: int = 1, row: Any = None, *, key: str | None = None, operation: Any = "update") -> ChangeRecord:
    row = {"id": change_id, "name": "Ada", "email": f"{change_id}@example.com"} if row is None else row
    payload = row if isinstance(row, bytes) else json.dumps(row).encode()
    return ChangeRecord(change_id, "customers", key or str(change_id), operation, payload, instant_of(NOON))


def compiled(route: dict[str, Any], function: Callable[[dict[str, Any]], Any] | None = None, **target: Any) -> Route:
    config = TargetConfig.model_validate(
        {"name": "crm", "base_url": "https://crm.example", "routes": {"customers": route}} | target
    )
    transforms = {"m:f": Transform(name="m:f", function=function)} if function is not None else None
    return compile_routes(config, transforms)["customers"]


def upsert(*, record: Any = None, function: Any = None, **operation: Any) -> RouteOperation:
    route: dict[str, Any] = {"upsert": {"path": "/contacts"} | operation, "record": record}
    if function is not None:
        route["transform"] = "m:f"
    return compiled(route, function).operations["upsert"]


def sent(operation: RouteOperation, *changes: ChangeRecord) -> HttpRequest:
    fragments = [operation.render_record(one) for one in changes]
    assert None not in fragments
    return operation.request(changes, [fragment for fragment in fragments if fragment is not None])


# Requests ------------------------------------------------------------------------------------------------------------


def test_without_a_record_the_payloads_bytes_go_through_unparsed():
    payload = b'{"price": 12345678901234567.890,   "id": 1}'
    request = sent(upsert(), change(row=payload))
    assert request == HttpRequest(method="POST", path="/contacts", body=payload, content_type="application/json")


def test_a_record_is_written_as_its_template_says():
    request = sent(upsert(record={"id": "$id", "properties": {"firstname": "$name"}}), change(7))
    assert json.loads(request.body or b"") == {"id": 7, "properties": {"firstname": "Ada"}}


def test_one_record_is_named_in_the_path():
    operation = upsert(path="/contacts/${_key}", method="PUT")
    assert operation.path_names_record
    request = sent(operation, change(key="a/b ü"))
    assert (request.method, request.path) == ("PUT", "/contacts/a%2Fb%20%C3%BC")


def test_a_batch_is_the_bare_list_or_what_wraps_it():
    records = [change(1, {"id": 1}), change(2, {"id": 2})]
    bare, wrapped = (
        upsert(batch=BATCH),
        upsert(batch=BATCH | {"body": {"inputs": "$records", "stream": "$_stream"}}),
    )
    assert sent(bare, *records).body == b'[{"id": 1},{"id": 2}]'
    assert sent(wrapped, *records).body == b'{"inputs":[{"id": 1},{"id": 2}],"stream":"customers"}'
    assert not wrapped.path_names_record


def test_a_batch_can_hold_keys_alone():
    route = compiled(
        {"delete": {"path": "/archive", "method": "POST", "batch": BATCH | {"body": {"ids": "$keys"}}}},
    )
    request = sent(route.operations["delete"], change(key='a"b'), change(key="2"))
    assert (request.method, request.body) == ("POST", b'{"ids":["a\\"b","2"]}')


@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("format", ["json", "ndjson", "lines"])
def test_a_planner_can_add_up_the_size_of_a_body(batch: Any, format: str):
    """`overhead_bytes`, the fragments and one byte for each never come to less than what is sent."""
    operation = upsert(batch=batch, format=format, record="${id} ${name}")
    records = [change(1), change(2)] if batch else [change(1)]
    fragments = [operation.render_record(one) or b"" for one in records]
    body = operation.request(records, fragments).body or b""
    assert len(body) <= operation.overhead_bytes + sum(len(fragment) + 1 for fragment in fragments) <= len(body) + 1


def test_ndjson_is_one_record_a_line():
    operation = upsert(format="ndjson", batch=BATCH)
    request = sent(operation, change(1, {"id": 1}), change(2, b'{\n"id":\r\n2}'))
    assert request.content_type == "application/x-ndjson"
    assert request.body == b'{"id": 1}\n{ "id":  2}\n'
    assert sent(upsert(format="ndjson"), change(1, {"id": 1})).body == b'{"id": 1}\n'


def test_lines_are_lines():
    operation = upsert(format="lines", record="c,id=${id} name=${name}", batch=BATCH)
    request = sent(operation, change(1), change(2))
    assert request.content_type == "text/plain; charset=utf-8"
    assert request.body == b"c,id=1 name=Ada\nc,id=2 name=Ada\n"


def test_a_form_is_one_record():
    request = sent(upsert(format="form", record={"id": "$id", "to": "${name} <${email}>"}), change(1))
    assert request.content_type == "application/x-www-form-urlencoded"
    assert request.body == b"id=1&to=Ada+%3C1%40example.com%3E"
    assert sent(upsert(format="form"), change(1, {"a": 1, "b": None})).body == b"a=1&b="


def test_a_compressed_body_is_the_same_bytes_each_time(monkeypatch: pytest.MonkeyPatch):
    """A repeat under the old key must be the old body, whatever the clock says."""
    operation = upsert(compress="gzip", batch=BATCH)
    request = sent(operation, change(1, {"id": 1}))
    assert request.compressed
    assert gzip.decompress(request.body or b"") == b'[{"id": 1}]'
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    assert sent(operation, change(1, {"id": 1})) == request


def test_a_content_type_among_the_headers_replaces_the_formats_own():
    operation = compiled({"upsert": {"path": "/c"}}, headers={"content-type": "application/vnd.api+json"}).operations[
        "upsert"
    ]
    assert sent(operation, change()).content_type == "application/vnd.api+json"


# Deletes -------------------------------------------------------------------------------------------------------------


def test_a_delete_has_no_body():
    route = compiled({"record": {"id": "$id"}, "upsert": {"path": "/c"}, "delete": {"path": "/c/${_key}"}})
    request = sent(route.operations["delete"], change(3))
    assert request == HttpRequest(method="DELETE", path="/c/3")


def test_a_delete_has_a_body_where_it_says_so():
    own = compiled({"delete": {"path": "/c", "record": {"gone": "$_key"}}})
    row = compiled({"delete": {"path": "/c", "record": None}})
    post = compiled({"record": {"id": "$id"}, "delete": {"path": "/c", "method": "POST"}})
    assert sent(own.operations["delete"], change(3)).body == b'{"gone":"3"}'
    assert sent(row.operations["delete"], change(3, {"id": 3})).body == b'{"id": 3}'
    assert sent(post.operations["delete"], change(3)).body == b'{"id":3}'


def test_a_delete_in_a_batch_may_have_a_record_of_its_own():
    """As in a batch endpoint that takes whole requests."""
    route = compiled(
        {
            "record": {"method": "PUT", "path": "/records/${_key}", "body": {"data": "$_row"}},
            "upsert": {"path": "/batch", "batch": {"max_records": 25, "body": {"requests": "$records"}}},
            "delete": {
                "method": "POST",
                "path": "/batch",
                "batch": {"max_records": 25, "body": {"requests": "$records"}},
                "record": {"method": "DELETE", "path": "/records/${_key}"},
            },
        }
    )
    assert json.loads(sent(route.operations["upsert"], change(3, {"id": 3})).body or b"") == {
        "requests": [{"method": "PUT", "path": "/records/3", "body": {"data": {"id": 3}}}]
    }
    assert json.loads(sent(route.operations["delete"], change(3)).body or b"") == {
        "requests": [{"method": "DELETE", "path": "/records/3"}]
    }


def test_a_record_whose_path_names_no_record_is_refused_while_it_is_alone():
    """The drain can then bury it before it is in a request with others."""
    route = compiled({"delete": {"path": "/c/${email}"}})
    with pytest.raises(RecordUnrenderable, match="path is empty"):
        route.operations["delete"].render_record(change(row={"email": None}))


# Which operation -----------------------------------------------------------------------------------------------------

ALL = {"insert": {"path": "/i"}, "update": {"path": "/u/${_key}"}, "delete": {"path": "/d/${_key}"}}


@pytest.mark.parametrize(
    ("first", "last", "kind"),
    [
        ("insert", "insert", "insert"),
        ("insert", "update", "insert"),
        ("insert", "delete", "delete"),
        ("update", "update", "update"),
        ("update", "delete", "delete"),
        ("delete", "delete", "delete"),
        ("delete", "insert", "update"),
        ("update", "snapshot", "update"),
        ("snapshot", "snapshot", "insert"),
        ("snapshot", "update", "insert"),
        ("snapshot", "delete", "delete"),
    ],
)
def test_what_the_target_had_and_shall_have_decides(first: Any, last: Any, kind: str):
    operation = compiled(ALL).operation_for(first, last)
    assert operation is not None
    assert operation.kind == kind
    upserted = compiled({"upsert": {"path": "/"}, "delete": {"path": "/${_key}"}}).operation_for(first, last)
    assert upserted is not None
    assert upserted.kind == ("delete" if last == "delete" else "upsert")


def test_what_a_route_does_not_want_is_filtered():
    only_upsert, only_insert = compiled({"upsert": {"path": "/"}}), compiled({"insert": {"path": "/"}})
    only_update, only_delete = compiled({"update": {"path": "/"}}), compiled({"delete": {"path": "/"}})
    assert only_upsert.operation_for("insert", "delete") is None
    assert only_insert.operation_for("update", "update") is None
    assert only_update.operation_for("insert", "update") is None
    assert only_delete.operation_for("insert", "update") is None


@pytest.mark.parametrize(("first", "last"), [("delete", "insert"), ("update", "insert"), ("delete", "update")])
def test_a_record_made_anew_is_inserted_where_updates_are_not_wanted(first: Any, last: Any):
    """One by one, its new insert would have been sent."""
    operation = compiled({"insert": {"path": "/"}}).operation_for(first, last)
    assert operation is not None
    assert operation.kind == "insert"


def test_a_fallback_is_known():
    route = compiled(ALL | {"insert": {"path": "/i", "on_conflict": "update"}})
    assert route.operations["insert"].on_conflict == "update"
    assert route.operations["update"].on_missing is None


# Fingerprints --------------------------------------------------------------------------------------------------------


def fingerprint(function: Any = None, version: str = "", target: Any = None, **operation: Any) -> str:
    route = {"upsert": {"path": "/contacts"} | operation}
    transforms = {}
    if function is not None:
        route["transform"] = "m:f"
        transforms["m:f"] = Transform(name="m:f", function=function, version=version)
    config = {"name": "crm", "base_url": "https://crm.example", "routes": {"customers": route}} | (target or {})
    return compile_routes(TargetConfig.model_validate(config), transforms)["customers"].operations["upsert"].fingerprint


def test_another_mapping_has_another_fingerprint():
    """So that no target ever sees one idempotency key with two bodies."""
    prints = [
        fingerprint(),
        fingerprint(method="PUT"),
        fingerprint(path="/people"),
        fingerprint(record={"a": "$a", "b": "$b"}),
        fingerprint(record={"b": "$b", "a": "$a"}),
        fingerprint(record={"a": 1}),
        fingerprint(record={"a": 1.0}),
        fingerprint(record={"a": True}),
        fingerprint(batch=BATCH),
        fingerprint(batch=BATCH | {"body": {"inputs": "$records"}}),
        fingerprint(batch=BATCH | {"body": {"inputs": "$keys"}}),
        fingerprint(format="ndjson"),
        fingerprint(format="form"),
        fingerprint(compress="gzip"),
        fingerprint(target={"headers": {"Content-Type": "application/vnd.api+json"}}),
        fingerprint(function=str),
        fingerprint(function=str, version="2"),
    ]
    assert len(set(prints)) == len(prints)


def test_what_does_not_change_the_bytes_does_not_change_the_fingerprint():
    calm = {
        "base_url": "https://other.example",
        "max_in_flight": 9,
        "retry": {"max_elapsed": 5},
        "auth": {"type": "bearer", "token": {"env": "T"}},
    }
    assert fingerprint(target=calm) == fingerprint()
    assert fingerprint(batch={"max_records": 5, "max_bytes": 10}) == fingerprint(batch=BATCH)
    assert fingerprint(record=None) == fingerprint()
    results = {"items": "$.r", "status": "s"}
    assert fingerprint(batch=BATCH, results=results) == fingerprint(batch=BATCH)


def test_a_fingerprint_is_the_same_in_every_process():
    """It is written into idempotency keys: this value may change only together with RENDERING_VERSION."""
    assert fingerprint(record={"id": "$id"}, batch=BATCH) == "f8445a1ea717f986"


# Transforms ----------------------------------------------------------------------------------------------------------


def test_a_transform_takes_the_change_and_returns_the_record():
    asked: list[dict[str, Any]] = []

    def transform(told: dict[str, Any]) -> Any:
        asked.append(told)
        return {"price": told["row"]["price"], "big": told["row"]["big"]}

    row = b'{"price": 12345678901234567.890, "big": 92233720368547758080}'
    request = sent(upsert(function=transform), change(7, row))
    assert request.body == b'{"price":12345678901234567.890,"big":92233720368547758080}'
    assert asked == [
        {
            "change_id": 7,
            "stream": "customers",
            "key": "7",
            "operation": "update",
            "changed_at": "2024-02-29T12:00:00.000000Z",
            "row": {"price": Decimal("12345678901234567.890"), "big": 92233720368547758080},
        }
    ]


def test_a_row_too_deep_for_a_transform_is_the_records_fault():
    deep = change(1, {})._replace(payload=b"[" * 5000 + b"]" * 5000)
    with pytest.raises(RecordUnrenderable, match="nested too deeply"):
        upsert(function=lambda told: told["row"]).render_record(deep)


def test_a_transform_that_returns_none_filters_the_change():
    assert upsert(function=lambda _: None).render_record(change()) is None


def test_a_transform_is_not_asked_where_no_record_is_sent():
    """Else a filter by what a row holds could keep a target from ever hearing of its deletion."""
    route = compiled(
        {"transform": "m:f", "upsert": {"path": "/c"}, "delete": {"path": "/c/${_key}"}}, function=lambda _: None
    )
    assert route.operations["delete"].render_record(change(operation="delete")) == b""


def test_a_transform_can_make_lines_and_forms():
    assert sent(upsert(function=lambda told: f"id={told['key']}", format="lines"), change(3)).body == b"id=3\n"
    form = upsert(function=lambda _: {"a": "x y", "b": None, "c": Decimal("1.50"), "d": True}, format="form")
    assert sent(form, change(3)).body == b"a=x+y&b=&c=1.50&d=true"


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("answer", "format", "problem"),
    [
        (KeyError("x"), "json", "m:f failed: KeyError: 'x'"),
        (float("nan"), "json", "returned nan"),
        ({"a": [Decimal("Infinity")]}, "json", "returned Infinity"),
        ({"a": NOON}, "json", "returned a datetime, which is not JSON"),
        ({1: 2}, "json", "the key 1; use text"),
        ("\ud800", "json", "not JSON"),
        (CYCLE, "json", "not JSON"),
        ({"a": 1}, "lines", "a line is text"),
        ("a\nb", "lines", "line break"),
        ({"a": [1]}, "form", "no flat mapping"),
    ],
)
def test_a_transform_that_fails_is_the_records_fault(answer: Any, format: str, problem: str):
    def transform(_: dict[str, Any]) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(RecordUnrenderable, match=problem):
        upsert(function=transform, format=format).render_record(change())


# Answers -------------------------------------------------------------------------------------------------------------


def rules(**results: Any) -> Any:
    return upsert(batch=BATCH, results=results).results


def test_results_are_found_where_the_file_says():
    found = rules(items="$.data.results", id="record.id", status="code", message="errors[0]", retryable=[429, 503])
    item = {"record": {"id": 7}, "code": "422", "errors": ["bad email"]}
    assert found.find({"data": {"results": [item]}}) == [item]
    assert (found.by_id, found.lists_all, found.judged, found.retryable) == (True, True, True, (429, 503))
    assert found.identity_of(item) == "7"
    assert (found.status_of(item), found.status_of({})) == (422, None)
    assert (found.message_of(item), found.message_of({"a": 1})) == (b"bad email", b'{"a":1}')


def test_items_without_id_or_index_come_in_the_requests_order():
    found = rules(items="$", status="status")
    assert found.find([{"status": 200}]) == [{"status": 200}]
    assert (found.by_id, found.index_of({}, 4)) == (False, 4)
    by_index = rules(errors="$.errors", index="row")
    assert [by_index.index_of({"row": value}, 0) for value in (3, "3")] == [3, 3]
    assert not by_index.judged


@pytest.mark.parametrize("answer", [{}, {"errors": None}, {"errors": []}])
def test_errors_may_be_left_out_where_there_are_none(answer: Any):
    assert rules(errors="$.errors", id="id").find(answer) == []


@pytest.mark.parametrize("answer", [{}, [], "ok", None, {"results": None}, {"results": {"a": 1}}])
def test_results_that_are_not_there_are_no_success(answer: Any):
    with pytest.raises((LookupError, ValueError), match=r"\$\.results"):
        rules(items="$.results", status="status").find(answer)


@pytest.mark.parametrize("answer", [{}, {"body": []}, {"body": None}, {"body": {"errors": "none"}}, "ok"])
def test_errors_whose_surroundings_are_missing_are_no_success(answer: Any):
    listed = rules(errors="$.body.errors", id="id")
    if answer == "ok":
        listed = rules(errors="$.errors", id="id")
    with pytest.raises((LookupError, ValueError)):
        listed.find(answer)


@pytest.mark.parametrize(
    "item", [{}, {"id": None, "index": None}, {"id": True, "index": True}, {"id": [], "index": "x"}, 5]
)
def test_an_item_that_names_no_record_is_not_guessed(item: Any):
    with pytest.raises((LookupError, ValueError)):
        rules(items="$.r", id="id", status="s").identity_of(item)
    with pytest.raises((LookupError, ValueError)):
        rules(items="$.r", index="index", status="s").index_of(item, 0)


def test_an_answer_knows_the_records_by_their_keys():
    assert upsert(batch=BATCH).identities([change(1, key="a"), change(2, key="b")]) == ["a", "b"]
