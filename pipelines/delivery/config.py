"""What a person may write in `targets/<name>.yaml`, and what each wrong word is answered with.

Every option here is honoured; one that is not built yet is refused, never ignored.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from pipelines.delivery.outcome import OperationKind
from pipelines.delivery.reading import (
    ROW,
    TRANSFORMED,
    ReadConfig,
    ReconcileConfig,
    Shape,
    check_fields,
    check_record,
    shape_of,
)
from pipelines.delivery.sections import LONGEST_SECONDS, ItemPath, RootPath, Seconds, Section, Statuses, refusal
from pipelines.delivery.template import (
    Place,
    Template,
    TemplateError,
    compile_batch,
    compile_form,
    compile_json,
    compile_line,
    compile_path,
)

Format = Literal["json", "ndjson", "form", "lines"]
Mode = Literal["state", "event"]
OnDead = Literal["continue", "block", "supersede"]

OPERATION_KINDS: tuple[OperationKind, ...] = ("upsert", "insert", "update", "delete")
DEFAULT_METHODS: dict[OperationKind, str] = {"upsert": "POST", "insert": "POST", "update": "PATCH", "delete": "DELETE"}


# Secrets and authentication ------------------------------------------------------------------------------------------


def _check_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        # What stands here may be the secret itself, so it is not repeated.
        raise refusal("is not the name of an environment variable: letters, digits and _ only")
    return name


class Secret(Section):
    """The name of the environment variable that holds a secret: `{env: CRM_TOKEN}`."""

    env: Annotated[str, AfterValidator(_check_variable)]

    @model_validator(mode="before")
    @classmethod
    def _is_never_written_here(cls, value: Any) -> Any:
        if isinstance(value, str | int | float):
            raise refusal(
                "a secret is never written into the file; put it into an environment variable and write {env: ITS_NAME}"
            )
        return value


def _secret_or_text(value: Any) -> str:
    return "<secret>" if isinstance(value, dict | Secret) else "<text>"


PlainOrSecret = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Secret, Tag("<secret>")], Discriminator(_secret_or_text)
]


class NoAuth(Section):
    """Requests carry no credentials."""

    type: Literal["none"] = "none"


class BearerAuth(Section):
    """`Authorization: Bearer <token>`."""

    type: Literal["bearer"]
    token: Secret


class BasicAuth(Section):
    """`Authorization: Basic <username:password>`; the user's name may stand in the file."""

    type: Literal["basic"]
    username: PlainOrSecret
    password: Secret


class ApiKeyAuth(Section):
    """A key in a header or in a query parameter, by the name that the target expects."""

    type: Literal["api_key"]
    key: Secret
    header: str | None = None
    query: str | None = None

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if (self.header is None) == (self.query is None):
            raise refusal("give the name of either a 'header' or a 'query' parameter for the key")
        if self.header is not None:
            _check_header_name(self.header, at=("header",))
        return self


