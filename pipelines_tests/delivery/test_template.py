"""A template says with constant bytes and spliced values what a person would write by hand."""

import json
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qsl, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.template import (
    RecordUnrenderable,
    TemplateError,
    compile_batch,
    compile_form,
    compile_json,
    compile_line,
    compile_path,
    place_text,
)

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)


def change(payload: bytes | str = b"{}", *, key: str = "1", **other: Any) -> ChangeRecord:
    text = payload.encode() if isinstance(payload, str) else payload
    fields = {"change_id": 7, "stream": "customers", "operation": "update", "instant": instant_of(NOON)} | other
    return ChangeRecord(key=key, payload=text, **fields)


def rendered(template: Any, payload: bytes | str = b"{}", **other: Any) -> str:
    return compile_json(template).render(change(payload, **other)).decode()


# JSON ----------------------------------------------------------------------------------------------------------------


def test_a_dollar_name_is_the_value_as_it_is():
    payload = '{"id": 7, "tags": ["a", {"b": null}], "email": "ada@example.com"}'
    assert rendered({"id": "$id", "tags": "$tags", "email": "$email"}, payload) == (
        '{"id":7,"tags":["a", {"b": null}],"email":"ada@example.com"}'
    )


def test_numbers_keep_the_text_that_postgres_wrote():
    """Neither a float nor a 64-bit integer ever stands between source and target."""
    payload = '{"price": 12345678901234567.890, "big": 92233720368547758080, "small": 1E-400}'
    template = {"price": "$price", "big": "$big", "small": "$small", "text": "${price} ${big}"}
    assert rendered(template, payload) == (
        '{"price":12345678901234567.890,"big":92233720368547758080,"small":1E-400,'
        '"text":"12345678901234567.890 92233720368547758080"}'
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('"Ada"', "Ada"),
        ("7", "7"),
        ("1.50", "1.50"),
        ("true", "true"),
        ("false", "false"),
        ("null", ""),
        ('["a", {"b": 1.0}]', '["a",{"b":1.0}]'),
        ('{"a": [1, 2]}', '{"a":[1,2]}'),
        (r'"a \"quoted\" \\ line\nü 😀"', 'a "quoted" \\ line\nü 😀'),
    ],
)
def test_a_name_in_braces_is_the_values_text(value: str, text: str):
    payload = f'{{"value": {value}}}'
    assert json.loads(rendered("<${value}>", payload)) == f"<{text}>"
    assert json.loads(rendered("${value}", payload)) == text
    assert compile_line("<${value}x").render(change('{"value": 7}')) == b"<7x"


def test_the_changes_own_fields_can_be_named():
    own = ["$_change_id", "$_key", "$_stream", "$_operation", "$_changed_at"]
    assert json.loads(rendered(own, key='a"b')) == [7, 'a"b', "customers", "update", "2024-02-29T12:00:00.000000Z"]
    assert json.loads(rendered("${_change_id}/${_key}/${_operation}", key='a"b')) == '7/a"b/update'


def test_the_time_of_a_change_is_told_in_utc():
    at = datetime(2024, 2, 29, 23, 30, 0, 5, tzinfo=timezone(timedelta(hours=-5)))
    assert rendered("$_changed_at", instant=instant_of(at)) == '"2024-03-01T04:30:00.000005Z"'


def test_the_whole_row_goes_through_unparsed():
    payload = '{"b": 1.0,   "a": [1,2]}'
    assert compile_json("$_row").render(change(payload)) == payload.encode()
    assert rendered({"data": "$_row"}, payload) == f'{{"data":{payload}}}'
    assert json.loads(rendered({"data": "${_row}"}, payload)) == {"data": '{"b":1.0,"a":[1,2]}'}


def test_two_dollars_are_one():
    assert json.loads(rendered(["$$", "$$name", "costs $$${price}"], '{"price": 5}')) == ["$", "$name", "costs $5"]


def test_a_key_is_never_a_template_but_may_hold_a_dollar_sign():
    assert rendered({"$$set": "$email"}, '{"email": "a@b"}') == '{"$set":"a@b"}'


def test_what_is_no_template_is_itself():
    constant = {"a": [1, 2.5, True, None, "ü"], "b": {}, "c": [], "": "'"}
    assert json.loads(rendered(constant)) == constant


