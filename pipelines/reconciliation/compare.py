"""Find the fields in which what a target holds differs from what it should hold.

Only what is sent is compared: what a target adds is its own. A field that is not there is the same as null. Numbers are
equal if they are the same number, however they are written; everything else is equal only to itself, unless a rule of
the route says how loosely a field is meant.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import msgspec

from pipelines.delivery.reading import Path, Rule, Rules, Shape
from pipelines.delivery.sections import JsonPath

if TYPE_CHECKING:
    import pandas as pd

# Of doubles that were written with fewer digits, or read by a parser that rounds to a neighbour.
_CLOSE = 1e-12
_LONG = 1000

decode: Callable[[bytes | str], Any] = msgspec.json.Decoder(float_hook=Decimal).decode
"""Read JSON, keeping every digit."""
_encode: Callable[[Any], bytes] = msgspec.json.Encoder(decimal_format="number", order="sorted").encode


@dataclass(frozen=True, slots=True)
class _Word:
    """What is equal to nothing but itself; JSON's words are, while Python's True is 1 and its None pandas' NaN."""

    text: str


_NULL, _TRUE, _FALSE = _Word("null"), _Word("true"), _Word("false")


@dataclass(frozen=True, slots=True)
class _Whole:
    """A list or mapping, compared as a whole."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRules:
    """How loosely each field is compared; a rule for a mapping holds for all within."""

    rules: Mapping[str, Rules] = field(default_factory=dict)
    ignored: frozenset[Path] = frozenset()

    @classmethod
    def of(cls, rules: Mapping[str, Rules], shape: Shape) -> "FieldRules":
        """Return the route's rules; fields that tell of the change and not of the row are left out."""
        return cls(rules=rules, ignored=frozenset(shape.volatile))

    def of_field(self, path: Path) -> Rules:
        """Return what holds for the field at *path*."""
        found: list[Rule] = ["ignore"] if path in self.ignored else []
        for length in range(1, len(path) + 1):
            found += self.rules.get(".".join(path[:length]), ())
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One record: what the target should hold and what it does, decoded."""

    key: str
    should: Any
    does: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A record that is at the target, but not as it should be."""

    key: str
    fields: tuple[str, ...]


def number_text(value: int | Decimal) -> str:
    """Return *value* with every digit, and no zero that says nothing: 17 for 17.0."""
    if isinstance(value, int):
        return str(value)
    if not value:
        return "0"
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -_LONG or value.adjusted() > _LONG:
        return str(value)  # written out, 1E+999999999 would fill the memory
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def part_of(document: Any, at: JsonPath) -> Any:
    """Return what lies at *at*, None if there is nothing."""
    try:
        return at.find(document)
    except LookupError:
        return None


def differences(pairs: Sequence[Pair], *, shape: Shape, rules: FieldRules) -> list[Difference]:
    """Compare *pairs* field by field, all at once; return those that differ, in their order."""
    import pandas as pd  # here: every step loads this module, and most have no use for pandas

    if not pairs:
        return []
    paths = list(shape.fields) if shape.fields is not None else _fields_of((pair.should for pair in pairs), shape.deep)
    kept = [(path, kind) for path in paths if "ignore" not in (kind := rules.of_field(path))]
    columns: dict[str, pd.Series[Any]] = {}
    for path, kind in kept:
        does = [_plain(_find(pair.does, path)) for pair in pairs]
        should = [_plain(_find(pair.should, path)) for pair in pairs]
        if shape.fields is None:
            # Another record has this field; one that does not send it leaves it to the target.
            should = [
                value if _sends(pair.should, path, shape.deep) else held
                for pair, value, held in zip(pairs, should, does, strict=True)
            ]
        columns[".".join(path)] = _unequal(should, does, kind)
    if not columns:
        return []
    table = pd.DataFrame(columns)
    found = table[table.any(axis=1)]
    names = list(table.columns)
    return [
        Difference(
            key=pairs[row].key, fields=tuple(name for name, differs in zip(names, cells, strict=True) if differs)
        )
        for row, cells in zip(found.index, found.itertuples(index=False), strict=True)
    ]


def value_at(document: Any, name: str, *, paths: Iterable[Path] | None = None) -> str:
    """Return the value of the field *name* as text, for people; `(none)` if it is not there or null."""
    path = next((one for one in paths or () if ".".join(one) == name), tuple(name.split(".")))
    value = _find(document, path)
    return "(none)" if value is None else value if isinstance(value, str) else _encode(value).decode()


