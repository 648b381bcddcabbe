"""Read one stream of one target back, lay it beside the source, say what differs, and put it right if that is wanted.

What is on its way is not drift: of a key that differs, any change that was not settled at the target when the listing
began, or that came since, makes it `in_flight`. A repair appends to the change log, and delivery does the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.reading import NumberedPaging, OffsetPaging, ReadConfig, ReconcileConfig, Shape
from pipelines.delivery.template import RecordUnrenderable
from pipelines.reconciliation.compare import (
    FieldRules,
    Pair,
    decode,
    differences,
    part_of,
    value_at,
)
from pipelines.reconciliation.guard import Guard, Limits, guard
from pipelines.reconciliation.listing import Circles, ListingFailed, PositionLost, Reader, first_path, read_page
from pipelines.reconciliation.meaning import Meaning
from pipelines.reconciliation.workspace import Appended, Finding, Kind, Listing, SourceRow, Summary, Workspace

_ROWS_AT_ONCE = 5000
_REPAIRS_AT_ONCE = 500
_SAMPLES = 20
_PAGES_A_LINE = 50
_ASKED_FOR = 50
_EXAMPLES = 5
_LISTINGS = 3
"""A list that is counted off (pages, offsets) may pass a record over while others come and go; so often it is read."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is reconciled, and how."""

    target: str
    stream: str
    base_url: str
    read: ReadConfig
    settings: ReconcileConfig
    shape: Shape
    render: Callable[[ChangeRecord], bytes | None]
    path_of: Callable[[ChangeRecord], bytes] | None
    """Of one record, if the target can be asked for one."""
    fingerprint: str
    """Names how the target is read; a listing goes on only under the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was found of one stream of one target, and done about it."""

    target: str
    stream: str
    meaning: Meaning
    source: int
    """Rows."""
    owed: int
    """Rows of which a record should be listed: neither filtered, nor on its way, nor dead."""
    listed: int
    """Records at the target that have a key of the source's."""
    unkeyed: int
    """Records at the target that have none: its own."""
    matched: int
    filtered: int
    """Rows that the transform filters: nothing is owed of them."""
    summary: Summary
    guard: Guard
    appended: Appended
    asked: int = 0
    """Records that the list lacks and that were asked for one by one."""
    there: int = 0
    """Those of them that are there all the same."""
    values: Sequence[tuple[str, str, str, str]] = ()
    """Key, field, what it should be, what it is; only with `show_values`."""
    pages: int = 0
    requests: int = 0
    resumed: bool = False
    listing_seconds: float = 0.0
    comparing_seconds: float = 0.0

    def count(self, kind: Kind) -> int:
        """Return how many records are of *kind*; none are missing from a list that is not believed."""
        if kind == "missing" and not self.guard.believed:
            return 0
        return self.summary.counts.get(kind, 0)

    @property
    def unlisted(self) -> int:
        """Return how many rows are not in a list that is not believed."""
        return 0 if self.guard.believed else self.summary.counts.get("missing", 0)


@dataclass(slots=True)
class _Walk:
    """What is counted on the way along the rows."""

    source: int = 0
    matched: int = 0
    filtered: int = 0
    seen: int = 0
    examples: list[SourceRow] = field(default_factory=list)
    """Some whose record is listed."""


