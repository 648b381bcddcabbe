"""A target's file is honoured to the letter or refused with the fix."""

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.delivery.config import Secret, TargetConfig
from pipelines.delivery.sections import JsonPath

MINIMAL: dict[str, Any] = {
    "name": "crm",
    "base_url": "https://crm.example",
    "routes": {"customers": {"upsert": {"path": "/contacts"}}},
}
BATCH = {"max_records": 100}


def target(**fields: Any) -> TargetConfig:
    return TargetConfig.model_validate(MINIMAL | fields)


def route(**fields: Any) -> TargetConfig:
    return target(routes={"customers": fields})


def upsert(**fields: Any) -> TargetConfig:
    return route(upsert={"path": "/contacts"} | fields)


def refused(build: Any, **fields: Any) -> tuple[str, str]:
    """Return where the first mistake is and what is said of it."""
    with pytest.raises(ValidationError) as caught:
        build(**fields)
    first = caught.value.errors()[0]
    at = (*first["loc"], *first.get("ctx", {}).get("at", ()))
    return ".".join(str(part) for part in at), first["msg"]


def test_a_short_file_gets_the_documented_defaults():
    config = target()
    assert (config.status, config.critical, config.start, config.auth.type) == ("active", True, "beginning", "none")
    assert (config.timeout_seconds, config.max_in_flight, config.rate_limit) == (15, 4, None)
    assert config.retry.model_dump() == {
        "initial_backoff": 0.5,
        "max_backoff": 30,
        "max_elapsed": 60,
        "max_retry_after": 3600,
    }
    assert config.circuit_breaker.model_dump() == {"failure_threshold": 5, "error_timeout": 30}
    assert (config.dead_letter_guard, config.probe_interval, config.max_response_bytes) == (0.5, 300, 1_000_000)
    assert config.routes["customers"].mode == "state"
    batch = upsert(batch=BATCH).routes["customers"].upsert.batch  # type: ignore[union-attr]
    assert batch is not None
    assert (batch.max_records, batch.max_bytes, batch.body) == (100, 1_000_000, None)


@pytest.mark.parametrize(
    ("kind", "method"), [("upsert", "POST"), ("insert", "POST"), ("update", "PATCH"), ("delete", "DELETE")]
)
def test_an_operation_has_its_usual_method(kind: Any, method: str):
    config = route(**{kind: {"path": "/x"}}).routes["customers"]
    assert [config.method_of(kind, operation) for _, operation in config.operations()] == [method]


def test_a_configuration_cannot_change_and_can_be_pickled():
    config = upsert(batch=BATCH, results={"items": "$.results", "status": "status"}).loaded_from("targets/crm.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.origin == "targets/crm.yaml"


# Names and URLs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("crm-eu", "crm_eu"),
        ("CRM", "crm"),
        ("crm.eu west", "crm_eu_west"),
        ("2nd", "target_2nd"),
        ("_x", "x"),
        ("", "target"),
    ],
)
def test_a_name_with_a_dash_is_refused_with_the_one_to_write(name: str, fixed: str):
    at, said = refused(target, name=name)
    assert at == "name"
    assert f"'{name}' cannot name a target: Dagster's mapping keys" in said
    assert said.endswith(f"write '{fixed}'")


@pytest.mark.parametrize("url", ["http://localhost:8001", "https://api.crm.example/v1", "https://[::1]:8443/a/b"])
def test_a_base_url_is_kept_without_its_last_slash(url: str):
    assert target(base_url=url).base_url == target(base_url=f"{url}/").base_url == url


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://crm.example", "of the form https://host/path"),
        ("crm.example/v1", "of the form https://host/path"),
        ("https://", "of the form https://host/path"),
        ("https://crm.example:port", "not a URL"),
        ("https://user:s3cret@crm.example", "holds a user's name or password"),
        ("https://crm.example?key=1", "query or fragment"),
        ("https://crm.example/#top", "query or fragment"),
        ("https://crm.example/a b", "percent-encode"),
        ("https://crm.example/a/../b", "'.' or '..'"),
    ],
)
def test_a_base_url_that_cannot_be_used_is_refused(url: str, problem: str):
    at, said = refused(target, base_url=url)
    assert at == "base_url"
    assert problem in said
    assert "s3cret" not in said


