"""Hold what every target saw and holds against what the source has: the sentences that fail a soak."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg import Connection, sql

from demo.ledger_counts import Counts, DeadLetter

_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What the source's writers committed."""

    written: Mapping[str, int]
    """How many changes of each key, as the writers counted them."""
    captured: Mapping[str, Sequence[int]]
    """The change ids of each key, in the change log."""
    rows: Mapping[str, Any]
    """What the tables hold, by key."""

    def expected(self, *, mode: str, without: Collection[str] = ()) -> Mapping[str, int | Sequence[int]]:
        """Return what a target must have been sent: every change (`event`), or each key's last one (`state`)."""
        return {
            key: list(ids) if mode == "event" else max(ids) for key, ids in self.captured.items() if key not in without
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What one target saw and holds."""

    target: str
    counts: Counts
    findings: Mapping[str, Any]
    """As `soak.target` tells them."""
    held: Mapping[str, Any]
    dead: Sequence[DeadLetter] = field(default_factory=tuple)


def read_truth(connection: Connection, streams: Sequence[str]) -> Truth:
    """Read the source, once nobody writes to it any more."""
    rows: dict[str, Any] = {}
    for stream in streams:
        query = sql.SQL("select id, to_jsonb(t) from {} t").format(sql.Identifier(stream))
        rows |= dict(connection.execute(query).fetchall())
    captured = "select key, array_agg(change_id order by change_id) from distributary.change_log group by key"
    written = "select key, times from written where times > 0"
    return Truth(
        written=dict(connection.execute(written).fetchall()),
        captured=dict(connection.execute(captured).fetchall()),
        rows=rows,
    )


def capture_problems(truth: Truth) -> Sequence[str]:
    """Return what is wrong with the change log itself."""
    differ = [
        f"{key} was changed {truth.written.get(key, 0)} times and captured {len(truth.captured.get(key, ()))} times"
        for key in sorted(truth.written.keys() | truth.captured.keys())
        if truth.written.get(key, 0) != len(truth.captured.get(key, ()))
    ]
    return _some(differ)


def problems(account: Account, truth: Truth, *, refuses: Collection[str]) -> Sequence[str]:
    """Return what is wrong at one target, which never takes the keys that it *refuses*."""
    findings, counts = account.findings, account.counts
    found = [
        f"{number:,} {kind.replace('_', ' ')}{_such_as(findings[kind])}"
        for kind, number in findings["broken"].items()
        # A target that passes over no repeats can be set back for a moment by a request that it applied too late.
        if kind != "out_of_order_if_careless"
    ]
    if findings["strangers"]:
        strangers = findings["strangers"]
        found.append(f"{len(strangers)} keys that nobody wrote, such as {', '.join(strangers[:_EXAMPLES])}")
    if not counts.adds_up:
        found.append(f"its counts do not add up: {counts}")
    if counts.pending or counts.claimed:
        found.append(f"{counts.pending + counts.claimed:,} changes are still owed")
    if counts.captured != sum(truth.written.values()):
        found.append(f"{counts.captured:,} changes are counted for it, and {sum(truth.written.values()):,} were made")
    found += _disagreements(account.held, {key: row for key, row in truth.rows.items() if key not in refuses})
    found += _some(
        [
            f"{letter.key} is dead-lettered ({letter.reason}) and is no bad record"
            for letter in account.dead
            if letter.key not in refuses
        ]
    )
    buried = {letter.key for letter in account.dead}
    found += [f"{key} should have been dead-lettered" for key in refuses if key in truth.written and key not in buried]
    return [f"{account.target}: {problem}" for problem in found]


def _disagreements(held: Mapping[str, Any], rows: Mapping[str, Any]) -> Sequence[str]:
    differ = {
        "missing": rows.keys() - held.keys(),
        "there that the source has not": held.keys() - rows.keys(),
        "not as in the source": {key for key in rows.keys() & held.keys() if rows[key] != held[key]},
    }
    return [
        f"{len(keys):,} records are {how}, such as {', '.join(sorted(keys)[:_EXAMPLES])}"
        for how, keys in differ.items()
        if keys
    ]


def _such_as(examples: Any) -> str:
    return f", such as {examples[:_EXAMPLES]}" if isinstance(examples, list) else ""


def _some(sentences: Sequence[str]) -> list[str]:
    more = len(sentences) - _EXAMPLES
    return [*sentences[:_EXAMPLES], *([f"and {more} more of these"] if more > 0 else [])]