def _fields_of(records: Iterable[Any], deep: bool) -> list[Path]:
    found: dict[Path, None] = {}

    def walk(record: Mapping[str, Any], above: Path) -> None:
        for name, value in record.items():
            if deep and isinstance(value, dict) and value:
                walk(value, (*above, name))
            else:
                found[(*above, name)] = None

    for record in records:
        if isinstance(record, dict):
            walk(record, ())
    return list(found)


def _find(document: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(document, dict):
            return None
        document = document.get(name)
    return document


def _sends(record: Any, path: Path, deep: bool) -> bool:
    for name in path:
        if not isinstance(record, dict) or name not in record:
            return False
        record = record[name]
    return not (deep and isinstance(record, dict) and record)


def _plain(value: Any) -> Any:
    """Return *value* so that it equals what it is the same as, and nothing else."""
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if isinstance(value, list):
        return _Whole(tuple(_plain(one) for one in value))
    if isinstance(value, dict):
        return _Whole(frozenset((name, _plain(one)) for name, one in value.items() if one is not None))
    return value


def _unequal(should: list[Any], does: list[Any], rules: Rules) -> "pd.Series[Any]":
    import pandas as pd

    one, other = pd.Series(should, dtype=object), pd.Series(does, dtype=object)
    unequal = one.ne(other)
    if rules and unequal.any():
        # Only what is not the same already: a rule costs more than a comparison.
        for row in unequal.index[unequal]:
            unequal[row] = not _same(one[row], other[row], rules)
    return unequal


def _same(one: Any, other: Any, rules: Rules) -> bool:
    for rule in rules:
        if rule != "float":
            one, other = _loosely(one, rule), _loosely(other, rule)
    if one == other:
        return True
    if isinstance(one, _Whole) and isinstance(other, _Whole):
        return _same_within(one.value, other.value, rules)
    if "float" in rules:
        left, right = _loosely(one, "number"), _loosely(other, "number")
        if isinstance(left, int | Decimal) and isinstance(right, int | Decimal):
            return _is_close(left, right)
    return False


def _same_within(one: Any, other: Any, rules: Rules) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b, rules) for a, b in zip(one, other, strict=True))
    if isinstance(one, frozenset) and isinstance(other, frozenset):
        left, right = dict(one), dict(other)
        return all(_same(left.get(name, _NULL), right.get(name, _NULL), rules) for name in left.keys() | right.keys())
    return False


def _is_close(one: int | Decimal, other: int | Decimal) -> bool:
    try:
        left, right = float(one), float(other)
    except OverflowError:
        return False  # a whole number that no double can hold; that it is not the same is known already
    return math.isfinite(left) and math.isfinite(right) and math.isclose(left, right, rel_tol=_CLOSE)


def _loosely(value: Any, rule: Rule) -> Any:
    """Return *value* as *rule* sees it; what the rule does not speak of stays as it is."""
    match rule:
        case "number":
            return _as_number(value) if isinstance(value, str) else value
        case "text":
            return _as_text(value)
        case "time":
            return _as_time(value) if isinstance(value, str) else value
        case "boolean":
            return _as_boolean(value)
        case "case":
            return value.casefold() if isinstance(value, str) else value
        case "trim":
            return value.strip() if isinstance(value, str) else value
        case "empty":
            return _NULL if value in ("", _Whole(()), _Whole(frozenset())) else value
        case _:
            return value


def _as_number(text: str) -> Any:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return text
    return (
        number if number.is_finite() and "_" not in text else text
    )  # Python reads 1_000 as a number, nobody else does


def _as_text(value: Any) -> Any:
    if isinstance(value, _Word):
        return "" if value is _NULL else value.text
    if isinstance(value, int | Decimal):
        return number_text(value)
    return value


def _as_time(text: str) -> Any:
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        try:
            time = datetime.combine(date.fromisoformat(text.strip()), datetime.min.time())
        except ValueError:
            return text
    # As what has passed: the first and the last day of the calendar have no UTC in some zones.
    return time.replace(tzinfo=None) - datetime.min - (time.utcoffset() or timedelta())


def _as_boolean(value: Any) -> Any:
    said = value.text if isinstance(value, _Word) else str(_as_text(value)).strip().lower()
    return {"true": _TRUE, "false": _FALSE, "1": _TRUE, "0": _FALSE, "t": _TRUE, "f": _FALSE}.get(said, value)
