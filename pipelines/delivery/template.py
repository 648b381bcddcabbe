"""Say in the target's words what the source holds: templates compiled to constant bytes and the values between them.

Values are never parsed into Python numbers: the text that Postgres wrote is spliced in as it stands.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal
from urllib.parse import quote, quote_plus

import msgspec
from msgspec import Raw

from pipelines.changes.record import ChangeRecord, original_id

TOO_DEEP = "the row holds JSON that is nested too deeply to be read"
"""Postgres takes thousands of levels, a parser some hundred; the row as it is goes through unparsed."""

Place = tuple[str | int, ...]
"""Where in a file something stands: keys and list positions."""


class TemplateError(Exception):
    """A template is malformed; `place` says where, `problem` what is wrong and what to write instead."""

    def __init__(self, problem: str, *, place: Place) -> None:
        super().__init__(f"{place_text(place)}: {problem}" if place else problem)
        self.problem = problem
        self.place = place


class RecordUnrenderable(Exception):
    """One change cannot be put into its template; the message is the reason. Fit for a dead letter, not for a retry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A compiled template. `render` raises RecordUnrenderable."""

    columns: frozenset[str]
    """The source columns that it reads by name; `$_row` and `$_key` are not among them."""
    own_fields: frozenset[str]
    """The fields of the change itself that it reads, such as `_key`."""
    render: Callable[[ChangeRecord], bytes]
    same: bytes | None = None
    """What it comes to for every change, if it reads nothing of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTemplate:
    """What stands before and after a batch's records."""

    prefix: bytes
    suffix: bytes
    lists: Literal["records", "keys"]


def place_text(place: Place) -> str:
    """Write *place* as people do: `routes.customers.record.tags[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def compile_json(template: Any, *, place: Place = ()) -> Template:
    """Compile a JSON template; raises TemplateError."""
    return _assemble(list(_json_parts(template, place)), _in_json)


def compile_line(template: Any, *, place: Place = ()) -> Template:
    """Compile a template of one line of text; raises TemplateError.

    A record whose values would break the line or leave it empty is unrenderable: the target would read another number
    of records than were sent.
    """
    if not isinstance(template, str):
        raise TemplateError("with 'format: lines' a record is one string, such as 'customer ${id}'", place=place)
    if "\n" in template or "\r" in template:
        raise TemplateError("a line may hold no line break", place=place)
    inner = _assemble(list(_text_parts(template, place, _in_line)), _in_line)
    return Template(columns=inner.columns, own_fields=inner.own_fields, render=_whole_line(inner.render))


def compile_form(template: Any, *, place: Place = ()) -> Template:
    """Compile a flat mapping into `a=1&b=2`; None sends the row as it is. Raises TemplateError."""
    if template is None:
        return Template(columns=frozenset(), own_fields=frozenset({"_row"}), render=_row_as_form)
    if not isinstance(template, dict):
        raise TemplateError("with 'format: form' a record is a flat mapping of names to values", place=place)
    parts: list[bytes | _Hole] = []
    for key, value in template.items():
        here = (*place, key)
        parts.append(b"&" if parts else b"")
        parts.append(_in_form(literal_key(key, here)) + b"=")
        if isinstance(value, str):
            parts.extend(_text_parts(value, here, _in_form))
        elif isinstance(value, list | dict):
            raise TemplateError("a form is flat; put a list or mapping into a 'format: json' body", place=here)
        else:
            parts.append(_in_form(_text_of(Raw(_constant(value, here)))))
    return _assemble(parts, _in_form)


def compile_path(template: str, *, place: Place = ()) -> Template:
    """Compile a URL path, with or without a query; raises TemplateError.

    Values are percent-encoded whole (RFC 3986: all but the unreserved characters), so none can reach into another
    segment. A record for which a value is empty, or a segment `.` or `..`, is unrenderable: `DELETE /contacts/` and
    `DELETE /contacts/..` would mean more than one record.
    """
    _check_path(template, place)
    inner = _assemble(list(_text_parts(template, place, _in_path)), _in_path)
    if not inner.columns and not inner.own_fields:
        return inner
    return Template(columns=inner.columns, own_fields=inner.own_fields, render=_safe_path(inner.render))


def compile_batch(template: Any, *, stream: str, place: Place = ()) -> BatchTemplate:
    """Compile a batch's body, in which `$records` or `$keys` stands for the list; raises TemplateError."""
    lists: list[Literal["records", "keys"]] = []
    around = [b""]
    for part in _structure(template, place, _batch_string_parts):
        if isinstance(part, bytes):
            around[-1] += part
        elif part.name == "_stream":
            around[-1] += _in_json(stream) if part.as_text else _encode(stream)
        else:
            lists.append("records" if part.name == "records" else "keys")
            around.append(b"")
    if len(lists) != 1:
        found = f"{len(lists)} are there" if lists else "neither is there"
        problem = f"a batch's body holds $records or $keys exactly once, as a whole value; {found}"
        raise TemplateError(problem, place=place)
    return BatchTemplate(prefix=around[0] + b"[", suffix=b"]" + around[1], lists=lists[0])


