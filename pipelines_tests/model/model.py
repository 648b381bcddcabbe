"""What ought to be: the source's rows and change log, what an answer means, and what a target's ledger may claim.

Small and slow on purpose, and written from docs/faults.md, not from the code that is tested.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.changes.record import Operation
from pipelines.delivery.judging import JudgingRules

Row = tuple[str, str]
"""Stream and key."""

Nature = Literal["sound", "refused", "unrenderable"]
"""What comes of a record at any target: some are refused for their own sake, some lack a column of the template."""

Fate = Literal["accepted", "superseded", "filtered", "dead"]

Meaning = Literal["accepted", "refused", "split", "fallback", "fault", "credentials", "configuration", "gone"]


# --- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One record of the log."""

    change_id: int
    row: Row
    operation: Operation
    nature: Nature
    target: str | None = None
    replays: int | None = None

    @property
    def original_id(self) -> int:
        return self.change_id if self.replays is None else self.replays

    def is_for(self, target: str) -> bool:
        return self.target in (None, target)


@dataclass(slots=True, eq=False)
class Transaction:
    """An open transaction: its rows are locked, its changes unseen."""

    rows: dict[Row, bool] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


class Source:
    """The source's rows, and the log as every reader must see it."""

    def __init__(self) -> None:
        self.committed: dict[int, Change] = {}
        self.all_changes: dict[int, Change] = {}
        self.open: list[Transaction] = []
        self._there: dict[Row, bool] = {}

    def begin(self) -> Transaction:
        transaction = Transaction()
        self.open.append(transaction)
        return transaction

    def locked(self, row: Row, *, against: Transaction) -> bool:
        """Whether another transaction has changed *row*: a writer would wait for it."""
        return any(row in other.rows for other in self.open if other is not against)

    def there(self, row: Row, transaction: Transaction) -> bool:
        return transaction.rows.get(row, self._there.get(row, False))

    def note(self, transaction: Transaction, change: Change, *, there: bool) -> None:
        transaction.rows[change.row] = there
        transaction.changes.append(change)
        self.all_changes[change.change_id] = change

    def commit(self, transaction: Transaction) -> None:
        self.open.remove(transaction)
        self._there.update(transaction.rows)
        self.committed |= {change.change_id: change for change in transaction.changes}

    def rollback(self, transaction: Transaction) -> None:
        self.open.remove(transaction)

    def replays_of(self, original: int, target: str) -> list[int]:
        return [one.change_id for one in self.committed.values() if one.replays == original and one.is_for(target)]


# --- what an answer means ---------------------------------------------------------------------------------------------

_FAULTS = frozenset({408, 420, 421, 423, 425, 429, 430, 500, 502, 503, 504})
_CREDENTIALS = frozenset({401, 403, 407, 419, 440, 498})
_CONFIGURATION = frozenset({402, 405, 406, 411, 415, 426, 428, 505})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is known of a request when its answer is read."""

    kind: str
    alone: bool
    names_record: bool
    """The path does."""
    results: Literal["none", "items", "errors"]
    falls_back: bool


def meaning_of_status(status: int, asked: Asked, rules: JudgingRules) -> Meaning | Literal["results"]:
    """Read the fault table for an answer's status; 'results' sends on to the items."""
    refused: Meaning = "refused" if asked.alone else "split"
    if status in rules.drop_on:
        return refused
    if status in rules.success_on or 200 <= status < 300:
        if asked.results != "none":
            return "results"
        return "configuration" if status == 207 else "accepted"
    if status in rules.retryable_status_codes or status in _FAULTS:
        return "fault"
    if status in _CREDENTIALS:
        return "credentials"
    if status in (404, 410):
        if asked.names_record and asked.alone and asked.kind == "delete":
            return "accepted"
        if asked.names_record and asked.alone and asked.kind == "update":
            return "fallback" if asked.falls_back else "refused"
        return "gone" if status == 410 and not asked.names_record else "configuration"
    if 300 <= status < 400 or status in _CONFIGURATION:
        return "configuration"
    if status == 409 and asked.kind == "insert" and asked.falls_back and asked.alone:
        return "fallback"
    return refused if status < 500 else "fault"


def meaning_of_item(status: int | None, asked: Asked, rules: JudgingRules) -> Meaning:
    """Read the fault table for one item; None is a record of which the answer does not speak."""
    if status is None:
        return "fault" if asked.results == "items" else "accepted"
    if status in rules.drop_on:
        return "refused"
    if status in rules.success_on or 200 <= status < 300 or (asked.kind == "delete" and status in (404, 410)):
        return "accepted"
    if status in _FAULTS | rules.retryable_status_codes:
        return "fault"
    if asked.falls_back and status == {"insert": 409, "update": 404}.get(asked.kind):
        return "fallback"
    return "refused"


def meanings(
    status: int, items: Sequence[int | None] | None, asked: Asked, rules: JudgingRules
) -> tuple[Meaning, Sequence[Meaning]]:
    """Return what an answer means as a whole and for each record; *items* is None if the body cannot be read."""
    whole = meaning_of_status(status, asked, rules)
    if whole != "results":
        return whole, ()
    if items is None:
        return "fault", ()
    each = [meaning_of_item(item, asked, rules) for item in items]
    if all(one == "refused" for one in each) and set(items) <= _CREDENTIALS:
        return "credentials", ()
    if all(one == "fault" for one in each):
        return "fault", ()
    return "accepted", each


# --- the ledger of one target -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Book:
    """What one target's ledger should say, as far as the drains' committed writes go."""

    target: str
    before_start: frozenset[int] = frozenset()
    fates: dict[int, Fate] = field(default_factory=dict)
    claimed: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)
    """Dead letters that a newer state or a redrive has closed."""

    no_longer_wanted: set[int] = field(default_factory=set)
    """Filtered by another configuration than the one by which they were claimed."""

    def owed(self, source: Source) -> dict[int, Change]:
        """Return every committed change that this target was ever to have."""
        return {
            change_id: change
            for change_id, change in source.committed.items()
            if change.is_for(self.target) and change_id not in self.before_start
        }

    def pending(self, source: Source) -> set[int]:
        return set(self.owed(source)) - set(self.fates) - self.claimed

    def ids_with(self, fate: Fate) -> set[int]:
        return {change_id for change_id, given in self.fates.items() if given == fate}

    def open_dead(self) -> set[int]:
        return self.ids_with("dead") - self.closed

    def check_superseded(self, source: Source, unwanted: set[int]) -> None:
        """A superseded change has a later one of its row that is not passed over itself; *unwanted* may be."""
        later: dict[Row, list[int]] = defaultdict(list)
        for change_id, change in self.owed(source).items():
            if self.fates.get(change_id) not in ("superseded", "filtered") or change_id in self.no_longer_wanted:
                later[change.row].append(change_id)
        for change_id in self.ids_with("superseded"):
            row = source.committed[change_id].row
            assert change_id in unwanted or any(one > change_id for one in later[row]), (
                f"{self.target}: {change_id} was superseded by nothing"
            )
