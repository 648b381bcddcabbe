"""`read` and `reconcile` of a route: how a target's records are read back, compared, and put right."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from pipelines.delivery.sections import ItemPath, JsonPath, RootPath, Section, refusal
from pipelines.delivery.template import Place, TemplateError, compile_json, compile_path, literal_key

# Paging --------------------------------------------------------------------------------------------------------------

_PARAMETER = re.compile(r"[A-Za-z0-9_.\-~\[\]$]+")
_HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
Parameter = Annotated[str, Field(min_length=1)]


class _Paging(Section):
    """What every style has: how many records a page may hold, if the target is to be told."""

    size: Annotated[int, Field(ge=1)] | None = None
    size_parameter: Parameter | None = None
    """The query parameter that carries `size`."""

    @field_validator("size_parameter", "parameter", check_fields=False)
    @classmethod
    def _can_stand_in_a_query(cls, name: str | None) -> str | None:
        if name is not None and not _PARAMETER.fullmatch(name):
            raise refusal(f"'{name}' is not a query parameter's name")
        return name

    @model_validator(mode="after")
    def _size_is_told(self) -> Self:
        if (self.size is None) != (self.size_parameter is None):
            missing = "size" if self.size is None else "size_parameter"
            raise refusal(f"'size' is sent as 'size_parameter'; add '{missing}', or remove the other", at=())
        return self


class CursorPaging(_Paging):
    """Each answer says in its body what to give as `parameter` to have the next page."""

    style: Literal["cursor"]
    parameter: Parameter
    next: RootPath
    """Where the answer has it. Null, empty or not there: that was the last page."""


class OffsetPaging(_Paging):
    """`parameter` is how many records to pass over. The first page without records is the end."""

    style: Literal["offset"]
    parameter: Parameter


class NumberedPaging(_Paging):
    """`parameter` is the page's number. The first page without records is the end."""

    style: Literal["page"]
    parameter: Parameter
    first: Annotated[int, Field(ge=0)] = 1


class LinkPaging(_Paging):
    """A header has the next page's URL: `Link` with rel="next" (RFC 8288), or another that is the URL itself."""

    style: Literal["link"]
    header: str = "Link"

    @field_validator("header")
    @classmethod
    def _is_a_header(cls, name: str) -> str:
        if not _HEADER.fullmatch(name):
            raise refusal(f"'{name}' is not a header's name; letters, digits and dashes are")
        return name


class NextUrlPaging(_Paging):
    """Each answer has the next page's URL in its body."""

    style: Literal["next_url"]
    next: RootPath


_STYLES = ("cursor", "offset", "page", "link", "next_url")


def _check_paging(value: Any) -> Any:
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise refusal("is a mapping with a 'style', such as {style: cursor, parameter: after, next: $.next}")
    style, known = value.get("style"), ", ".join(_STYLES)
    if style is None:
        raise refusal(f"is missing; it is one of {known}", at=("style",))
    if style not in _STYLES:
        raise refusal(f"'{style}' is not known; it is one of {known}", at=("style",))
    return value


def _paging_tag(value: Any) -> str:
    return f"<{value['style'] if isinstance(value, dict) else value.style}>"


Paging = Annotated[
    Annotated[CursorPaging, Tag("<cursor>")]
    | Annotated[OffsetPaging, Tag("<offset>")]
    | Annotated[NumberedPaging, Tag("<page>")]
    | Annotated[LinkPaging, Tag("<link>")]
    | Annotated[NextUrlPaging, Tag("<next_url>")],
    Discriminator(_paging_tag),
]

# Reading -------------------------------------------------------------------------------------------------------------