# What a change says of itself ----------------------------------------------------------------------------------------


def changed_at_text(change: ChangeRecord) -> str:
    """Return the time of the change as ISO 8601 in UTC, always with microseconds: `2024-02-29T12:00:00.000000Z`."""
    return change.changed_at.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode

_OWN_TEXT: dict[str, Callable[[ChangeRecord], str]] = {
    "_change_id": lambda change: str(original_id(change)),
    "_key": lambda change: change.key,
    "_stream": lambda change: change.stream,
    "_operation": lambda change: change.operation,
    "_changed_at": changed_at_text,
    "_row": lambda change: _compact(change.payload),
}
_OWN_JSON: dict[str, Callable[[ChangeRecord], bytes]] = {
    "_change_id": lambda change: b"%d" % original_id(change),
    "_key": lambda change: _encode(change.key),
    "_stream": lambda change: _encode(change.stream),
    "_operation": lambda change: _encode(change.operation),
    "_changed_at": lambda change: _encode(changed_at_text(change)),
    "_row": lambda change: change.payload,
}


# How text enters its surroundings ------------------------------------------------------------------------------------

_Context = Callable[[str], bytes]


def _in_json(text: str) -> bytes:
    return _encode(text)[1:-1]


def _in_line(text: str) -> bytes:
    return text.encode()


def _in_form(text: str) -> bytes:
    return quote_plus(text).encode()


def _in_path(text: str) -> bytes:
    if not text:
        raise RecordUnrenderable("a value in the path is empty, so the path would name no record or another one")
    return quote(text, safe="").encode()


_as_text: Callable[[Raw], str] = msgspec.json.Decoder(str).decode


def _text_of(value: Raw) -> str:
    """Return the text of a JSON value: a string's characters, a number as it was written, nothing for null."""
    raw = bytes(value)
    match raw[:1]:
        case b'"':
            return _as_text(value)
        case b"n":
            return ""
        case b"[" | b"{":
            return _compact(raw)
    return raw.decode()


def _compact(raw: bytes) -> str:
    return msgspec.json.format(raw, indent=-1).decode()


# Reading templates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hole:
    """Where a value goes: as it is, or as its text."""

    name: str
    as_text: bool


_WHOLE = re.compile(r"\$([^\W\d]\w*)")
_DOLLAR = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>[^{}]*)\}|(?P<bare>[^\W\d]\w*))?")
_NAME = re.compile(r"[^\W\d](?:[\w -]*\w)?")


def _json_parts(template: Any, place: Place) -> Iterator["bytes | _Hole"]:
    return _structure(template, place, _string_parts)


def _structure(
    template: Any, place: Place, string_parts: Callable[[str, Place], Iterator["bytes | _Hole"]]
) -> Iterator["bytes | _Hole"]:
    """Walk a JSON structure: constants as JSON text, its strings by *string_parts*."""
    match template:
        case str():
            yield from string_parts(template, place)
        case dict():
            yield b"{"
            for number, (key, value) in enumerate(template.items()):
                here = (*place, key)
                yield (b"," if number else b"") + _encode(literal_key(key, here)) + b":"
                yield from _structure(value, here, string_parts)
            yield b"}"
        case list():
            yield b"["
            for position, value in enumerate(template):
                yield b"," if position else b""
                yield from _structure(value, (*place, position), string_parts)
            yield b"]"
        case _:
            yield _constant(template, place)


def _string_parts(template: str, place: Place) -> Iterator["bytes | _Hole"]:
    whole = _WHOLE.fullmatch(template)
    if whole is not None:
        yield _hole(whole[1], template, place, as_text=False)
        return
    yield b'"'
    yield from _text_parts(template, place, _in_json)
    yield b'"'


