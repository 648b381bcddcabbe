"""Named SQL: `statements("ledger")["claim"]` is the text under `-- name: claim` in `ledger.sql`."""

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_MARK = "-- name: "


class MalformedSqlFile(Exception):
    """A file of named statements has text before its first name, or a name twice."""


@cache
def statements(file: str) -> dict[str, str]:
    """Return the statements of `<file>.sql` by name; raises MalformedSqlFile."""
    return parse((_FOLDER / f"{file}.sql").read_text(), file=file)


def parse(text: str, *, file: str) -> dict[str, str]:
    """Split *text* at its `-- name:` lines; what stands above the first must be comments."""
    head, *blocks = ("\n" + text).split("\n" + _MARK)
    if any(line.strip() and not line.startswith("--") for line in head.splitlines()):
        raise MalformedSqlFile(f"{file}.sql: there is SQL above the first '{_MARK}' line; give it a name.")
    found: dict[str, str] = {}
    for block in blocks:
        name, _, body = block.partition("\n")
        if name.strip() in found:
            raise MalformedSqlFile(f"{file}.sql: the name '{name.strip()}' is used twice; rename one.")
        found[name.strip()] = body.strip()
    return found