Rule = Literal["ignore", "number", "float", "text", "time", "boolean", "case", "trim", "empty"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Rules = Annotated[tuple[Rule, ...], BeforeValidator(_as_list), Field(strict=False, min_length=1)]
Keys = Annotated[tuple[ItemPath, ...], BeforeValidator(_as_list), Field(strict=False, min_length=1)]


class ReadConfig(Section):
    """How the target's records of a stream are listed, and what in them is compared."""

    path: str
    """Of the list; it may have a query."""
    items: RootPath = JsonPath.parse("$")
    """Where an answer has its list of records."""
    key: Keys
    """Where a record has the source's key; of a key of several columns, one path for each, in the order of `key`."""
    page: Annotated[Paging, BeforeValidator(_check_paging)] | None = None
    """Default: one answer has them all."""
    item: ItemPath = JsonPath.parse("$")
    """Where within a listed record the compared fields lie."""
    compare: RootPath = JsonPath.parse("$")
    """Where within what is sent of a record the compared fields lie."""
    record: Any = None
    """What the target should show, as a template, where that is not what is sent."""
    fields: dict[str, Rules] = {}
    """How loosely a field is compared, by its path: `properties.email: case`."""
    one: str | None = None
    """The path of one record: what the list lacks is asked for there before it is called missing."""
    total: RootPath | None = None
    """Where an answer says how many records there are in all."""
    total_header: str | None = None
    """Or the header that says so."""
    lag_seconds: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """For so long after it was accepted, a change may not show in the list yet."""
    max_response_bytes: Annotated[int, Field(ge=1)] = 16_000_000

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        try:
            path = compile_path(self.path)
        except TemplateError as error:
            raise refusal(error.problem, at=("path",)) from None
        if path.columns or path.own_fields:
            raise refusal("the list is one for all records, so its path names no column", at=("path",))
        if self.one is not None:
            self._check_one(self.one)
        if self.total is not None and self.total_header is not None:
            raise refusal("the total is in the body or in a header; remove one", at=("total_header",))
        if self.total_header is not None and not _HEADER.fullmatch(self.total_header):
            raise refusal(f"'{self.total_header}' is not a header's name", at=("total_header",))
        if self.record is not None and "compare" in self.model_fields_set:
            raise refusal("'record' says what is compared, not a part of what is sent; remove one", at=("compare",))
        if self.page is not None:
            self._check_query(self.page)
        return self

    def _check_one(self, one: str) -> None:
        try:
            path = compile_path(one)
        except TemplateError as error:
            raise refusal(error.problem, at=("one",)) from None
        if not path.columns and "_key" not in path.own_fields:
            raise refusal("it is the path of one record, so it names a column or $_key", at=("one",))
        unknown = path.own_fields - {"_key", "_stream"}
        if unknown:
            raise refusal(f"'${min(unknown)}' tells of a change, and a record is asked for; remove it", at=("one",))

    def _check_query(self, page: Any) -> None:
        written = {part.partition("=")[0] for part in self.path.partition("?")[2].split("&")}
        for field in ("parameter", "size_parameter"):
            name = getattr(page, field, None)
            if name is not None and name in written:
                raise refusal(f"'{name}' is in the path already; remove it there", at=("page", field))


# Repair --------------------------------------------------------------------------------------------------------------

Fraction = Annotated[float, Field(ge=0, le=1)]
Repair = Literal["off", "missing", "stale", "all"]


class ReconcileConfig(Section):
    """When the target is compared with the source, and what is put right by itself."""

    cron: str | None = None
    """In UTC. Default: only when it is launched."""
    repair: Repair = "off"
    """Which records are sent again: those `missing`, those `stale`, or `all` of both."""
    delete_extra: bool = False
    """With `repair: all`, also delete at the target what the source has not got."""
    max_repair_fraction: Fraction = 0.05
    """If more than this part of the records would be repaired, none is (one always may)."""
    min_listed_fraction: Fraction = 0.8
    """If the list has less than this part of what it should have, it is not believed, unless its total confirms it."""
    resume_within_seconds: Annotated[float, Field(ge=0, le=86_400)] = 3600.0
    """A listing that was interrupted no longer ago goes on at its last page."""
    show_values: bool = False
    """Show the values of some fields that differ in the UI, and not only their names."""

    @field_validator("cron")
    @classmethod
    def _is_a_cron(cls, cron: str | None) -> str | None:
        problem = None if cron is None else cron_problem(cron)
        if problem is not None:
            raise refusal(problem)
        return cron

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.delete_extra and self.repair != "all":
            raise refusal(f"goes with 'repair: all', not with '{self.repair}'", at=("delete_extra",))
        return self


_CRON_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_CRON_NAMES: Mapping[str, Mapping[str, int]] = {
    "month": {name: n for n, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)},  # noqa: SIM905
    "day of week": {name: n for n, name in enumerate("sun mon tue wed thu fri sat".split())},  # noqa: SIM905
}
_CRON_WORDS = frozenset({"@hourly", "@daily", "@weekly", "@monthly", "@yearly"})
_CRON_PART = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?")