def _text_parts(template: str, place: Place, context: _Context) -> Iterator["bytes | _Hole"]:
    """Split *template* into its constants, already in *context*, and the values between them, as text.

    A path's constants are written by the user as they are to be sent.
    """
    constant: _Context = _in_line if context is _in_path else context
    whole = _WHOLE.fullmatch(template)
    if whole is not None:
        yield _hole(whole[1], template, place, as_text=True)
        return
    done = 0
    for found in _DOLLAR.finditer(template):
        yield constant(template[done : found.start()])
        done = found.end()
        if found["dollar"]:
            yield constant("$")
        elif found["name"] is not None:
            yield _hole(found["name"], template, place, as_text=True)
        elif found["bare"]:
            problem = (
                f"'{template}': inside a longer string write ${{{found['bare']}}} for the column's text, "
                f"or $${found['bare']} for a dollar sign"
            )
            raise TemplateError(problem, place=place)
        else:
            if template.startswith("{", found.end()):
                raise TemplateError(f"'{template}': a '${{' is never closed; write ${{name}}", place=place)
            raise TemplateError(f"'{template}': a dollar sign stands alone; write $$ for the character", place=place)
    yield constant(template[done:])


def _hole(name: str, template: str, place: Place, *, as_text: bool) -> _Hole:
    if name.startswith("_") and name not in _OWN_TEXT:
        near = get_close_matches(name, _OWN_TEXT, n=1)
        hint = f"did you mean ${near[0]}?" if near else "known are " + ", ".join(f"${own}" for own in _OWN_TEXT)
        problem = (
            f"'{template}': ${name} is not one of the change's own fields; {hint} "
            "(names beginning with _ are kept for these; such a column needs 'transform')"
        )
        raise TemplateError(problem, place=place)
    if not _NAME.fullmatch(name):
        problem = f"'{template}': '{name}' is not a column's name; write ${{name}}, or $$ for the character"
        raise TemplateError(problem, place=place)
    return _Hole(name, as_text)


def literal_key(key: Any, place: Place) -> str:
    """Return a key as it is to be sent; a key is never a template."""
    if not isinstance(key, str):
        raise TemplateError(f"the key {key!r} is not text; put it in quotes", place=place)
    if "$" in key.replace("$$", ""):
        fixed = key.replace("$$", "$").replace("$", "$$")
        raise TemplateError(f"'{key}': a key is never a template; write '{fixed}' for the dollar sign", place=place)
    return key.replace("$$", "$")


def _constant(value: Any, place: Place) -> bytes:
    if isinstance(value, float) and not math.isfinite(value):
        raise TemplateError(f"{value} is not a JSON number; put it in quotes if text is meant", place=place)
    if value is not None and not isinstance(value, bool | int | float):
        problem = f"'{value}' is read as a {type(value).__name__}, which JSON does not have; put it in quotes"
        raise TemplateError(problem, place=place)
    return json.dumps(value).encode()


def _batch_string_parts(template: str, place: Place) -> Iterator["bytes | _Hole"]:
    for part in _string_parts(template, place):
        if isinstance(part, bytes) or part.name == "_stream" or (part.name in ("records", "keys") and not part.as_text):
            yield part
            continue
        problem = (
            f"'{template}': a batch's body is one for many records; "
            "it knows only $records or $keys (as a whole value) and $_stream"
        )
        raise TemplateError(problem, place=place)


# RFC 3986's path and query characters, percent signs only as part of an escape.
_PATH_SIGN = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})")


def _check_path(template: str, place: Place) -> None:
    if not template.startswith("/") or template.startswith("//"):
        raise TemplateError(f"'{template}': a path begins with one '/'", place=place)
    constants = _DOLLAR.sub("x", template)
    odd = _PATH_SIGN.sub("", constants)
    if odd:
        hint = "write ${name} for a column" if odd[0] in "{}" else f"write it as {quote(odd[0])}"
        raise TemplateError(f"'{template}': {odd[0]!r} cannot stand in a path; {hint}", place=place)
    if _has_dot_segment(constants):
        raise TemplateError(f"'{template}': '.' and '..' are no segments; write the path that is meant", place=place)


def _has_dot_segment(path: str) -> bool:
    return any(segment in (".", "..") for segment in path.partition("?")[0].split("/"))


# Rendering -----------------------------------------------------------------------------------------------------------