def test_keys_keep_their_order():
    assert rendered({"z": 1, "a": 2}) == '{"z":1,"a":2}'


def test_a_template_says_what_it_reads():
    template = compile_json({"a": "$email", "b": "${name} ${email}", "c": "$_row", "d": "${_key}"})
    assert template.columns == {"email", "name"}
    assert template.own_fields == {"_row", "_key"}


def test_a_missing_column_makes_the_record_unrenderable():
    with pytest.raises(RecordUnrenderable, match="the row has no column 'emial', which the route's template names"):
        rendered({"id": "$id", "email": "$emial"}, '{"id": 1}')


@pytest.mark.parametrize("payload", ["[]", "{", "", "null", '{"id": 1} 2'])
def test_a_payload_that_is_no_row_makes_the_record_unrenderable(payload: str):
    with pytest.raises(RecordUnrenderable, match="payload cannot be read"):
        rendered("$id", payload)


@pytest.mark.parametrize("template", ["$id", {"doc": "$doc"}, "about ${doc}", "row ${_row}"])
def test_a_row_that_is_nested_too_deeply_makes_the_record_unrenderable(template: Any):
    """Postgres takes it. An error of another kind would end every run at this record, and nothing after it be sent."""
    deep = change('{"id": 1, "doc": ' + "[" * 5000 + "]" * 5000 + "}")
    for render in (compile_json(template).render, compile_form(None).render):
        with pytest.raises(RecordUnrenderable, match="nested too deeply"):
            render(deep)
    assert compile_json("$_row").render(deep) == deep.payload


@pytest.mark.parametrize(
    ("template", "place", "problem"),
    [
        ({"to": {"email": ["$ok", "$first name"]}}, "record.to.email[1]", r"'\$first name': .* write \$\{first\}"),
        ({"price": "costs $5"}, "record.price", r"write \$\$ for the character"),
        ("$", "record", r"write \$\$ for the character"),
        ("${open", "record", "is never closed; write"),
        ("${}", "record", "'' is not a column's name"),
        ("${address.city}", "record", r"'address\.city' is not a column's name"),
        ("${ name }", "record", "' name ' is not a column's name"),
        ("$_kye", "record", r"did you mean \$_key\?"),
        ("x ${_id}", "record", "not one of the change's own fields"),
        ({"$set": 1}, "record.$set", r"a key is never a template; write '\$\$set'"),
        ({"a": {1: 2}}, "record.a[1]", "the key 1 is not text; put it in quotes"),
        ({"a": float("nan")}, "record.a", "nan is not a JSON number"),
        ({"a": NOON.date()}, "record.a", "'2024-02-29' is read as a date"),
    ],
)
def test_a_malformed_template_is_refused_with_its_place_and_the_fix(template: Any, place: str, problem: str):
    with pytest.raises(TemplateError, match=problem) as caught:
        compile_json(template, place=("record",))
    assert place_text(caught.value.place) == place
    assert str(caught.value).startswith(f"{place}: ")


# A reference that takes the slow way: parse, replace, write.

NAMES = st.sampled_from(["id", "name", "email", "größe", "a_1"])
ROWS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)
TEMPLATES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text().map(lambda text: text.replace("$", "$$"))
    | NAMES.map(lambda name: f"${name}")
    | st.lists(st.text().map(lambda text: text.replace("$", "$$")) | NAMES.map(lambda n: f"${{{n}}}")).map("".join)
    | st.sampled_from(["$_row", "$_key", "$_change_id", "x ${_key}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3).map(lambda text: text.replace("$", "$$")), inner, max_size=3)
    ),
    max_leaves=8,
)