def cron_problem(cron: str) -> str | None:
    """Return what is wrong with a cron expression of five fields, or None."""
    if cron in _CRON_WORDS:
        return None
    written = cron.split()
    if len(written) != len(_CRON_FIELDS):
        return f"'{cron}' is no cron: it has five fields, such as '0 * * * *' for every hour on the hour"
    for text, (name, lowest, highest) in zip(written, _CRON_FIELDS, strict=True):
        for part in text.split(","):
            found = _CRON_PART.fullmatch(part)
            ends = [_cron_number(end, name) for end in found.groups()[:2] if end is not None] if found else []
            step = found[3] if found else None
            fits = found is not None and all(end is not None and lowest <= end <= highest for end in ends)
            fits = fits and (step is None or 1 <= int(step) <= highest)
            if not fits or (len(ends) == 2 and (ends[0] or 0) > (ends[1] or 0)):
                return f"'{part}' is no {name} of a cron: write {lowest} to {highest}, a list, a range, or '*/n'"
    return None


def _cron_number(text: str, name: str) -> int | None:
    return int(text) if text.isdecimal() else _CRON_NAMES.get(name, {}).get(text.lower())


# What is compared ----------------------------------------------------------------------------------------------------

Path = tuple[str, ...]
_VOLATILE = re.compile(r"\$\{?_(?:change_id|changed_at|operation)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Which fields a record has that can be compared."""

    fields: tuple[Path, ...] | None
    """Those of a template; None: whatever a record turns out to have."""
    deep: bool = False
    """Of a record whose fields are not known before: mappings in it are structure, not values."""
    volatile: tuple[Path, ...] = ()
    """Fields that tell of the change and not of the row: what they were when it was sent is not known any more."""


ROW = Shape(fields=None)
TRANSFORMED = Shape(fields=None, deep=True)


def shape_of(template: Any, at: JsonPath, *, place: Place) -> Shape:
    """Return the shape of what a template puts at *at*; raises TemplateError."""
    part = template
    for step in at.steps:
        if isinstance(part, dict) and isinstance(step, str):
            part = next((value for key, value in part.items() if literal_key(key, place) == step), None)
        elif isinstance(part, list) and isinstance(step, int) and step < len(part):
            part = part[step]
        else:
            part = None
        if part is None:
            raise TemplateError(f"what is sent of a record has nothing at {at.text}", place=place)
    if isinstance(part, str) and part.startswith("$"):
        return ROW  # a mapping whose fields the template does not name
    if not isinstance(part, dict):
        raise TemplateError(f"what is sent at {at.text} is not a mapping of fields", place=place)
    leaves = dict(_leaves(part, (), place))
    return Shape(
        fields=tuple(leaves),
        volatile=tuple(path for path, value in leaves.items() if _VOLATILE.search(compile_text(value))),
    )


def compile_text(value: Any) -> str:
    """Return the texts in a template's value, to be searched."""
    if isinstance(value, list):
        return " ".join(compile_text(one) for one in value)
    if isinstance(value, dict):
        return " ".join(compile_text(one) for one in value.values())
    return value if isinstance(value, str) else ""


def _leaves(template: Mapping[Any, Any], path: Path, place: Place) -> Iterator[tuple[Path, Any]]:
    for key, value in template.items():
        here = (*path, literal_key(key, place))
        if isinstance(value, dict) and value:
            yield from _leaves(value, here, place)
        else:
            yield here, value


def check_fields(shape: Shape, fields: Mapping[str, Rules]) -> None:
    """Refuse rules for fields that *shape* has not got."""
    if shape.fields is None:
        return
    known = {".".join(path[:length]) for path in shape.fields for length in range(1, len(path) + 1)}
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "known are " + ", ".join(sorted(known))
            raise refusal(f"is no field of what is compared; {fix}", at=("read", "fields", name))


def check_record(read: ReadConfig) -> None:
    """Refuse a `read.record` that is no template of a mapping."""
    try:
        compile_json(read.record, place=("read", "record"))
        shape_of(read.record, JsonPath.parse("$"), place=("read", "record"))
    except TemplateError as error:
        raise refusal(error.problem, at=error.place) from None