def _assemble(parts: Sequence["bytes | _Hole"], context: _Context) -> Template:
    """Return the template of *parts*. Columns are looked up in one decoding of the payload that skips all others."""
    skeleton: list[Any] = [b""]  # constants, and room for the values between them
    names: list[str] = []
    as_they_are: list[tuple[int, int]] = []
    as_text: list[tuple[int, int]] = []
    own: list[tuple[int, Callable[[ChangeRecord], bytes]]] = []
    own_fields: set[str] = set()
    for part in parts:
        if isinstance(part, bytes):
            skeleton[-1] += part
            continue
        position = len(skeleton)
        skeleton += [b"", b""]
        if part.name in _OWN_TEXT:
            own_fields.add(part.name)
            own.append((position, _own_renderer(part, context)))
            continue
        if part.name not in names:
            names.append(part.name)
        (as_text if part.as_text else as_they_are).append((position, names.index(part.name)))
    render = _renderer(skeleton, names, as_they_are, as_text, own, context)
    same = skeleton[0] if len(skeleton) == 1 else None
    return Template(columns=frozenset(names), own_fields=frozenset(own_fields), render=render, same=same)


def _own_renderer(hole: _Hole, context: _Context) -> Callable[[ChangeRecord], bytes]:
    if not hole.as_text:
        return _OWN_JSON[hole.name]
    text = _OWN_TEXT[hole.name]
    return lambda change: context(text(change))


def _renderer(
    skeleton: list[Any],
    names: list[str],
    as_they_are: list[tuple[int, int]],
    as_text: list[tuple[int, int]],
    own: list[tuple[int, Callable[[ChangeRecord], bytes]]],
    context: _Context,
) -> Callable[[ChangeRecord], bytes]:
    if len(skeleton) == 1:
        constant: bytes = skeleton[0]
        return lambda _: constant
    if skeleton == [b"", b"", b""] and own and own[0][1] is _OWN_JSON["_row"]:
        return own[0][1]
    fields = [f"c{number}" for number in range(len(names))]
    row_type = msgspec.defstruct(
        "Row", [(field, Raw) for field in fields], rename=dict(zip(fields, names, strict=True)), frozen=True, gc=False
    )
    decode = msgspec.json.Decoder(row_type).decode if names else None
    values_of: Callable[[Any], tuple[Raw, ...]] = msgspec.structs.astuple
    join = b"".join

    def fill(change: ChangeRecord) -> bytes:
        filled = skeleton.copy()  # lanes render side by side
        if decode is not None:
            try:
                values = values_of(decode(change.payload))
            except msgspec.DecodeError as error:
                raise RecordUnrenderable(_why_unreadable(change, names, error)) from None
            for position, index in as_they_are:
                filled[position] = values[index]
            for position, index in as_text:
                filled[position] = context(_text_of(values[index]))
        for position, own_field in own:
            filled[position] = own_field(change)
        return join(filled)

    def render(change: ChangeRecord) -> bytes:
        try:
            return fill(change)
        except RecursionError:
            raise RecordUnrenderable(TOO_DEEP) from None

    return render


def _why_unreadable(change: ChangeRecord, names: Sequence[str], error: Exception) -> str:
    try:
        row = msgspec.json.decode(change.payload, type=dict[str, Raw])
    except msgspec.DecodeError:
        return f"the change's payload cannot be read: {error}"
    missing = ", ".join(f"'{name}'" for name in names if name not in row)
    return f"the row has no column {missing}, which the route's template names"


def _whole_line(render: Callable[[ChangeRecord], bytes]) -> Callable[[ChangeRecord], bytes]:
    def render_line(change: ChangeRecord) -> bytes:
        return whole_line(render(change))

    return render_line


def whole_line(line: bytes) -> bytes:
    """Return *line*; raises RecordUnrenderable if the target would not read it as exactly one."""
    if b"\n" in line or b"\r" in line:
        raise RecordUnrenderable("a value holds a line break, so that one record would be read as several lines")
    if not line:
        raise RecordUnrenderable("the record's line is empty")
    return line


def _safe_path(render: Callable[[ChangeRecord], bytes]) -> Callable[[ChangeRecord], bytes]:
    def render_path(change: ChangeRecord) -> bytes:
        path = render(change)
        if _has_dot_segment(path.decode("ascii")):
            raise RecordUnrenderable("a segment of the path would be '.' or '..', which names another resource")
        return path

    return render_path


def _row_as_form(change: ChangeRecord) -> bytes:
    try:
        row = msgspec.json.decode(change.payload, type=dict[str, Raw])
        return form_of([(name, _text_of(value)) for name, value in row.items()])
    except msgspec.DecodeError as error:
        raise RecordUnrenderable(f"the change's payload cannot be read: {error}") from None
    except RecursionError:
        raise RecordUnrenderable(TOO_DEEP) from None


def form_of(fields: Sequence[tuple[str, str]]) -> bytes:
    """Return *fields* as `application/x-www-form-urlencoded`."""
    return b"&".join(_in_form(name) + b"=" + _in_form(text) for name, text in fields)