def naive(template: Any, row: Any, key: str, *, ascii_only: bool) -> Any:
    if isinstance(template, dict):
        return {
            name.replace("$$", "$"): naive(value, row, key, ascii_only=ascii_only) for name, value in template.items()
        }
    if isinstance(template, list):
        return [naive(value, row, key, ascii_only=ascii_only) for value in template]
    if not isinstance(template, str):
        return template
    known = row | {"_row": row, "_key": key, "_change_id": 7}
    if re.fullmatch(r"\$\w+", template):
        return known[template[1:]]

    def text(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        value = known[found[1]]
        if isinstance(value, str):
            return value
        return "" if value is None else json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"))

    return re.sub(r"\$\$|\$\{(\w+)\}", text, template)


@given(template=TEMPLATES, row=ROWS, named=ROWS, key=st.text(min_size=1), ascii_only=st.booleans())
def test_splicing_gives_what_parsing_would(template: Any, row: Any, named: Any, key: str, ascii_only: bool):
    """Whatever the template and the row, the spliced bytes parse to what the naive way gives."""
    values = list(named.values()) or [None]
    names = ["id", "name", "email", "größe", "a_1"]
    row = row | {name: values[position % len(values)] for position, name in enumerate(names)}
    payload = json.dumps(row, ensure_ascii=ascii_only).encode()
    spliced = compile_json(template).render(change(payload, key=key))
    assert b"\n" not in spliced
    assert json.loads(spliced) == naive(template, row, key, ascii_only=ascii_only)


# Lines ---------------------------------------------------------------------------------------------------------------


def test_a_line_holds_its_values_plainly():
    payload = '{"id": 7, "name": "Ada \\"L\\"", "gone": null, "tags": ["a", "b"]}'
    line = compile_line('customers,id=${id} name="${name}",gone=${gone} ${tags} $$').render(change(payload))
    assert line.decode() == 'customers,id=7 name="Ada "L"",gone= ["a","b"] $'
    assert compile_line("$name").render(change(payload)) == b'Ada "L"'
    assert (
        compile_line("$_row").render(change(payload)) == b'{"id":7,"name":"Ada \\"L\\"","gone":null,"tags":["a","b"]}'
    )


@pytest.mark.parametrize("broken", ["\\n", "\\r", "a\\nb=1"])
def test_a_value_cannot_inject_a_line(broken: str):
    with pytest.raises(RecordUnrenderable, match="line break"):
        compile_line("x ${name}").render(change(f'{{"name": "{broken}"}}'))


def test_an_empty_line_is_no_record():
    with pytest.raises(RecordUnrenderable, match="line is empty"):
        compile_line("${name}").render(change('{"name": null}'))


@pytest.mark.parametrize("template", [{"a": 1}, None, 5, "two\nlines"])
def test_a_line_is_one_string(template: Any):
    with pytest.raises(TemplateError):
        compile_line(template)


# Forms ---------------------------------------------------------------------------------------------------------------


def test_a_form_is_encoded_field_by_field():
    payload = '{"id": 7, "name": "Ada & Söhne=1", "gone": null}'
    template = {
        "id": "$id",
        "full name": "Mrs ${name}",
        "gone": "$gone",
        "fixed": "a&b$$",
        "n": 1.5,
        "t": True,
        "z": None,
    }
    body = compile_form(template).render(change(payload)).decode()
    assert "fixed=a%26b%24&" in body
    assert "Ada+%26+S%C3%B6hne%3D1" in body
    assert parse_qsl(body, keep_blank_values=True, strict_parsing=True) == [
        ("id", "7"),
        ("full name", "Mrs Ada & Söhne=1"),
        ("gone", ""),
        ("fixed", "a&b$"),
        ("n", "1.5"),
        ("t", "true"),
        ("z", ""),
    ]


@given(row=st.dictionaries(st.text(), st.text() | st.none() | st.integers()))
def test_a_row_as_it_is_can_be_a_form(row: dict[str, Any]):
    body = compile_form(None).render(change(json.dumps(row)))
    parsed = parse_qsl(body.decode("ascii"), keep_blank_values=True, strict_parsing=bool(row))
    assert parsed == [(name, "" if value is None else str(value)) for name, value in row.items()]


@pytest.mark.parametrize("template", [{"a": [1]}, {"a": {"b": 1}}, ["$id"], "$id"])
def test_a_form_is_flat(template: Any):
    with pytest.raises(TemplateError, match="flat"):
        compile_form(template)


# Paths ---------------------------------------------------------------------------------------------------------------


@given(key=st.text(min_size=1).filter(lambda key: key not in (".", "..")))
def test_a_key_stays_within_its_segment(key: str):
    """No key, whatever its characters, reaches another resource than its own."""
    path = compile_path("/contacts/${_key}/x").render(change(key=key)).decode("ascii")
    before, segment, after = path.removeprefix("/").split("/")
    assert (before, unquote(segment, errors="strict"), after) == ("contacts", key, "x")
    assert re.fullmatch(r"(?:[A-Za-z0-9._~-]|%[0-9A-F]{2})+", segment)


@pytest.mark.parametrize("key", [".", ".."])
def test_a_segment_of_dots_makes_the_record_unrenderable(key: str):
    """`/contacts/..` would be normalised to `/`, in whatever way the dots are written."""
    for template in ("/contacts/${_key}", "/contacts/${_key}/x", "/contacts/${_key}?a=1"):
        with pytest.raises(RecordUnrenderable, match="names another resource"):
            compile_path(template).render(change(key=key))
    assert compile_path("/contacts/v${_key}?q=${_key}").render(change(key=key)).startswith(b"/contacts/v.")


def test_dots_that_meet_in_a_segment_are_seen():
    with pytest.raises(RecordUnrenderable, match="names another resource"):
        compile_path("/contacts/.${_key}").render(change(key="."))


@pytest.mark.parametrize("template", ["/contacts/${email}", "/contacts?id=${email}", "/a/${_key}${email}"])
@pytest.mark.parametrize("value", ['""', "null"])
def test_an_empty_value_in_a_path_makes_the_record_unrenderable(template: str, value: str):
    """`DELETE /contacts/` could delete them all."""
    with pytest.raises(RecordUnrenderable, match="a value in the path is empty"):
        compile_path(template).render(change(f'{{"email": {value}}}'))


def test_a_paths_constants_are_sent_as_they_are_written():
    path = "/v1/a%20b/$$batch/contacts:upsert?replace=true&x=${id}"
    assert compile_path(path).render(change('{"id": 1.50}')) == b"/v1/a%20b/$batch/contacts:upsert?replace=true&x=1.50"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("contacts", "begins with one '/'"),
        ("", "begins with one '/'"),
        ("//contacts", "begins with one '/'"),
        ("/contacts/{id}", r"write \$\{name\} for a column"),
        ("/contacts/$id", r"write \$\{id\}"),
        ("/con tacts", "write it as %20"),
        ("/größe", "write it as %C3%B6"),
        ("/a#b", "write it as %23"),
        ("/100%", "write it as %25"),
        ("/a/../b", "no segments"),
        ("/a/.", "no segments"),
    ],
)
def test_a_malformed_path_is_refused_with_the_fix(path: str, problem: str):
    with pytest.raises(TemplateError, match=problem):
        compile_path(path, place=("upsert", "path"))


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batchs_body_wraps_its_list():
    batch = compile_batch({"s": "$_stream", "inputs": "$records", "n": ["${_stream}-$$", 1]}, stream='a"b')
    assert batch.lists == "records"
    assert json.loads(batch.prefix + b"1,2" + batch.suffix) == {"s": 'a"b', "inputs": [1, 2], "n": ['a"b-$', 1]}
    assert compile_batch("$keys", stream="x").lists == "keys"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"inputs": []}, "neither is there"),
        (["$records", "$records"], "2 are there"),
        ({"a": "$records", "b": "$keys"}, "2 are there"),
        ({"inputs": "all ${records}"}, "as a whole value"),
        ({"inputs": "$records", "by": "$email"}, "it knows only"),
        ({"inputs": "$records", "by": "$_key"}, "it knows only"),
        ({"$records": 1}, "a key is never a template"),
    ],
)
def test_a_batchs_body_without_one_list_is_refused(body: Any, problem: str):
    with pytest.raises(TemplateError, match=problem):
        compile_batch(body, stream="customers")


def test_a_replay_says_that_it_is_its_original() -> None:
    """It goes out under the original's key, and one key must not have two bodies."""
    original = ChangeRecord(7, "customers", "a", "update", b'{"id": 1}', instant_of(datetime(2025, 1, 1, tzinfo=UTC)))
    replay = original._replace(change_id=99, replays=7)
    template = compile_json({"seq": "$_change_id", "text": "no ${_change_id}"})

    assert template.render(replay) == template.render(original) == b'{"seq":7,"text":"no 7"}'