# Secrets, authentication, headers ------------------------------------------------------------------------------------

TOKEN = {"env": "CRM_TOKEN"}
OAUTH = {
    "type": "oauth2_client_credentials",
    "token_url": "https://id.example/token",
    "client_id": "me",
    "client_secret": TOKEN,
}


@pytest.mark.parametrize(
    "auth",
    [
        {"type": "none"},
        {"type": "bearer", "token": TOKEN},
        {"type": "basic", "username": "ada", "password": TOKEN},
        {"type": "basic", "username": {"env": "CRM_USER"}, "password": TOKEN},
        {"type": "api_key", "header": "X-Api-Key", "key": TOKEN},
        {"type": "api_key", "query": "key", "key": TOKEN},
        {
            "type": "oauth2_client_credentials",
            "token_url": "https://id.example/token/?tenant=7",
            "client_id": "me",
            "client_secret": TOKEN,
            "client_authentication": "basic",
        },
        {
            "type": "oauth2_client_credentials",
            "token_url": "https://id.example/token",
            "client_id": {"env": "CRM_CLIENT"},
            "client_secret": TOKEN,
            "scope": "read write",
            "audience": "crm",
            "client_authentication": "body",
        },
    ],
)
def test_each_kind_of_auth_can_be_written(auth: dict[str, Any]):
    assert target(auth=auth).auth.model_dump(exclude_none=True) == auth


@pytest.mark.parametrize(
    ("auth", "place", "problem"),
    [
        ({"type": "bearer", "token": "s3cret"}, "token", "write {env: ITS_NAME}"),
        ({"type": "basic", "username": "ada", "password": "s3cret"}, "password", "write {env: ITS_NAME}"),
        ({"type": "bearer", "token": {"env": "s3cret-value"}}, "token.env", "not the name of an environment variable"),
        ({"type": "api_key", "key": TOKEN}, "", "either a 'header' or a 'query'"),
        ({"type": "api_key", "key": TOKEN, "header": "X", "query": "x"}, "", "either a 'header' or a 'query'"),
        ({"type": "api_key", "key": TOKEN, "header": "X Y"}, "header", "not a header's name"),
        ({"type": "api_key", "key": TOKEN, "header": "Idempotency-Key"}, "header", "cannot be set here"),
        ({"type": "oauth2_client_credentials"}, "token_url", "Field required"),
        (OAUTH | {"client_secret": "s3cret"}, "client_secret", "write {env: ITS_NAME}"),
        (OAUTH | {"token_url": "id.example/token"}, "token_url", "not a URL of the form https://host/path"),
        (OAUTH | {"token_url": "https://me:s3cret@id.example"}, "token_url", "holds a user's name or password"),
        (OAUTH | {"token_url": "https://id.example/#top"}, "token_url", "has a fragment"),
        (OAUTH | {"token_url": "https://id.example/to ken"}, "token_url", "percent-encode"),
        (OAUTH | {"token_url": "https://id.example:port"}, "token_url", "is not a URL"),
        (OAUTH | {"client_authentication": "jwt"}, "client_authentication", "'basic' or 'body'"),
        (OAUTH | {"scope": ""}, "scope", "at least 1 character"),
        (OAUTH | {"token": TOKEN}, "token", "not"),
        (
            {"type": "hmac"},
            "type",
            "is not built yet; use one of none, bearer, basic, api_key, oauth2_client_credentials",
        ),
        ({"type": "standard_webhooks"}, "type", "is not built yet"),
        ({"type": "mtls"}, "type", "is not built yet"),
        ({"type": "berer"}, "type", "it is one of none, bearer"),
        ({"token": TOKEN}, "type", "is missing; it is one of"),
        ("none", "", "such as {type: bearer"),
    ],
)
def test_auth_that_cannot_be_honoured_is_refused(auth: Any, place: str, problem: str):
    at, said = refused(target, auth=auth)
    assert at.startswith("auth")
    assert at.endswith(place)
    assert problem in said
    assert "s3cret" not in said