def _check_token_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        credentials, host, _ = "@" in parts.netloc, parts.hostname, parts.port
    except ValueError as error:
        raise refusal(f"is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise refusal("is not a URL of the form https://host/path")
    if credentials:
        raise refusal("holds a user's name or password; take them out and write them as 'client_id', 'client_secret'")
    if "#" in url:
        raise refusal("has a fragment, which is never sent; remove it")
    if not url.isascii() or re.search(r"[\s\x00-\x20\x7f\\]", url):
        raise refusal("holds characters that a URL cannot; percent-encode them")
    return url


class OAuth2ClientCredentialsAuth(Section):
    """`Authorization: Bearer <token>` with tokens from `token_url`, renewed ahead of their end and when refused."""

    type: Literal["oauth2_client_credentials"]
    token_url: Annotated[str, AfterValidator(_check_token_url)]
    client_id: PlainOrSecret
    client_secret: Secret
    scope: Annotated[str, Field(min_length=1)] | None = None
    """Several are separated by spaces."""
    audience: Annotated[str, Field(min_length=1)] | None = None
    client_authentication: Literal["basic", "body"] = "basic"
    """Whether `client_id` and `client_secret` go to the token endpoint in a header or in the form (RFC 6749 §2.3.1)."""


_AUTH_TYPES = ("none", "bearer", "basic", "api_key", "oauth2_client_credentials")
_AUTH_NOT_BUILT = ("hmac", "standard_webhooks", "mtls")


def _check_auth(value: Any) -> Any:
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise refusal("is a mapping with a 'type', such as {type: bearer, token: {env: CRM_TOKEN}}")
    kind = value.get("type")
    known = ", ".join(_AUTH_TYPES)
    if kind is None:
        raise refusal(f"is missing; it is one of {known}", at=("type",))
    if kind in _AUTH_NOT_BUILT:
        raise refusal(f"'{kind}' is not built yet; use one of {known}", at=("type",))
    if kind not in _AUTH_TYPES:
        raise refusal(f"'{kind}' is not known; it is one of {known}", at=("type",))
    return value


def _auth_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else value.type
    return f"<{kind}>"


Auth = Annotated[
    Annotated[NoAuth, Tag("<none>")]
    | Annotated[BearerAuth, Tag("<bearer>")]
    | Annotated[BasicAuth, Tag("<basic>")]
    | Annotated[ApiKeyAuth, Tag("<api_key>")]
    | Annotated[OAuth2ClientCredentialsAuth, Tag("<oauth2_client_credentials>")],
    Discriminator(_auth_tag),
]

_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.1
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?|")
_HEADERS_OF_OURS = {
    "idempotency-key": "every request carries its own, the same on every attempt",
    "content-length": "it follows from the body",
    "transfer-encoding": "it follows from the body",
    "content-encoding": "write 'compress: gzip' at the operation",
    "host": "it follows from base_url",
    "connection": "the client keeps its connections itself",
}


def _check_header_name(name: str, *, at: Place) -> None:
    if not _HEADER_NAME.fullmatch(name):
        raise refusal(f"'{name}' is not a header's name; letters, digits and dashes are", at=at)
    reason = _HEADERS_OF_OURS.get(name.lower())
    if reason is not None:
        raise refusal(f"the header {name} cannot be set here: {reason}", at=at)


# How a target is treated ---------------------------------------------------------------------------------------------


class RateLimit(Section):
    """At most so many requests, over all lanes."""

    requests_per_second: Annotated[float, Field(ge=0.0001)]
    burst: Annotated[int, Field(ge=1)] = 1


class Retry(Section):
    """How long a target's faults are borne within one run, in seconds."""

    initial_backoff: Seconds = 0.5
    max_backoff: Seconds = 30.0
    max_elapsed: Annotated[float, Field(ge=0)] = 60.0
    max_retry_after: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)] = 3600.0
    """The longest `Retry-After` that is believed."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.initial_backoff > self.max_backoff:
            raise refusal(
                f"initial_backoff ({self.initial_backoff:g}) is more than max_backoff ({self.max_backoff:g}); "
                "lower the first or raise the second"
            )
        if 0 < self.max_elapsed < self.initial_backoff:
            raise refusal(
                f"max_elapsed ({self.max_elapsed:g}) may end before the first wait (up to {self.initial_backoff:g}); "
                "raise it, or write 0 for no second attempt within a run"
            )
        return self


class CircuitBreaker(Section):
    """After so many faults in a row nothing is sent for `error_timeout` seconds, then one request as a probe."""

    failure_threshold: Annotated[int, Field(ge=1)] = 5
    error_timeout: Seconds = 30.0


# Reading a batch's answer --------------------------------------------------------------------------------------------


class ResultsConfig(Section):
    """How the answer to a batch speaks of its records."""

    items: RootPath | None = None
    """A list with one item for every record, each judged by its `status`."""
    errors: RootPath | None = None
    """A list of those refused; a record that is not in it was accepted."""
    id: ItemPath | None = None
    """Where an item holds the record's key."""
    index: ItemPath | None = None
    """Where an item holds the record's position in the request. With neither, `items` come in the request's order."""
    status: ItemPath | None = None
    """Where an item holds its HTTP status, or true or false."""
    retryable: Statuses = ()
    """Statuses of an item to send again. Default: those that are sent again as the status of a whole answer."""
    message: ItemPath | None = None

    @model_validator(mode="after")
    def _says_enough(self) -> Self:
        if (self.items is None) == (self.errors is None):
            raise refusal("give either 'items' (every record) or 'errors' (only those refused)")
        if self.id is not None and self.index is not None:
            raise refusal("a record is found by 'id' or by 'index', not by both; remove one")
        if self.items is not None and self.status is None:
            raise refusal("'items' lists every record, so 'status' must say which were accepted; add it")
        if self.errors is not None and self.id is None and self.index is None:
            raise refusal("'errors' lists some records only; say by 'id' or 'index' which they are")
        if self.retryable and self.status is None:
            raise refusal("'retryable' names statuses, so 'status' must say where they stand; add it")
        return self


