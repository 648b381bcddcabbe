"""What a person may write to have a target read back, and how each wrong word is answered."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.delivery.config import RouteConfig
from pipelines.delivery.reading import ROW, TRANSFORMED, cron_problem

UPSERT = {"path": "/x", "batch": {"max_records": 10}}
READ = {"path": "/x", "key": "id"}
CURSOR = {"style": "cursor", "parameter": "after", "next": "$.next"}


def route(**fields: Any) -> RouteConfig:
    return RouteConfig.model_validate({"upsert": UPSERT, "delete": {"path": "/x/${_key}"}} | fields)


def refused(**fields: Any) -> tuple[str, str]:
    """Return where the first mistake is, and what is said of it."""
    with pytest.raises(ValidationError) as caught:
        route(**fields)
    details = caught.value.errors()[0]
    place = (*details["loc"], *details.get("ctx", {}).get("at", ()))
    return ".".join(str(part) for part in place if not str(part).startswith("<")), details["msg"]


def reading(**fields: Any) -> dict[str, Any]:
    return {"read": READ | fields}


@pytest.mark.parametrize(
    ("fields", "place", "problem"),
    [
        ({"read": {"key": "id"}}, "read.path", "required"),
        ({"read": {"path": "/x"}}, "read.key", "required"),
        (reading(path="x"), "read.path", "begins with one '/'"),
        (reading(path="/x/${id}"), "read.path", "names no column"),
        (reading(one="/x/all"), "read.one", "names a column or $_key"),
        (reading(one="x/${id}"), "read.one", "begins with one '/'"),
        (reading(one="/x/${id}/${_change_id}"), "read.one", "tells of a change"),
        (reading(items="results"), "read.items", "write '$.results'"),
        (reading(key=[]), "read.key", "at least 1"),
        (reading(key="a b"), "read.key.0", "is not a path"),
        (reading(page="cursor"), "read.page", "is a mapping with a 'style'"),
        (reading(page={}), "read.page.style", "is missing"),
        (reading(page={"style": "scroll"}), "read.page.style", "is not known; it is one of cursor, offset"),
        (reading(page={"style": "cursor", "parameter": "a"}), "read.page.next", "required"),
        (reading(page={"style": "cursor", "next": "$.n"}), "read.page.parameter", "required"),
        (reading(page={"style": "offset"}), "read.page.parameter", "required"),
        (reading(page={"style": "page"}), "read.page.parameter", "required"),
        (reading(page={"style": "next_url"}), "read.page.next", "required"),
        (reading(page={"style": "link", "next": "$.n"}), "read.page.next", "not permitted"),
        (reading(page={"style": "link", "header": "a b"}), "read.page.header", "not a header's name"),
        (reading(page=CURSOR | {"size": 10}), "read.page", "add 'size_parameter'"),
        (reading(page=CURSOR | {"size_parameter": "n"}), "read.page", "add 'size'"),
        (reading(page=CURSOR | {"parameter": "a&b"}), "read.page.parameter", "not a query parameter's name"),
        (reading(path="/x?after=1", page=CURSOR), "read.page.parameter", "is in the path already"),
        (reading(total="$.n", total_header="X"), "read.total_header", "remove one"),
        (reading(total_header="a b"), "read.total_header", "not a header's name"),
        (reading(lag_seconds=-1), "read.lag_seconds", "greater than or equal"),
        (reading(fields={"a": "fuzzy"}), "read.fields.a.0", "'ignore'"),
        (reading(record={"a": "$a"}, compare="$.a"), "read.compare", "remove one"),
        (reading(record={"a": "$a b"}), "read.record.a", "write ${a}"),
        (reading(record="x"), "read.record", "is not a mapping"),
        (reading(compare="$.body"), "read.compare", "a row is sent as it is"),
        (reading(compare="$.body") | {"record": {"data": "$a"}}, "read.compare", "has nothing at $.body"),
        (reading(compare="$.body") | {"record": {"body": 1}}, "read.compare", "is not a mapping"),
        (
            reading(fields={"nmae": "case"}) | {"record": {"name": "$a", "p": {"x": "$b"}}},
            "read.fields.nmae",
            "did you mean 'name'?",
        ),
        (reading() | {"mode": "event"}, "read", "need not hold anything"),
        (reading() | {"upsert": None, "mode": "event"}, "upsert", "is empty"),
        ({"reconcile": {}}, "reconcile", "needs a 'read'"),
        (reading() | {"upsert": {"path": "/x", "format": "form"}}, "read", "'form' is not JSON"),
        (
            reading() | {"upsert": {"path": "/x", "batch": {"max_records": 1, "body": {"ids": "$keys"}}}},
            "read",
            "nothing of a record but its key",
        ),
        (reading() | {"reconcile": {"cron": "soon"}}, "reconcile.cron", "it has five fields"),
        (reading() | {"reconcile": {"repair": "extra"}}, "reconcile.repair", "'off', 'missing', 'stale' or 'all'"),
        (reading() | {"reconcile": {"delete_extra": True}}, "reconcile.delete_extra", "goes with 'repair: all'"),
        (
            reading() | {"reconcile": {"max_repair_fraction": 5}},
            "reconcile.max_repair_fraction",
            "less than or equal to 1",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], place: str, problem: str) -> None:
    at, said = refused(**fields)

    assert at == place
    assert problem in said


def test_a_route_that_only_deletes_has_nothing_to_compare() -> None:
    with pytest.raises(ValidationError, match="sends no records, so there are none to compare"):
        RouteConfig.model_validate({"delete": {"path": "/x/${_key}"}, "read": READ})


@pytest.mark.parametrize(
    ("operations", "reconcile", "problem"),
    [
        ({"insert": UPSERT}, {"repair": "stale"}, "no upsert, nor an insert with 'on_conflict: update'"),
        ({"update": UPSERT}, {"repair": "missing"}, "no upsert or insert"),
        ({"update": UPSERT}, {"repair": "stale"}, "no upsert, nor an insert"),
        ({"update": UPSERT}, {"repair": "all"}, "no upsert, nor an insert"),
        ({"insert": UPSERT, "update": UPSERT}, {"repair": "all"}, "no upsert, nor an insert"),
        ({"upsert": UPSERT}, {"repair": "all", "delete_extra": True}, "has no 'delete'"),
    ],
)
def test_a_repair_that_the_route_cannot_do_is_refused(operations: Any, reconcile: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        RouteConfig.model_validate(operations | {"read": READ, "reconcile": reconcile})


@pytest.mark.parametrize(
    ("operations", "repair"),
    [
        ({"insert": UPSERT}, "missing"),
        ({"insert": UPSERT}, "all"),
        ({"insert": UPSERT, "update": UPSERT}, "missing"),
        ({"insert": UPSERT | {"on_conflict": "update"}, "update": UPSERT}, "all"),
        ({"update": UPSERT}, "off"),
    ],
)
def test_a_repair_that_the_route_can_do_is_taken(operations: Any, repair: str) -> None:
    assert RouteConfig.model_validate(operations | {"read": READ, "reconcile": {"repair": repair}}).reconcile


def test_one_word_or_several_are_given_for_a_field() -> None:
    read = route(**reading(fields={"a": "case", "b": ["trim", "case"]})).read

    assert read is not None
    assert read.fields == {"a": ("case",), "b": ("trim", "case")}


def test_the_shape_is_that_of_what_is_compared() -> None:
    wrapped = {"method": "PUT", "body": {"data": {"name": "$name", "at": {"lat": "$lat"}}}}

    assert route(**reading()).shape() is ROW
    assert route(**reading(), transform="m:f").shape() is TRANSFORMED
    assert route(**reading(compare="$.body.data"), record=wrapped).shape().fields == (("name",), ("at", "lat"))
    assert route(**reading(record={"n": "$name"}), record=wrapped).shape().fields == (("n",),)


def test_what_is_read_names_columns_too() -> None:
    """They are looked for in the table, as a template's are."""
    assert route(**reading(record={"n": "$name"})).columns() == {"name"}
    assert route(**reading(fields={"email": "case"})).columns() == {"email"}


def test_what_an_update_sends_goes_before_what_an_insert_sent() -> None:
    given = RouteConfig.model_validate(
        {
            "insert": UPSERT | {"record": {"id": "$id", "by": "us"}},
            "update": {"path": "/x/${id}", "record": {"name": "$name"}},
            "read": READ,
        }
    )

    assert given.shape().fields == (("name",),)


@pytest.mark.parametrize(
    "cron", ["* * * * *", "*/5 0-6,22 1 jan-mar mon", "0 0 31 12 7", "7 3 * * 1-5", "@daily", "0 1-23/2 * * *"]
)
def test_a_cron_is_taken(cron: str) -> None:
    assert cron_problem(cron) is None


@pytest.mark.parametrize(
    "cron",
    ["", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * foo *", "* * * * 8", "5-1 * * * *", "*/0 * * * *"],
)
def test_a_cron_that_is_none_is_refused(cron: str) -> None:
    assert cron_problem(cron)
