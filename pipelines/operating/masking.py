"""Leave out of changes what is not to be shown: chosen columns, fields inside of them, and keys."""

from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.template import TOO_DEEP, RecordUnrenderable

MASK = "***"
KEY = "_key"

_decode = msgspec.json.Decoder(float_hook=Decimal).decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Masking:
    """Which names are masked. A column that is part of a stream's key has the key masked with it."""

    def __init__(self, names: Collection[str], *, key_columns: Mapping[str, Collection[str]]) -> None:
        self._names = frozenset(names)
        self._streams = frozenset(
            stream for stream, columns in key_columns.items() if not self._names.isdisjoint(columns)
        )

    def __bool__(self) -> bool:
        return bool(self._names)

    def key_of(self, change: ChangeRecord) -> str:
        """Return the change's key, or what stands for it."""
        return MASK if KEY in self._names or change.stream in self._streams else change.key

    def masked(self, change: ChangeRecord) -> ChangeRecord:
        """Return *change* as it may be shown; raises RecordUnrenderable if its row cannot be read."""
        try:
            row = self._without(_read(change))
            return change._replace(payload=_encode(row), key=self.key_of(change))
        except RecursionError:
            raise RecordUnrenderable(TOO_DEEP) from None

    def _without(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: MASK if name in self._names else self._without(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._without(item) for item in value]
        return value

    def unseen_in(self, changes: Collection[ChangeRecord]) -> frozenset[str]:
        """Return the names that none of *changes* has at any depth."""
        unseen = set(self._names - {KEY})
        for change in changes:
            if not unseen:
                break
            try:
                _strike(_read(change), unseen)
            except (RecordUnrenderable, RecursionError):
                continue  # it is never shown
        return frozenset(unseen)


def _read(change: ChangeRecord) -> Any:
    try:
        return _decode(change.payload)
    except msgspec.DecodeError as error:
        raise RecordUnrenderable(f"the change's payload cannot be read: {error}") from None


def _strike(value: Any, names: set[str]) -> None:
    """Take out of *names* those that *value* has."""
    if isinstance(value, dict):
        names.difference_update(value)
        for inner in value.values():
            _strike(inner, names)
    elif isinstance(value, list):
        for item in value:
            _strike(item, names)