# Routes --------------------------------------------------------------------------------------------------------------


class BatchConfig(Section):
    """Many records in one request."""

    max_records: Annotated[int, Field(ge=1)]
    max_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    """Of the body before compression. A record that is larger travels alone."""
    body: Any = None
    """What the records are wrapped in, with `$records` or `$keys` where the list goes. Default: the bare list."""


class OperationConfig(Section):
    """How one kind of change becomes a request."""

    method: Literal["POST", "PUT", "PATCH", "DELETE"] | None = None
    """Default: POST for upsert and insert, PATCH for update, DELETE for delete."""
    path: str
    record: Any = None
    """In place of the route's `record`; null is the row as it is."""
    batch: BatchConfig | None = None
    results: ResultsConfig | None = None
    format: Format = "json"
    compress: Literal["gzip"] | None = None
    on_conflict: Literal["update"] | None = None
    """Of an insert: what to do when the record is there already."""
    on_missing: Literal["insert"] | None = None
    """Of an update: what to do when the record is not there."""


@dataclass(frozen=True, slots=True)
class RecordSource:
    """What a request says of one record: nothing, its key, the row as it is, a template, or what a function returns."""

    kind: Literal["nothing", "key", "row", "template", "transform"]
    value: Any = None
    """The template, or the transform's name."""
    place: Place = ()
    """Where in the route it is written."""


_TRANSFORM = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