@dataclass(slots=True, kw_only=True)
class Reconciliation:
    """One stream of one target, from its first page to its last repair. It is run once."""

    subject: Subject
    workspace: Workspace
    reader: Reader
    meaning: Meaning
    limits: Limits
    now: datetime
    say: Say = field(default=lambda _: None)
    _pages: int = 0
    _listed: int = 0
    _unkeyed: int = 0
    _total: int | None = None
    _resumed: bool = False
    _asked: int = 0
    _there: int = 0
    _vouched: bool = False
    """What is not listed is not there: that was asked."""
    _listing_seconds: float = 0.0
    _comparing_seconds: float = 0.0

    def run(self) -> Outcome:
        """List, compare, repair; raises ListingFailed, and then what was listed is kept for the next run."""
        with self._timed("_listing_seconds"):
            self._list()
        walk, summary = self._compare()
        listings = 1
        while self._may_have_passed_over(summary, listings):
            self.say("records may have shifted while the list was counted off; what is not found is looked for again")
            listings += 1
            with self._timed("_listing_seconds"):
                self.workspace.list_again(first=first_path(self.subject.read))
                self._unkeyed = 0
                self._read_pages(first_path(self.subject.read))
            walk, summary = self._compare()
        confirmed = self._confirm(summary)
        if summary.counts.get("missing", 0) and self.subject.path_of is not None:
            summary = self._ask_for_missing(walk.examples, summary)
        found = summary.counts
        owed = walk.matched + found.get("stale", 0) + found.get("missing", 0)
        decided = guard(
            self.limits,
            source=walk.source,
            listed=self._listed,
            owed=owed,
            missing=found.get("missing", 0),
            stale=found.get("stale", 0),
            extra=found.get("extra", 0),
            confirmed=confirmed or self._vouched,
            refuted=self._there > 0,
        )
        values = self._values(summary.samples.get("stale", ())) if self.subject.settings.show_values else ()
        appended = self._repair(decided)
        self.workspace.discard()
        return Outcome(
            target=self.subject.target,
            stream=self.subject.stream,
            meaning=self.meaning,
            source=walk.source,
            owed=owed,
            listed=self._listed,
            unkeyed=self._unkeyed,
            matched=walk.matched,
            filtered=walk.filtered,
            summary=summary,
            guard=decided,
            appended=appended,
            asked=self._asked,
            there=self._there,
            values=values,
            pages=self._pages,
            requests=self.reader.requests,
            resumed=self._resumed,
            listing_seconds=self._listing_seconds,
            comparing_seconds=self._comparing_seconds,
        )

    # Listing ---------------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        read, settings = self.subject.read, self.subject.settings
        first = first_path(read)

        def begin(resume_within: float) -> Listing:
            begun = self.workspace.begin(first=first, fingerprint=self.subject.fingerprint, resume_within=resume_within)
            self._pages, self._listed, self._unkeyed = begun.pages, begun.listed, begun.unkeyed
            self._total, self._resumed = begun.total, begun.resumed
            if begun.resumed:
                self.say(f"going on with a listing that was broken off after {begun.listed:,} records")
            elif read.lag_seconds:
                # What was accepted until now is to be in the list; what comes meanwhile counts as on its way.
                self.reader.sleep(read.lag_seconds)
            return begun

        listing = begin(settings.resume_within_seconds)
        try:
            if not listing.complete:
                self._read_pages(listing.next)
        except PositionLost as problem:
            if not listing.resumed:
                raise
            self.say(f"the target does not know any more where it was ({problem}); listing from the beginning")
            self._read_pages(begin(0).next)

    def _read_pages(self, path: str | None) -> None:
        circles = Circles(known=self._pages)
        while path is not None:
            page = read_page(self.subject.read, self.reader.get(path), path=path, base_url=self.subject.base_url)
            ahead = page.next
            news = self.workspace.add_page(page.records, unkeyed=page.unkeyed, next=ahead, total=page.total)
            self._pages += 1
            self._listed += news
            self._unkeyed += page.unkeyed
            self._total = page.total
            try:
                circles.look(page, path=path, news=news)
            except ListingFailed:
                self.workspace.discard()  # to go on there would be to go round once more
                raise
            if self._pages % _PAGES_A_LINE == 0:
                self.say(f"{self._listed:,} records listed so far, in {self._pages:,} pages")
            path = ahead

    def _confirm(self, summary: Summary) -> bool:
        """Say whether the target's own total agrees with what it listed; raises ListingFailed if they are at odds.

        As many as changed meanwhile may have come or gone between the first page and the last.
        """
        if self._total is None:
            return False
        listed = self._listed + self._unkeyed
        if listed + summary.moving < self._total:
            self.workspace.discard()
            raise ListingFailed(
                f"the target says that it has {self._total:,} records, and listed {listed:,}: the list was cut short, "
                "or read.total does not say how many there are"
            )
        return listed >= self._total

    def _may_have_passed_over(self, summary: Summary, listings: int) -> bool:
        counted = isinstance(self.subject.read.page, OffsetPaging | NumberedPaging)
        # What others do at the target is in no log, so a second look is due even if nothing moves here.
        due = listings < (_LISTINGS if summary.moving > 0 else 2)
        return counted and due and summary.counts.get("missing", 0) > 0

    def _ask_for_missing(self, examples: Sequence[SourceRow], summary: Summary) -> Summary:
        """Ask for some of what the list lacks, one by one; raises ListingFailed if the target cannot be asked so.

        Only if it is seen to have one that is listed does it count when it has not got the others.
        """
        has_listed = any(self._has(row) for row in examples)
        if examples and not has_listed:
            raise ListingFailed("read.one leads to none of the records that are listed; mend read.one")
        asked = self.workspace.missing(limit=_ASKED_FOR)
        there = [row.match for row in asked if self._has(row)]
        if there:
            # It may have come since: then its change is in the log, and it counts as on its way.
            summary = self.workspace.summarize(samples=_SAMPLES)
            self._there = len(self.workspace.missing(limit=_ASKED_FOR, among=there))
        self._asked = len(asked)
        self._vouched = has_listed and bool(asked) and not self._there
        return summary

    def _has(self, row: SourceRow) -> bool:
        assert self.subject.path_of is not None
        try:
            path = self.subject.path_of(self._change(row)).decode()
        except RecordUnrenderable:
            return False
        return self.reader.has(path)

    # Comparing -------------------------------------------------------------------------------------------------------

    def _compare(self) -> tuple[_Walk, Summary]:
        with self._timed("_comparing_seconds"):
            walk = _Walk()
            for rows in self.workspace.rows(limit=_ROWS_AT_ONCE):
                self.workspace.note(self._compare_rows(rows, walk))
                self.say(f"{walk.source:,} rows compared so far")
            if self.meaning.extra is None and walk.seen < self._listed:
                self.workspace.find_extra()
            return walk, self.workspace.summarize(samples=_SAMPLES)

    def _compare_rows(self, rows: Sequence[SourceRow], walk: _Walk) -> list[Finding]:
        """Return what is not as it should be, of a chunk of rows."""
        held = self.workspace.listed([row.match for row in rows])
        walk.source += len(rows)
        walk.seen += len(held)
        walk.examples += [row for row in rows if row.match in held][: _EXAMPLES - len(walk.examples)]
        findings: list[Finding] = []
        pairs: list[Pair] = []
        by_match = {row.match: row for row in rows}
        for row in rows:
            try:
                rendered = self._render(row)
            except RecordUnrenderable as problem:
                findings.append(Finding(match=row.match, key=row.key, kind="unrenderable", reason=str(problem)))
                continue
            if rendered is None:
                walk.filtered += 1
            elif row.match not in held:
                if self.meaning.missing is None:
                    findings.append(Finding(match=row.match, key=row.key, kind="missing"))
            elif self.meaning.stale is not None:
                walk.matched += 1
            else:
                pairs.append(Pair(key=row.match, should=self._part(rendered), does=decode(held[row.match])))
        differing = differences(pairs, shape=self.subject.shape, rules=self._rules())
        walk.matched += len(pairs) - len(differing)
        findings += [
            Finding(match=one.key, key=by_match[one.key].key, kind="stale", fields=one.fields) for one in differing
        ]
        return findings

    def _render(self, row: SourceRow) -> bytes | None:
        return self.subject.render(self._change(row))

    def _change(self, row: SourceRow) -> ChangeRecord:
        return ChangeRecord(0, self.subject.stream, row.key, "snapshot", row.payload, instant_of(self.now))

    def _part(self, rendered: bytes) -> Any:
        return part_of(decode(rendered), self.subject.read.compare)

    def _rules(self) -> FieldRules:
        return FieldRules.of(self.subject.read.fields, self.subject.shape)

    def _values(self, findings: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
        shown: list[tuple[str, str, str, str]] = []
        both = self.workspace.samples([finding.match for finding in findings])
        for finding in findings:
            row, held = both.get(finding.match, (None, None))
            if row is None or held is None or (rendered := self._render(row)) is None:
                continue
            should, does = self._part(rendered), decode(held)
            paths = self.subject.shape.fields
            shown += [
                (row.key, name, value_at(should, name, paths=paths), value_at(does, name, paths=paths))
                for name in finding.fields
            ]
        return shown

    # Repairing -------------------------------------------------------------------------------------------------------

    def _repair(self, decided: Guard) -> Appended:
        total = Appended()
        for kind in decided.kinds:
            for appended in self.workspace.append(kind, limit=_REPAIRS_AT_ONCE):
                total += appended
                self.say(f"repair: {total.snapshots:,} records and {total.deletes:,} deletions appended so far")
        return total

    @contextmanager
    def _timed(self, what: Literal["_listing_seconds", "_comparing_seconds"]) -> Iterator[None]:
        started = self.reader.clock.monotonic()
        yield
        setattr(self, what, getattr(self, what) + self.reader.clock.monotonic() - started)
