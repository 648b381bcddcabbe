"""Ask the ledger what became of every change, and how fast."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from psycopg import Connection
from psycopg.rows import class_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Where every change is that was captured for one target."""

    target: str
    captured: int
    accepted: int
    superseded: int
    filtered: int
    dead: int
    claimed: int
    pending: int

    @property
    def done(self) -> int:
        """Changes that nothing more is owed for."""
        return self.accepted + self.superseded + self.filtered + self.dead

    @property
    def adds_up(self) -> bool:
        """Whether every change is in one place and none in two."""
        return self.captured == self.done + self.claimed + self.pending


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast one target was served."""

    target: str
    records: int
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A change that a target refused."""

    target: str
    stream: str
    key: str
    reason: str
    response: str | None

    def why(self) -> str:
        """Return the reason in the target's own words, if it had any."""
        words = self.response or ""
        with suppress(ValueError, AttributeError):
            words = json.loads(words).get("error", words)
        return f"{self.reason}: {words[:200]}" if words else self.reason


_COUNTS = """
select s.target, s.accepted, s.superseded, s.filtered, s.dead,
       count(c.change_id) - s.before_start as captured,
       count(c.change_id) filter (where s.claimed @> c.change_id) as claimed,
       count(c.change_id) filter (where not (s.settled + s.claimed) @> c.change_id) as pending
from distributary.target_state s
left join distributary.change_log c on c.target is null or c.target = s.target
group by s.target
"""
_PROGRESS = "select target, accepted + superseded + filtered + dead from distributary.target_state"
_PACE = """
select target, sum(accepted)::bigint as records, sum(attempts)::bigint as requests,
       extract(epoch from max(finished_at) - min(claimed_at))::float8 as seconds
from distributary.batch where state = 'settled' group by target
"""


def counts(connection: Connection) -> Mapping[str, Counts]:
    """Return the counts of every target that is registered; reads the whole change log."""
    with connection.cursor(row_factory=class_row(Counts)) as cursor:
        return {row.target: row for row in cursor.execute(_COUNTS)}


def progress(connection: Connection) -> Mapping[str, int]:
    """Return how many changes each target is done with; cheap enough to ask all the time."""
    return dict(connection.execute(_PROGRESS).fetchall())


def pace(connection: Connection) -> Mapping[str, Pace]:
    """Return how fast each target was served, from its first claim to its last answer."""
    with connection.cursor(row_factory=class_row(Pace)) as cursor:
        return {row.target: row for row in cursor.execute(_PACE)}


def dead_letters(connection: Connection) -> Sequence[DeadLetter]:
    """Return the open dead letters."""
    with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        query = "select target, stream, key, reason, response from distributary.dead_letter where state = 'open'"
        return cursor.execute(query + " order by target, change_id").fetchall()


def captured(connection: Connection) -> int:
    """Return the length of the change log."""
    row = connection.execute("select count(*) from distributary.change_log").fetchone()
    return int(row[0]) if row else 0


def behind_what_was_delivered(connection: Connection) -> int:
    """Return how many changes are still owed to some target although later ones were settled already."""
    row = connection.execute(
        "select count(distinct c.change_id) from distributary.change_log c, distributary.target_state s "
        "where not (s.settled + s.claimed) @> c.change_id and c.change_id < upper(s.settled) "
        "and (c.target is null or c.target = s.target)"
    ).fetchone()
    return int(row[0]) if row else 0