class RouteConfig(Section):
    """How one stream's changes become requests.

    A change whose operation is not given is filtered: a route without `delete` leaves deleted records at the target,
    one with `insert` and no `update` sends each record once. `upsert` serves every change but a delete, in mode `event`
    too.
    """

    mode: Mode = "state"
    """`state`: a record's latest state, earlier ones are superseded. `event`: every change, in order."""
    record: Any = None
    """The JSON of one record; null is the row as it is."""
    transform: str | None = None
    """`package.module:function`, in place of `record`: takes the change, returns JSON, or None to filter it.

    It is asked only where a request carries records: not for a DELETE without a body, nor for `$keys`.
    """
    upsert: OperationConfig | None = None
    insert: OperationConfig | None = None
    update: OperationConfig | None = None
    delete: OperationConfig | None = None
    on_dead: OnDead = "continue"
    """What a dead letter means for its key. `continue`: nothing. `block`: later changes become dead letters behind it,
    for as long as it is open. `supersede`: a newer accepted state closes it."""
    read: ReadConfig | None = None
    """How the target's records are listed, to be compared with the source's."""
    reconcile: ReconcileConfig | None = None
    """When they are compared, and what is repaired."""

    @model_validator(mode="before")
    @classmethod
    def _is_not_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in (*OPERATION_KINDS, "read"):
            if key in value and value[key] is None:
                raise refusal("is empty; give it at least a 'path', or remove it", at=(key,))
        if "reconcile" in value and value["reconcile"] is None:
            raise refusal("is empty; give it a 'cron', or remove it", at=("reconcile",))
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self._check_operations()
        self._check_records()
        for kind, operation in self.operations():
            try:
                self._check_operation(kind, operation)
            except TemplateError as error:
                raise refusal(error.problem, at=error.place) from None
        self._check_reading()
        return self

    def operations(self) -> Iterator[tuple[OperationKind, OperationConfig]]:
        """Yield the operations that are given."""
        for kind in OPERATION_KINDS:
            operation: OperationConfig | None = getattr(self, kind)
            if operation is not None:
                yield kind, operation

    def method_of(self, kind: OperationKind, operation: OperationConfig) -> str:
        """Return the HTTP method of an operation."""
        return operation.method or DEFAULT_METHODS[kind]

    def source_of(self, kind: OperationKind, operation: OperationConfig) -> RecordSource:
        """Say what the operation's requests hold of each record."""
        if operation.batch is not None and operation.batch.body is not None:
            body = compile_batch(operation.batch.body, stream="", place=(kind, "batch", "body"))
            if body.lists == "keys":
                return RecordSource("key", place=(kind, "batch", "body"))
        if "record" in operation.model_fields_set:
            place: Place = (kind, "record")
            return RecordSource("row" if operation.record is None else "template", operation.record, place)
        if operation.batch is None and self.method_of(kind, operation) == "DELETE":
            return RecordSource("nothing")
        if self.transform is not None:
            return RecordSource("transform", self.transform, ("transform",))
        return RecordSource("row" if self.record is None else "template", self.record, ("record",))

    def columns(self) -> frozenset[str]:
        """Return the source columns that the route's templates name."""
        found: set[str] = set()
        for kind, operation in self.operations():
            found |= compile_path(operation.path).columns
            source = self.source_of(kind, operation)
            if source.kind == "template":
                found |= compile_record(source.value, operation.format).columns
        if self.read is not None and self.read.record is not None:
            found |= compile_json(self.read.record).columns
        if self.read is not None and self.read.one is not None:
            found |= compile_path(self.read.one).columns
        if self.read is not None and self.shape() is ROW:
            found |= set(self.read.fields)
        return frozenset(found)

    def delete_columns(self) -> frozenset[str]:
        """Return the source columns that the route's `delete` names."""
        if self.delete is None:
            return frozenset()
        source = self.source_of("delete", self.delete)
        record = compile_record(source.value, self.delete.format).columns if source.kind == "template" else frozenset()
        return compile_path(self.delete.path).columns | record

    def compared(self) -> tuple[OperationKind, OperationConfig] | None:
        """Return the operation whose record the target should hold: the upsert, or the update, or the insert."""
        given: dict[OperationKind, OperationConfig] = dict(self.operations())
        return next(((kind, given[kind]) for kind in ("upsert", "update", "insert") if kind in given), None)

    def shape(self) -> Shape:
        """Return which fields can be compared; raises TemplateError if what is sent has none."""
        compared = self.compared()
        assert self.read is not None
        assert compared is not None
        if self.read.record is not None:
            return shape_of(self.read.record, self.read.compare, place=("read", "record"))
        source = self.source_of(*compared)
        if source.kind == "transform":
            return TRANSFORMED
        if source.kind == "row":
            if self.read.compare.steps:
                raise TemplateError("a row is sent as it is, and has no parts; remove it", place=("read", "compare"))
            return ROW
        return shape_of(source.value, self.read.compare, place=("read", "compare"))

    def _check_operations(self) -> None:
        kinds = [kind for kind, _ in self.operations()]
        if not kinds:
            raise refusal("has no operation; give at least one of upsert, insert, update, delete")
        if self.on_dead == "supersede" and self.mode == "event":
            raise refusal(
                "'supersede' closes a dead letter with a newer state, but in mode 'event' each change is wanted for "
                "itself; use continue or block",
                at=("on_dead",),
            )
        if "upsert" in kinds and ("insert" in kinds or "update" in kinds):
            raise refusal("'upsert' already stands for insert and update; remove it or them")
        for kind, operation in self.operations():
            if operation.on_conflict is not None and kind != "insert":
                raise refusal("belongs to 'insert' alone; remove it", at=(kind, "on_conflict"))
            if operation.on_missing is not None and kind != "update":
                raise refusal("belongs to 'update' alone; remove it", at=(kind, "on_missing"))
        if self.insert is not None and self.insert.on_conflict is not None and self.update is None:
            raise refusal("there is no 'update' to turn to; add one", at=("insert", "on_conflict"))
        if self.update is not None and self.update.on_missing is not None and self.insert is None:
            raise refusal("there is no 'insert' to turn to; add one", at=("update", "on_missing"))

    def _check_reading(self) -> None:
        if self.read is None:
            if self.reconcile is not None:
                raise refusal("needs a 'read' that says how the target's records are listed", at=("reconcile",))
            return
        if self.mode == "event":
            raise refusal(
                "in mode 'event' the target is told what happened, and need not hold anything; remove it, or use mode "
                "'state'",
                at=("read",),
            )
        compared = self.compared()
        if compared is None:
            raise refusal("the route sends no records, so there are none to compare; remove it", at=("read",))
        kind, operation = compared
        if self.read.record is not None:
            check_record(self.read)
        elif self.source_of(kind, operation).kind not in ("row", "template", "transform"):
            raise refusal(f"the {kind} sends nothing of a record but its key; add a 'record'", at=("read",))
        elif operation.format not in ("json", "ndjson"):
            raise refusal(
                f"'{operation.format}' is not JSON, as the target's list is; add a 'record' that says what it shows",
                at=("read",),
            )
        try:
            check_fields(self.shape(), self.read.fields)
        except TemplateError as error:
            raise refusal(error.problem, at=error.place) from None
        if self.reconcile is not None:
            self._check_repair(self.reconcile)

    def _check_repair(self, reconcile: ReconcileConfig) -> None:
        cannot = self.cannot_repair()
        updates = self.upsert is not None or self.update is not None
        wanted = {"off": (), "missing": ("missing",), "stale": ("stale",), "all": ("stale",) if updates else ()}
        for kind in wanted[reconcile.repair]:
            if kind in cannot:
                raise refusal(f"{cannot[kind]}; mend that, or use another 'repair'", at=("reconcile", "repair"))
        if reconcile.delete_extra and "extra" in cannot:
            raise refusal(f"{cannot['extra']}; add one", at=("reconcile", "delete_extra"))

    def cannot_repair(self) -> dict[str, str]:
        """Say why records that are missing, stale or extra could not be put right by what the route sends."""
        reasons: dict[str, str] = {}
        if self.upsert is None and self.insert is None:
            reasons["missing"] = "the route has no upsert or insert to send them with"
        # What is sent again is a row as it is: nobody knows whether the target has the record.
        if self.upsert is None and (self.insert is None or self.insert.on_conflict is None):
            reasons["stale"] = "the route has no upsert, nor an insert with 'on_conflict: update', to send them with"
        if self.delete is None:
            reasons["extra"] = "the route has no 'delete' to do it with"
        return reasons

    def _check_records(self) -> None:
        if self.transform is not None and self.record is not None:
            raise refusal("stands in place of 'record'; remove one of the two", at=("transform",))
        if self.transform is not None and not _TRANSFORM.fullmatch(self.transform):
            raise refusal(f"'{self.transform}' is not of the form package.module:function", at=("transform",))
        sources = [self.source_of(kind, operation) for kind, operation in self._with_sound_batches()]
        for field in ("record", "transform"):
            if getattr(self, field) is not None and not any(source.place == (field,) for source in sources):
                raise refusal("no operation of the route uses it; remove it", at=(field,))

    def _with_sound_batches(self) -> Iterator[tuple[OperationKind, OperationConfig]]:
        for kind, operation in self.operations():
            try:
                self.source_of(kind, operation)
            except TemplateError as error:
                raise refusal(error.problem, at=error.place) from None
            yield kind, operation

    def _check_operation(self, kind: OperationKind, operation: OperationConfig) -> None:
        source = self.source_of(kind, operation)
        path = compile_path(operation.path, place=(kind, "path"))
        if operation.batch is None:
            if operation.results is not None:
                raise refusal("speaks of a batch's records, but there is no 'batch'; remove it", at=(kind, "results"))
        else:
            self._check_batch(kind, operation, source)
            if path.columns or path.own_fields - {"_stream"}:
                problem = f"'{operation.path}' names one record, but a batch is many; remove the field or the 'batch'"
                raise refusal(problem, at=(kind, "path"))
        if source.kind == "nothing":
            if operation.format != "json" or operation.compress is not None:
                at = (kind, "format" if operation.format != "json" else "compress")
                raise refusal("a DELETE without a 'record' of its own has no body; remove it", at=at)
        elif source.kind == "template":
            compile_record(source.value, operation.format, place=source.place)
        elif source.kind == "row" and operation.format == "lines":
            raise refusal("with 'lines' a record is one string; give a 'record' such as '${id}'", at=(kind, "format"))

    def _check_batch(self, kind: OperationKind, operation: OperationConfig, source: RecordSource) -> None:
        assert operation.batch is not None
        if operation.format == "form":
            raise refusal("a form holds one record; remove the 'batch' or choose another format", at=(kind, "format"))
        if operation.batch.body is not None and operation.format != "json":
            problem = f"with '{operation.format}' the records stand alone, line by line; remove 'body'"
            raise refusal(problem, at=(kind, "batch", "body"))
        if source.kind == "key" and "record" in operation.model_fields_set:
            raise refusal("the batch's body holds $keys, so no record is sent; remove it", at=(kind, "record"))


