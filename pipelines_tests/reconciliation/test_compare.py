"""What differs is found, whatever it is; what merely looks different is not."""

import json
from typing import Any

import pytest

from pipelines.delivery.config import RouteConfig
from pipelines.delivery.reading import ROW, TRANSFORMED, Rules, Shape, shape_of
from pipelines.delivery.sections import JsonPath
from pipelines.reconciliation.compare import Difference, FieldRules, Pair, decode, differences, value_at


def differing(should: Any, does: Any, *, shape: Shape = ROW, rules: dict[str, Rules] | None = None) -> tuple[str, ...]:
    """Return the fields in which two records differ, each given as it is written in JSON."""
    pair = Pair(key="1", should=decode(json.dumps(should)), does=decode(json.dumps(does)))
    found = differences([pair], shape=shape, rules=FieldRules.of(rules or {}, shape))
    return found[0].fields if found else ()


@pytest.mark.parametrize(
    "value",
    ["text", "", 0, 1, -1.5, True, False, None, [], [1, "a", None], {}, {"a": {"b": [1]}}, 12345678901234567890],
)
def test_everything_is_equal_to_itself(value: Any) -> None:
    assert differing({"f": value}, {"f": value}) == ()
    assert differing({"f": value}, {"f": value}, shape=TRANSFORMED) == ()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        ("a", "A"),
        ("a", "a "),
        (1, 2),
        (1, "1"),
        (1, True),
        (0, False),
        (True, "true"),
        (None, ""),
        (None, 0),
        (None, False),
        ("x", None),
        ([1, 2], [2, 1]),
        ([1], [True]),
        ([], {}),
        ({"a": 1}, {"a": 2}),
        (123456789012345678, 123456789012345679),
        ("2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00"),
    ],
)
def test_everything_else_is_different_unless_a_rule_says_otherwise(one: Any, other: Any) -> None:
    assert differing({"f": one}, {"f": other}) == ("f",)
    assert differing({"f": other}, {"f": one}) == ("f",)


def test_a_number_is_the_same_however_it_is_written() -> None:
    pair = Pair(key="1", should=decode('{"f": 1.50, "g": 2}'), does=decode('{"f": 1.5, "g": 2.0}'))

    assert differences([pair], shape=ROW, rules=FieldRules()) == []


def test_a_field_that_is_not_there_is_null() -> None:
    assert differing({"f": None}, {}) == ()
    assert differing({"f": 1}, {}) == ("f",)
    assert differing({"f": {"a": 1, "b": None}}, {"f": {"a": 1}}) == ()


def test_what_the_target_adds_is_its_own() -> None:
    assert differing({"f": 1}, {"f": 1, "last_modified": 17}) == ()