def test_headers_are_plain_or_secret():
    headers = target(headers={"X-Team": "data", "X-Key": TOKEN}).headers
    assert headers == {"X-Team": "data", "X-Key": Secret(env="CRM_TOKEN")}


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"idempotency-key": "x"}, "every request carries its own"),
        ({"Content-Length": "5"}, "follows from the body"),
        ({"Host": "x"}, "follows from base_url"),
        ({"Content-Encoding": "gzip"}, "compress: gzip"),
        ({"X Y": "x"}, "not a header's name"),
        ({"X-A": "a\nb"}, "printable ASCII"),
        ({"X-A": " a"}, "printable ASCII"),
        ({"X-A": "ü"}, "printable ASCII"),
        ({"X-A": "1", "x-a": "2"}, "is the same header as 'X-A'"),
        ({"Content-Type": TOKEN}, "write it plainly"),
        ({"X-A": 5}, "valid string"),
        ({"authorization": "Bearer x"}, "'auth' sets this header"),
    ],
)
def test_headers_that_are_not_the_users_to_set_are_refused(headers: Any, problem: str):
    at, said = refused(target, headers=headers, auth={"type": "bearer", "token": TOKEN})
    assert at.startswith("headers")
    assert problem in said


def test_an_authorization_header_may_be_set_where_auth_does_not():
    assert target(headers={"Authorization": TOKEN}).headers["Authorization"] == Secret(env="CRM_TOKEN")
    assert refused(target, auth=OAUTH, headers={"authorization": TOKEN})[0] == "headers.authorization"
    key = {"type": "api_key", "key": TOKEN, "header": "X-Api-Key"}
    assert refused(target, auth=key, headers={"x-api-key": "x"})[0] == "headers.x-api-key"


# Limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": 301}, "timeout_seconds"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds"),
        ({"timeout_seconds": "15"}, "timeout_seconds"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_in_flight": 65}, "max_in_flight"),
        ({"max_in_flight": True}, "max_in_flight"),
        ({"max_in_flight": 4.0}, "max_in_flight"),
        ({"critical": "no"}, "critical"),
        ({"critical": 0}, "critical"),
        ({"status": "activ"}, "status"),
        ({"rate_limit": {"burst": 1}}, "rate_limit.requests_per_second"),
        ({"rate_limit": {"requests_per_second": 0}}, "rate_limit.requests_per_second"),
        ({"rate_limit": {"requests_per_second": 1, "burst": 0}}, "rate_limit.burst"),
        ({"retry": {"initial_backoff": 31}}, "retry"),
        ({"retry": {"initial_backoff": 1, "max_elapsed": 0.5}}, "retry"),
        ({"retry": {"max_elapsed": 86_371}}, "retry.max_elapsed"),
        ({"retry": {"max_elapsed": 86_000}, "timeout_seconds": 300}, "retry.max_elapsed"),
        ({"retry": {"max_backoff": float("inf")}}, "retry.max_backoff"),
        ({"retry": {"initial_backoff": 0}}, "retry.initial_backoff"),
        ({"circuit_breaker": {"failure_threshold": 0}}, "circuit_breaker.failure_threshold"),
        ({"dead_letter_guard": 1.1}, "dead_letter_guard"),
        ({"probe_interval": 0}, "probe_interval"),
        ({"probe_interval": 1e9}, "probe_interval"),
        ({"circuit_breaker": {"error_timeout": 1e12}}, "circuit_breaker.error_timeout"),
        ({"retry": {"max_backoff": 1e12}}, "retry.max_backoff"),
        ({"retry": {"max_retry_after": 1e12}}, "retry.max_retry_after"),
        ({"rate_limit": {"requests_per_second": 1e-12}}, "rate_limit.requests_per_second"),
        ({"max_response_bytes": 0}, "max_response_bytes"),
        ({"success_on": [99]}, "success_on.0"),
        ({"success_on": 404}, "success_on"),
        ({"drop_on": [True]}, "drop_on.0"),
        ({"success_on": [404], "drop_on": [404]}, "drop_on"),
        ({"retrys": {}}, "retrys"),
        ({"routes": {}}, "routes"),
    ],
)
def test_a_value_outside_of_its_limits_is_refused(fields: dict[str, Any], place: str):
    assert refused(target, **fields)[0] == place


def test_a_start_is_one_of_three():
    at, said = refused(target, start="yesterday")
    assert at == "start"
    assert "'snapshot', 'now' or 'beginning'" in said
    assert target(start="now").start == "now"


# Routes --------------------------------------------------------------------------------------------------------------

X = {"path": "/x"}
ID = {"path": "/x/${_key}"}


