"""What the parts of a target's file are made of: sections without unknown keys, refusals with their place, paths."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pipelines.delivery.template import Place


def refusal(message: str, *, at: Place = ()) -> PydanticCustomError:
    """Return the error for something that is well formed but not acceptable; *at* leads on from the field."""
    return PydanticCustomError("refused", "{message}", {"message": message, "at": at})


class Section(BaseModel):
    """A part of the file. Nothing is guessed: no unknown keys, no text for a number, no number for a switch."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


LONGEST_SECONDS = 31_536_000.0
"""A year. Neither a thread nor Postgres can be told to wait for just any number of seconds."""

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS)]
Status = Annotated[int, Field(ge=100, le=599)]
# YAML lists become tuples, so that a loaded configuration cannot change.
Statuses = Annotated[tuple[Status, ...], Field(strict=False)]


_PATH = re.compile(r"(?:\$|[^\W\d][\w-]*)(?:\.[\w-]+|\[\d+\])*|\$?(?:\[\d+\])+(?:\.[\w-]+|\[\d+\])*")
_STEP = re.compile(r"\[(\d+)\]|([\w-]+)")


@dataclass(frozen=True, slots=True)
class JsonPath:
    """A way into a JSON document by names and positions: `$.a.b[0].c`. The `$` may be left out within an item."""

    text: str
    steps: tuple[str | int, ...]

    @classmethod
    def parse(cls, text: str) -> "JsonPath":
        """Read *text*; raises ValueError."""
        if not _PATH.fullmatch(text):
            raise ValueError(f"'{text}' is not a path; write names and positions, such as $.results[0].id")
        found = _STEP.finditer(text.removeprefix("$"))
        return cls(text, tuple(int(step[1]) if step[1] else step[2] for step in found))

    def find(self, document: Any) -> Any:
        """Return what lies at the end of the path; raises LookupError naming the path."""
        value = document
        for step in self.steps:
            fits = isinstance(value, dict) if isinstance(step, str) else isinstance(value, list)
            try:
                value = value[step] if fits else None
            except LookupError:
                fits = False
            if not fits:
                raise LookupError(f"there is nothing at {self.text}")
        return value


def _parse_path(value: Any, *, anchored: bool) -> Any:
    if not isinstance(value, str):
        return value
    try:
        path = JsonPath.parse(value)
    except ValueError as error:
        raise refusal(str(error)) from None
    if anchored and not value.startswith("$"):
        raise refusal(f"'{value}' is looked for from the answer's root; write '$.{value}'")
    return path


RootPath = Annotated[JsonPath, BeforeValidator(partial(_parse_path, anchored=True))]
ItemPath = Annotated[JsonPath, BeforeValidator(partial(_parse_path, anchored=False))]