def compile_record(template: Any, record_format: Format, *, place: Place = ()) -> Template:
    """Compile a record's template for its format; raises TemplateError."""
    if record_format == "lines":
        return compile_line(template, place=place)
    if record_format == "form":
        return compile_form(template, place=place)
    return compile_json(template, place=place)


# Targets -------------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LONGEST_RUN = 86_400.0


def _check_name(name: str) -> str:
    if _NAME.fullmatch(name):
        return name
    fixed = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    fixed = fixed if _NAME.fullmatch(fixed) else f"target_{fixed}".rstrip("_")
    raise refusal(
        f"'{name}' cannot name a target: Dagster's mapping keys allow only a-z, 0-9 and _, beginning with a letter; "
        f"write '{fixed}'"
    )


def _check_base_url(url: str) -> str:
    """Return *url* without the slash at its end."""
    try:
        parts = urlsplit(url)
        credentials, host, _ = "@" in parts.netloc, parts.hostname, parts.port
    except ValueError as error:
        raise refusal(f"is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise refusal("is not a URL of the form https://host/path")
    if credentials:
        raise refusal("holds a user's name or password; take them out and write them as 'auth: {type: basic, …}'")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise refusal("has a query or fragment; those belong into an operation's 'path'")
    if not url.isascii() or re.search(r"[\s\x00-\x20\x7f\\]", url):
        raise refusal("holds characters that a URL cannot; percent-encode them")
    if any(segment in (".", "..") for segment in parts.path.split("/")):
        raise refusal("has a segment '.' or '..'; write the path that is meant")
    return url.rstrip("/")


class TargetConfig(Section):
    """One target API: where it is, how it is treated, and what it wants."""

    name: Annotated[str, AfterValidator(_check_name)]
    base_url: Annotated[str, AfterValidator(_check_base_url)]
    status: Literal["active", "paused", "disabled"] = "active"
    critical: bool = True
    """false: the target's failure is a warning, and the run stays green."""
    start: Literal["snapshot", "now", "beginning"] = "beginning"
    """What a new target gets first: every row as it is and then the changes, only the changes from now on, or every
    change in the log."""
    auth: Annotated[Auth, BeforeValidator(_check_auth)] = NoAuth()
    headers: dict[str, PlainOrSecret] = {}
    timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 15.0
    max_in_flight: Annotated[int, Field(ge=1, le=64)] = 4
    rate_limit: RateLimit | None = None
    retry: Retry = Retry()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    dead_letter_guard: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Which part of a run's last records must be refused for the run to stop and the target to pause; 1 is never."""
    probe_interval: Seconds = 300.0
    """Seconds between the real requests that try whether a paused target is well again."""
    max_response_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    success_on: Statuses = ()
    retryable_status_codes: Statuses = ()
    drop_on: Statuses = ()
    """Statuses that make a dead letter at once, whatever they mean elsewhere."""
    routes: Annotated[dict[str, RouteConfig], Field(min_length=1)]

    _origin: str = PrivateAttr(default="")

    @property
    def origin(self) -> str:
        """The file that this was read from, for messages; empty if it was not read from one."""
        return self._origin

    def loaded_from(self, file: str) -> Self:
        """Return a copy that knows its file."""
        copy = self.model_copy()
        copy._origin = file
        return copy

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, headers: dict[str, str | Secret]) -> dict[str, str | Secret]:
        seen: dict[str, str] = {}
        for name, value in headers.items():
            _check_header_name(name, at=(name,))
            twin = seen.setdefault(name.lower(), name)
            if twin != name:
                raise refusal(f"is the same header as '{twin}'; remove one", at=(name,))
            if isinstance(value, str) and not _HEADER_VALUE.fullmatch(value):
                raise refusal("a header's value is printable ASCII without spaces around it", at=(name,))
            if name.lower() == "content-type" and not isinstance(value, str):
                raise refusal("a content type is no secret; write it plainly", at=(name,))
        return headers

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> Self:
        self._check_headers_against_auth()
        if self.longest_request_seconds > _LONGEST_RUN:
            raise refusal(
                f"with timeout_seconds ({self.timeout_seconds:g}) before and after, a request would be tried for up to "
                f"{self.longest_request_seconds:,.0f} s, but a run lasts a day ({_LONGEST_RUN:,.0f} s); lower it",
                at=("retry", "max_elapsed"),
            )
        self._check_statuses(("success_on", "retryable_status_codes", "drop_on"))
        return self

    @property
    def longest_request_seconds(self) -> float:
        """For how long one request is tried in one run: the first attempt, the budget, one more that just fitted in."""
        return self.timeout_seconds + self.retry.max_elapsed + self.timeout_seconds * (self.retry.max_elapsed > 0)

    def content_type(self) -> str | None:
        """Return the content type that `headers` sets in place of the format's own."""
        for name, value in self.headers.items():
            if name.lower() == "content-type" and isinstance(value, str):
                return value
        return None

    def _check_headers_against_auth(self) -> None:
        taken = None
        if isinstance(self.auth, BearerAuth | BasicAuth | OAuth2ClientCredentialsAuth):
            taken = "authorization"
        elif isinstance(self.auth, ApiKeyAuth) and self.auth.header is not None:
            taken = self.auth.header.lower()
        for name in self.headers:
            if name.lower() == taken:
                raise refusal("'auth' sets this header; remove one of the two", at=("headers", name))

    def _check_statuses(self, fields: Sequence[str]) -> None:
        owner: dict[int, str] = {}
        for field in fields:
            for status in getattr(self, field):
                other = owner.setdefault(status, field)
                if other != field:
                    raise refusal(f"{status} is in {other} too; leave it in one of them", at=(field,))