@pytest.mark.parametrize(
    ("fields", "place", "problem"),
    [
        ({}, "", "give at least one of upsert, insert, update, delete"),
        ({"upsert": X, "insert": X}, "", "'upsert' already stands for"),
        ({"upsert": X, "update": X}, "", "'upsert' already stands for"),
        ({"upsert": None}, "upsert", "is empty"),
        ({"upsert": X, "read": None}, "read", "is empty"),
        ({"upsert": X, "reconcile": None}, "reconcile", "is empty"),
        ({"upsert": X, "on_dead": "skip"}, "on_dead", "'continue', 'block' or 'supersede'"),
        ({"upsert": X, "mode": "event", "on_dead": "supersede"}, "on_dead", "use continue or block"),
        ({"upsert": X | {"on_conflict": "update"}}, "upsert.on_conflict", "belongs to 'insert' alone"),
        ({"insert": X | {"on_missing": "insert"}}, "insert.on_missing", "belongs to 'update' alone"),
        ({"insert": X | {"on_conflict": "update"}}, "insert.on_conflict", "no 'update' to turn to"),
        ({"update": X | {"on_missing": "insert"}}, "update.on_missing", "no 'insert' to turn to"),
        ({"upsert": X | {"path": "/x/$id"}}, "upsert.path", "write ${id}"),
        ({"upsert": X, "record": {"a": ["$first name"]}}, "record.a.0", "write ${first}"),
        ({"upsert": X | {"record": {"a": "$_kye"}}}, "upsert.record.a", "did you mean $_key?"),
        ({"delete": ID, "record": {"a": "$a"}}, "record", "no operation of the route uses it"),
        ({"upsert": X | {"record": {"a": 1}}, "record": {"a": "$a"}}, "record", "no operation of the route uses it"),
        ({"upsert": X, "record": {"a": 1}, "transform": "m:f"}, "transform", "in place of 'record'"),
        ({"upsert": X, "transform": "m.f"}, "transform", "package.module:function"),
        ({"delete": ID, "transform": "m:f"}, "transform", "no operation of the route uses it"),
        ({"delete": ID | {"format": "ndjson"}}, "delete.format", "has no body"),
        ({"delete": ID | {"compress": "gzip"}}, "delete.compress", "has no body"),
        ({"upsert": X | {"method": "post"}}, "upsert.method", "'POST'"),
        ({"mode": "stream", "upsert": X}, "mode", "'state' or 'event'"),
    ],
)
def test_a_route_that_cannot_be_honoured_is_refused(fields: dict[str, Any], place: str, problem: str):
    at, said = refused(route, **fields)
    assert at == f"routes.customers.{place}".rstrip(".")
    assert problem in said


RESULTS = {"items": "$.results", "status": "status"}


@pytest.mark.parametrize(
    ("fields", "place", "problem"),
    [
        ({"results": RESULTS}, "results", "there is no 'batch'"),
        ({"batch": {"max_records": 0}}, "batch.max_records", "greater than or equal to 1"),
        ({"batch": {"max_recods": 5}}, "batch.max_records", "required"),
        ({"batch": BATCH | {"body": {"a": 1}}}, "batch.body", "neither is there"),
        ({"batch": BATCH | {"body": ["$records", {"a": "${keys}"}]}}, "batch.body.1.a", "as a whole value"),
        ({"batch": BATCH, "path": "/c/${_key}"}, "path", "names one record, but a batch is many"),
        ({"batch": BATCH, "path": "/c?by=${email}"}, "path", "names one record, but a batch is many"),
        ({"batch": BATCH | {"body": "$keys"}, "record": {"a": 1}}, "record", "no record is sent"),
        ({"batch": BATCH, "format": "form"}, "format", "a form holds one record"),
        ({"batch": BATCH | {"body": "$records"}, "format": "ndjson"}, "batch.body", "line by line"),
        ({"format": "lines"}, "format", "a record is one string"),
        ({"format": "lines", "record": {"a": "$a"}}, "record", "a record is one string"),
        ({"format": "form", "record": {"a": ["$a"]}}, "record.a", "a form is flat"),
        ({"format": "xml"}, "format", "'json', 'ndjson', 'form' or 'lines'"),
        ({"compress": "zstd"}, "compress", "'gzip'"),
        ({"batch": BATCH, "results": {}}, "results", "either 'items'"),
        ({"batch": BATCH, "results": RESULTS | {"errors": "$.e"}}, "results", "either 'items'"),
        ({"batch": BATCH, "results": RESULTS | {"id": "id", "index": "i"}}, "results", "not by both"),
        ({"batch": BATCH, "results": {"items": "$.r"}}, "results", "'status' must say"),
        ({"batch": BATCH, "results": {"errors": "$.e"}}, "results", "say by 'id' or 'index'"),
        (
            {"batch": BATCH, "results": {"errors": "$.e", "id": "id", "retryable": [429]}},
            "results",
            "'status' must say",
        ),
        ({"batch": BATCH, "results": RESULTS | {"items": "results"}}, "results.items", "write '$.results'"),
        ({"batch": BATCH, "results": RESULTS | {"id": "a..b"}}, "results.id", "'a..b' is not a path"),
        ({"batch": BATCH, "results": RESULTS | {"id": "$.*"}}, "results.id", "is not a path"),
    ],
)
def test_an_operation_that_cannot_be_honoured_is_refused(fields: dict[str, Any], place: str, problem: str):
    at, said = refused(upsert, **fields)
    assert at == f"routes.customers.upsert.{place}"
    assert problem in said