@pytest.mark.parametrize(
    ("rules", "one", "other"),
    [
        ("number", 19.9, "19.90"),
        ("number", "1e3", 1000),
        ("float", -124.76833333333333, -124.76833333333332),
        ("float", "0.1", 0.10000000000000001),
        ("text", 17, "17"),
        ("text", 1.50, "1.5"),
        ("text", True, "true"),
        ("time", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00"),
        ("time", "2026-01-01 00:00:00", "2026-01-01T00:00:00.000000Z"),
        ("time", "2026-01-01", "2026-01-01T00:00:00+00:00"),
        ("text", 12345678901234567890123456789012, "12345678901234567890123456789012"),
        ("time", "0001-01-01T00:00:00+01:00", "0001-01-01T01:00:00+02:00"),
        ("time", "9999-12-31T23:59:59-05:00", "9999-12-31T22:59:59-06:00"),
        ("boolean", True, 1),
        ("boolean", True, 1.0),
        ("boolean", False, "false"),
        ("case", "Ada@Example.org", "ada@example.org"),
        ("trim", " x", "x "),
        ("empty", None, ""),
        ("empty", [], None),
        ("ignore", 1, 2),
        (("trim", "case"), " X", "x"),
        (("text", "trim"), 1, " 1 "),
    ],
)
def test_a_rule_makes_alike_what_is_meant_alike(rules: Any, one: Any, other: Any) -> None:
    given = {"f": (rules,) if isinstance(rules, str) else rules}

    assert differing({"f": one}, {"f": other}, rules=given) == ()
    assert differing({"f": other}, {"f": one}, rules=given) == ()
    assert differing({"g": one}, {"g": other}, rules=given) == ("g",)


@pytest.mark.parametrize(
    ("rule", "one", "other"),
    [
        ("number", "1", "2"),
        ("number", "x", "y"),
        ("number", "nan", "NaN"),
        ("float", 1.0, 1.0001),
        ("number", 1000, "1_000"),
        ("float", 10**400, 2),
        ("float", "1e400", "2e400"),
        ("text", 17, "18"),
        ("text", 12345678901234567890123456789012, "12345678901234567890123456789013"),
        ("time", "0001-01-01T00:00:00+01:00", "0001-01-01T00:00:00Z"),
        ("time", "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"),
        ("time", "soon", "later"),
        ("boolean", True, 2),
        ("boolean", True, False),
        ("case", "a", "b"),
        ("trim", "a b", "ab"),
        ("empty", None, 0),
        ("empty", "", False),
    ],
)
def test_a_rule_makes_nothing_else_alike(rule: Any, one: Any, other: Any) -> None:
    assert differing({"f": one}, {"f": other}, rules={"f": (rule,)}) == ("f",)


def test_fields_of_mappings_are_named_by_their_paths_and_rules_hold_for_all_within() -> None:
    shape = shape_of({"id": "$id", "p": {"a": "$a", "b": {"c": "$c"}}}, JsonPath.parse("$"), place=())
    should, does = {"id": 1, "p": {"a": "x", "b": {"c": "y"}}}, {"id": 1, "p": {"a": "X", "b": {"c": "Z"}}}

    assert differing(should, does, shape=shape) == ("p.a", "p.b.c")
    assert differing(should, does, shape=shape, rules={"p": ("case",)}) == ("p.b.c",)
    assert differing(should, does, shape=shape, rules={"p": ("case",), "p.b": ("ignore",)}) == ()


def test_a_value_that_is_a_mapping_is_compared_whole_but_what_a_transform_returns_is_structure() -> None:
    should, does = {"p": {"a": 1}}, {"p": {"a": 1, "added": 2}}

    assert differing(should, does, shape=ROW) == ("p",)
    assert differing(should, does, shape=TRANSFORMED) == ()


@pytest.mark.parametrize(
    ("rule", "one", "other", "alike"),
    [
        ("float", {"a": [0.1, {"b": "0.2"}]}, {"a": ["0.10000000000000001", {"b": 0.2}]}, True),
        ("float", {"a": [0.1]}, {"a": [0.2]}, False),
        ("case", ["A", "b"], ["a", "B"], True),
        ("case", ["A", "b"], ["b", "a"], False),
        ("case", ["A"], ["a", "a"], False),
        ("case", {"a": "X"}, {"b": "x"}, False),
        ("empty", {"a": "", "b": 1}, {"b": 1}, True),
        ("empty", {"a": 0, "b": 1}, {"b": 1}, False),
        ("time", ["2026-01-01"], ["2026-01-01T00:00:00Z"], True),
        ("case", ["A"], {"a": "a"}, False),
        ("trim", [" a"], "a", False),
    ],
)
def test_a_rule_for_a_value_that_is_a_mapping_or_a_list_holds_for_all_within(
    rule: Any, one: Any, other: Any, alike: bool
) -> None:
    assert differing({"f": one}, {"f": other}, rules={"f": (rule,)}) == (() if alike else ("f",))
    assert differing({"f": other}, {"f": one}, rules={"f": (rule,)}) == (() if alike else ("f",))


def test_what_tells_of_the_change_is_not_compared() -> None:
    template = {"id": "$id", "event": "$_change_id", "note": "at ${_changed_at}", "deep": {"op": ["$_operation"]}}
    shape = shape_of(template, JsonPath.parse("$"), place=())

    assert differing({"id": 1, "event": 1, "note": "x", "deep": {"op": ["a"]}}, {"id": 1}, shape=shape) == ()
    assert differing({"id": 1}, {"id": 2}, shape=shape) == ("id",)


def test_of_many_records_those_that_differ_are_returned_each_with_its_fields() -> None:
    pairs = [
        Pair(key=str(n), should={"a": n, "b": n}, does={"a": n + (n == 3), "b": n + (n in (3, 7))}) for n in range(9)
    ]

    assert differences(pairs, shape=ROW, rules=FieldRules()) == [
        Difference(key="3", fields=("a", "b")),
        Difference(key="7", fields=("b",)),
    ]


def test_records_with_different_columns_are_compared_by_their_own() -> None:
    """A column that was added while the changes were made: older rows had none."""
    pairs = [Pair(key="1", should={"a": 1}, does={"a": 1}), Pair(key="2", should={"a": 1, "b": 2}, does={"a": 1})]

    assert differences(pairs, shape=ROW, rules=FieldRules()) == [Difference(key="2", fields=("b",))]


def test_a_field_that_one_record_sends_and_another_does_not_is_compared_only_where_it_is_sent() -> None:
    """A transform may leave out what it likes; the target has its own there."""
    pairs = [
        Pair(key="1", should={"a": 1, "p": {"x": 1}}, does={"a": 1, "p": {"x": 1, "y": 2}}),
        Pair(key="2", should={"p": "gone", "b": 2}, does={"p": "gone", "b": 3}),
        Pair(key="3", should={"a": 1}, does={"a": 1, "b": 9, "p": "own"}),
    ]

    assert differences(pairs, shape=TRANSFORMED, rules=FieldRules()) == [Difference(key="2", fields=("b",))]


@pytest.mark.parametrize("does", [None, 1, "x", [1]])
def test_a_record_that_is_no_mapping_differs_in_all(does: Any) -> None:
    assert differing({"a": 1, "b": 2}, does) == ("a", "b")


def test_a_part_of_what_is_sent_has_the_fields_of_that_part() -> None:
    template = {"method": "PUT", "path": "/x/${id}", "body": {"data": {"name": "$name"}}}

    assert shape_of(template, JsonPath.parse("$.body.data"), place=()).fields == (("name",),)
    assert shape_of({"data": "$_row"}, JsonPath.parse("$.data"), place=()) is ROW


def test_a_value_is_shown_as_text() -> None:
    document = {"a": {"b": "x"}, "n": [1, None], "d.e": 5}

    assert value_at(document, "a.b") == "x"
    assert value_at(document, "n") == "[1,null]"
    assert value_at(document, "c") == "(none)"
    assert value_at(document, "d.e", paths=[("d.e",)]) == "5"


def test_the_shape_of_a_route_is_that_of_its_upsert() -> None:
    route = RouteConfig.model_validate(
        {
            "record": {"id": "$id", "name": "$name"},
            "upsert": {"path": "/x"},
            "read": {"path": "/x", "key": "id", "fields": {"name": "case"}},
        }
    )

    assert route.shape().fields == (("id",), ("name",))
