"""Turn changes into requests: a target's routes, compiled once, rendered for every record."""

import gzip
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import msgspec

from pipelines.changes.record import ChangeRecord, Operation, keys, original_id, payloads
from pipelines.changes.texts import joined
from pipelines.delivery.config import (
    Format,
    Mode,
    OnDead,
    OperationConfig,
    RecordSource,
    ResultsConfig,
    RouteConfig,
    TargetConfig,
    compile_record,
)
from pipelines.delivery.outcome import OperationKind
from pipelines.delivery.sections import JsonPath
from pipelines.delivery.template import (
    TOO_DEEP,
    BatchTemplate,
    RecordUnrenderable,
    Template,
    changed_at_text,
    compile_batch,
    compile_form,
    compile_path,
    form_of,
    whole_line,
)

RENDERING_VERSION = 1
"""Raise it with every change of code that changes the bytes of a request: a new mapping needs a new idempotency key."""

RenderRecord = Callable[[ChangeRecord], bytes | None]

_CONTENT_TYPES: dict[Format, str] = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "form": "application/x-www-form-urlencoded",
    "lines": "text/plain; charset=utf-8",
}


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to send, but for the base URL, the credentials and the idempotency key."""

    method: str
    path: str
    """Begins with '/', percent-encoded, perhaps with a query; to be appended to the base URL as it is."""
    body: bytes | None = None
    content_type: str | None = None
    compressed: bool = False
    """The body is gzipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """A user's own function in place of a template: the change as a dict in, JSON out, None to filter the change.

    The dict has `change_id`, `stream`, `key`, `operation`, `changed_at` (text, UTC) and `row`; numbers with a fraction
    are Decimals, as Postgres wrote them.
    """

    name: str
    function: Callable[[dict[str, Any]], Any]
    version: str = ""
    """Changes with its source, for what it returns may change too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsRules:
    """How to read a batch's answer item by item."""

    lists_all: bool
    """Every record is listed; else only those refused."""
    at: JsonPath
    id: JsonPath | None = None
    index: JsonPath | None = None
    status: JsonPath | None = None
    message: JsonPath | None = None
    retryable: tuple[int, ...] = ()

    @property
    def by_id(self) -> bool:
        """Say whether an item names its record by key; else by its position."""
        return self.id is not None

    @property
    def judged(self) -> bool:
        """Say whether an item has a status."""
        return self.status is not None

    def find(self, document: Any) -> Sequence[Any]:
        """Return the items of an answer; raises ValueError or LookupError if they are not where they should be.

        A list of errors may be left out or null, as many APIs do when there are none; what it should lie in may not.
        """
        if self.lists_all or not self.at.steps:
            listed = self.at.find(document)
        else:
            holder = JsonPath(self.at.text, self.at.steps[:-1]).find(document)
            last = self.at.steps[-1]
            if not isinstance(holder, dict) or isinstance(last, int):
                raise LookupError(f"there is nothing at {self.at.text}")
            listed = holder.get(last) or []
        if not isinstance(listed, list):
            raise ValueError(f"what is at {self.at.text} is not a list")  # noqa: TRY004
        return listed

    def identity_of(self, item: Any) -> str:
        """Return the key that *item* speaks of; raises LookupError or ValueError."""
        assert self.id is not None
        found = self.id.find(item)
        if isinstance(found, bool) or not isinstance(found, str | int):
            raise ValueError(f"what is at {self.id.text} is not a key")  # noqa: TRY004
        return str(found)

    def index_of(self, item: Any, order: int) -> int:
        """Return the position in the request that *item*, the *order*-th, is about; raises as `identity_of`."""
        if self.index is None:
            return order
        found = self.index.find(item)
        if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) < 10:
            return int(found)
        if isinstance(found, bool) or not isinstance(found, int):
            raise ValueError(f"what is at {self.index.text} is not a position")  # noqa: TRY004
        return found

    def status_of(self, item: Any) -> Any:
        """Return *item*'s status, None if it has none. A number written as text is a number."""
        try:
            found = self.status.find(item) if self.status is not None else None
        except LookupError:
            return None
        if isinstance(found, str) and len(found) == 3 and found.isascii() and found.isdigit():
            return int(found)
        return found

    def message_of(self, item: Any) -> bytes:
        """Return what *item* says went wrong; the whole item, where the file does not say where."""
        try:
            found = self.message.find(item) if self.message is not None else item
        except LookupError:
            found = item
        return found.encode() if isinstance(found, str) else msgspec.json.encode(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOperation:
    """How one kind of change of one stream is sent."""

    kind: OperationKind
    batched: bool
    """A request may hold many records."""
    max_records: int
    max_bytes: int
    """Of a body before compression; close a batch before it would be passed."""
    overhead_bytes: int
    """What a body weighs beside its fragments, each of which brings one byte of separator."""
    fingerprint: str
    """Names the mapping: the same for two operations only if they make the same bytes of the same changes."""
    results: ResultsRules | None
    on_conflict: Literal["update"] | None
    on_missing: Literal["insert"] | None
    path_names_record: bool
    """The path holds a field of the record, so a 404 may be about that record."""
    render_record: RenderRecord
    """Return one record's part of the body, None if the transform filters it; raises RecordUnrenderable."""
    _method: str
    _path: Template
    _prefix: bytes
    _separator: bytes
    _suffix: bytes
    _has_body: bool
    _content_type: str
    _compress: bool

    def render_records(self, changes: Sequence[ChangeRecord]) -> Sequence[bytes | None]:
        """Return what `render_record` returns of each; raises RecordUnrenderable if one of them cannot be."""
        if self.render_record is _payload:
            return payloads(changes)
        return list(map(self.render_record, changes))

    def request(self, changes: Sequence[ChangeRecord], fragments: Sequence[bytes]) -> HttpRequest:
        """Return the request for *changes*, of which `render_record` gave *fragments*. The same in, the same out."""
        same = self._path.same
        path = (self._path.render(changes[0]) if same is None else same).decode("ascii")
        if not self._has_body:
            return HttpRequest(method=self._method, path=path)
        body = b"".join((self._prefix, joined(fragments, self._separator), self._suffix))
        if self._compress:
            # No time in the header, or a repeat would not be the same bytes.
            body = gzip.compress(body, compresslevel=6, mtime=0)
        return HttpRequest(
            method=self._method,
            path=path,
            body=body,
            content_type=self._content_type,
            compressed=self._compress,
        )

    def identities(self, changes: Sequence[ChangeRecord]) -> Sequence[str]:
        """Return what the items of an answer call *changes* by: their keys."""
        return keys(changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One stream's way to one target."""

    stream: str
    mode: Mode
    operations: Mapping[OperationKind, RouteOperation]
    on_dead: OnDead = "continue"

    @property
    def updates(self) -> bool:
        """Whether a record that the target has can be changed there."""
        return "upsert" in self.operations or "update" in self.operations

    def operation_for(self, first: Operation, last: Operation) -> RouteOperation | None:
        """Return what is owed for a key whose changes began with *first* and ended with *last*; None if nothing is.

        *last* says whether the target shall have the record. *first* says whether it had it before: not before an
        insert; before an update or a delete; before a snapshot nobody knows, and `on_conflict` sorts it out.
        """
        if last == "delete":
            return self.operations.get("delete")
        upsert = self.operations.get("upsert")
        if upsert is not None:
            return upsert
        if first in ("insert", "snapshot"):
            return self.operations.get("insert")
        update = self.operations.get("update")
        if update is not None or first == last == "update":
            return update
        # Updates are not wanted, but the record was made anew in between: one by one, that would be an insert.
        return self.operations.get("insert")


def compile_routes(config: TargetConfig, transforms: Mapping[str, Transform] | None = None) -> dict[str, Route]:
    """Compile a target's routes, by stream. *transforms* has those that the routes name, by their names there."""
    return {
        stream: Route(
            stream=stream,
            mode=route.mode,
            on_dead=route.on_dead,
            operations={
                kind: _compile_operation(
                    kind,
                    operation,
                    route=route,
                    stream=stream,
                    content_type=config.content_type(),
                    transforms=transforms or {},
                )
                for kind, operation in route.operations()
            },
        )
        for stream, route in config.routes.items()
    }


def _compile_operation(
    kind: OperationKind,
    operation: OperationConfig,
    *,
    route: RouteConfig,
    stream: str,
    content_type: str | None,
    transforms: Mapping[str, Transform],
) -> RouteOperation:
    source = route.source_of(kind, operation)
    method = route.method_of(kind, operation)
    path = compile_path(operation.path)
    around = _around(operation, stream)
    content_type = content_type or _CONTENT_TYPES[operation.format]
    transform = transforms[source.value] if source.kind == "transform" else None
    render = _render_record(source, operation.format, transform)
    path_names_record = bool(path.columns or path.own_fields - {"_stream"})
    if path_names_record:
        render = _with_path_checked(render, path)
    return RouteOperation(
        kind=kind,
        batched=operation.batch is not None,
        max_records=1 if operation.batch is None else operation.batch.max_records,
        max_bytes=sys.maxsize if operation.batch is None else operation.batch.max_bytes,
        overhead_bytes=len(around.prefix) + len(around.suffix),
        fingerprint=_fingerprint(method, operation, source, content_type, transform),
        results=None if operation.results is None else _results_rules(operation.results),
        on_conflict=operation.on_conflict,
        on_missing=operation.on_missing,
        path_names_record=path_names_record,
        render_record=render,
        _method=method,
        _path=path,
        _prefix=around.prefix,
        _separator=b"," if operation.format == "json" else b"\n",
        _suffix=around.suffix,
        _has_body=source.kind != "nothing",
        _content_type=content_type,
        _compress=operation.compress == "gzip",
    )


def _around(operation: OperationConfig, stream: str) -> BatchTemplate:
    """Return what stands around the records of a body."""
    if operation.format in ("ndjson", "lines"):
        return BatchTemplate(prefix=b"", suffix=b"\n", lists="records")
    if operation.batch is None:
        return BatchTemplate(prefix=b"", suffix=b"", lists="records")
    body = "$records" if operation.batch.body is None else operation.batch.body
    return compile_batch(body, stream=stream)


def _results_rules(config: ResultsConfig) -> ResultsRules:
    at = config.items or config.errors
    assert at is not None  # the configuration asks for one of the two
    return ResultsRules(
        lists_all=config.items is not None,
        at=at,
        id=config.id,
        index=config.index,
        status=config.status,
        message=config.message,
        retryable=config.retryable,
    )


def _fingerprint(
    method: str, operation: OperationConfig, source: RecordSource, content_type: str, transform: Transform | None
) -> str:
    """Name everything that the bytes of a request follow from; keys keep their order, for they are sent in it."""
    mapping = [
        RENDERING_VERSION,
        method,
        operation.path,
        source.kind,
        source.value,
        None if transform is None else transform.version,
        None if operation.batch is None else {"body": operation.batch.body},
        operation.format,
        operation.compress,
        content_type,
    ]
    return hashlib.sha256(json.dumps(mapping).encode()).hexdigest()[:16]


# Rendering one record ------------------------------------------------------------------------------------------------


def _render_record(source: RecordSource, record_format: Format, transform: Transform | None) -> RenderRecord:
    render: RenderRecord
    match source.kind:
        case "nothing":
            return _nothing
        case "key":
            render = _key
        case "transform":
            assert transform is not None
            render = _transformed(transform, record_format)
        case "template":
            render = compile_record(source.value, record_format).render
        case "row":
            render = compile_form(None).render if record_format == "form" else _payload
    return _on_one_line(render) if record_format == "ndjson" else render


def _nothing(_: ChangeRecord) -> bytes:
    return b""


def _payload(change: ChangeRecord) -> bytes:
    return change.payload


def _key(change: ChangeRecord) -> bytes:
    return msgspec.json.encode(change.key)


def _on_one_line(render: RenderRecord) -> RenderRecord:
    """Take line breaks out of JSON text, where they can only be blanks between values. jsonb's own text has none."""

    def render_line(change: ChangeRecord) -> bytes | None:
        text = render(change)
        if text is None or (b"\n" not in text and b"\r" not in text):
            return text
        return text.replace(b"\n", b" ").replace(b"\r", b" ")

    return render_line


def _with_path_checked(render: RenderRecord, path: Template) -> RenderRecord:
    """Refuse a record whose path cannot be rendered while it is still alone, not when its request is built."""

    def render_checked(change: ChangeRecord) -> bytes | None:
        fragment = render(change)
        if fragment is not None:
            path.render(change)
        return fragment

    return render_checked


# Transforms ----------------------------------------------------------------------------------------------------------

_decode_row = msgspec.json.Decoder(float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


def _transformed(transform: Transform, record_format: Format) -> RenderRecord:
    def render(change: ChangeRecord) -> bytes | None:
        try:
            row = _decode_row(change.payload)
        except msgspec.DecodeError as error:
            raise RecordUnrenderable(f"the change's payload cannot be read: {error}") from None
        except RecursionError:
            raise RecordUnrenderable(TOO_DEEP) from None
        asked = {
            "change_id": original_id(change),
            "stream": change.stream,
            "key": change.key,
            "operation": change.operation,
            "changed_at": changed_at_text(change),
            "row": row,
        }
        try:
            answer = transform.function(asked)
        except Exception as error:
            problem = f"the transform {transform.name} failed: {type(error).__name__}: {str(error)[:200]}"
            raise RecordUnrenderable(problem) from error
        if answer is None:
            return None
        try:
            return _written(answer, record_format, transform.name)
        except (UnicodeError, RecursionError) as error:
            raise RecordUnrenderable(f"the transform {transform.name} returned what is not JSON: {error}") from None

    return render


def _written(answer: Any, record_format: Format, name: str) -> bytes:
    _check_json(answer, name)
    if record_format == "lines":
        return whole_line(_text(answer, name).encode())
    if record_format == "form":
        return form_of(_fields(answer, name))
    return _encode(answer)


def _check_json(value: Any, name: str) -> None:
    match value:
        case None | bool() | str() | int():
            return
        case float() | Decimal():
            if not math.isfinite(value):
                raise RecordUnrenderable(f"the transform {name} returned {value}, which JSON does not have")
        case list() | tuple():
            for item in value:
                _check_json(item, name)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise RecordUnrenderable(f"the transform {name} returned a mapping with the key {key!r}; use text")
                _check_json(item, name)
        case _:
            raise RecordUnrenderable(f"the transform {name} returned a {type(value).__name__}, which is not JSON")


def _text(answer: Any, name: str) -> str:
    if not isinstance(answer, str):
        raise RecordUnrenderable(f"the transform {name} returned a {type(answer).__name__}; a line is text")
    return answer


def _fields(answer: Any, name: str) -> list[tuple[str, str]]:
    if not isinstance(answer, dict) or any(isinstance(value, list | tuple | dict) for value in answer.values()):
        raise RecordUnrenderable(f"the transform {name} returned no flat mapping; a form is one")
    return [(key, _form_text(value)) for key, value in answer.items()]


def _form_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _encode(value).decode()