@pytest.mark.parametrize(
    "fields",
    [
        {"insert": X},
        {"mode": "event", "insert": X, "update": X, "delete": X | {"method": "POST"}},
        {"insert": X | {"on_conflict": "update"}, "update": ID | {"on_missing": "insert"}},
        {"upsert": X, "delete": ID, "record": {"id": "$id"}, "on_dead": "continue"},
        {"upsert": X | {"batch": BATCH, "path": "/${_stream}/upsert"}},
        {"upsert": X | {"format": "lines", "record": "${id}", "compress": "gzip"}},
        {"upsert": X | {"format": "form"}},
        {"upsert": X, "transform": "my_company.crm:contact"},
        {"delete": X | {"record": None, "compress": "gzip"}},
        {"upsert": X | {"batch": BATCH, "results": {"items": "$", "status": "index.status", "index": "i"}}},
        {"delete": X | {"method": "POST", "batch": BATCH | {"body": {"ids": "$keys"}}}},
    ],
)
def test_what_makes_sense_is_taken(fields: dict[str, Any]):
    assert route(**fields).routes["customers"].mode == fields.get("mode", "state")


def test_a_route_knows_the_columns_that_it_names():
    config = route(
        record={"id": "$id"},
        insert=X,
        update=ID | {"record": {"mail": "<${email}>", "row": "$_row"}},
        delete={"path": "/x/${region}/${_key}"},
    )
    assert config.routes["customers"].columns() == {"id", "email", "region"}


# Paths into answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("$", ()),
        ("$.results", ("results",)),
        ("$.a.b[0].c", ("a", "b", 0, "c")),
        ("$[1].x-y", (1, "x-y")),
        ("status", ("status",)),
        ("index._id", ("index", "_id")),
        ("errors[0].message", ("errors", 0, "message")),
        ("$.2", ("2",)),
    ],
)
def test_a_path_is_names_and_positions(text: str, steps: tuple[str | int, ...]):
    assert JsonPath.parse(text).steps == steps


@pytest.mark.parametrize("text", ["", ".", "$.", "$a", "$..a", "a b", "a[", "a[x]", "a[-1]", "$.*", "a.[0]", "$.a[0]b"])
def test_anything_else_is_no_path(text: str):
    with pytest.raises(ValueError, match="is not a path"):
        JsonPath.parse(text)


def test_a_path_finds_what_is_there_and_says_when_nothing_is():
    document = {"a": {"b": [{"c": 0}]}, "n": None, "2": "two", "text": "abc"}
    assert JsonPath.parse("$").find(document) is document
    assert JsonPath.parse("$.a.b[0].c").find(document) == 0
    assert JsonPath.parse("$.n").find(document) is None
    assert JsonPath.parse("$.2").find(document) == "two"
    for missing in ("$.a.x", "$.a.b[1]", "$.a[0]", "$.a.b.c", "$.text[0]", "$.n.x"):
        with pytest.raises(LookupError, match="there is nothing at"):
            JsonPath.parse(missing).find(document)
