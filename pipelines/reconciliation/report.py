"""Say what was found: numbers to plot, a table, a picture, and of each check whether it passed and what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.delivery.ledger import Conservation
from pipelines.reconciliation.guard import Repaired
from pipelines.reconciliation.reconcile import Outcome
from pipelines.reconciliation.workspace import Finding, Kind

_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check says."""

    name: str
    passed: bool
    sentence: str
    what_to_do: str
    numbers: Mapping[str, int]
    keys: Sequence[str] = ()


def numbers(outcome: Outcome) -> dict[str, int | float]:
    """Return what is plotted over time."""
    seconds = outcome.listing_seconds + outcome.comparing_seconds
    judged = max(outcome.source, 1)
    return {
        "source rows": outcome.source,
        "target records": outcome.listed + outcome.unkeyed,
        "matched": outcome.matched,
        "matched ratio": round(outcome.matched / judged, 6),
        "missing": outcome.count("missing"),
        "stale": outcome.count("stale"),
        "extra": outcome.count("extra"),
        "drift ratio": round(sum(outcome.count(kind) for kind in ("missing", "stale", "extra")) / judged, 6),
        "in flight": outcome.count("in_flight"),
        "dead": outcome.count("dead"),
        "not renderable": outcome.count("unrenderable"),
        "filtered": outcome.filtered,
        "not listed": outcome.unlisted,
        "without key": outcome.unkeyed,
        "repaired": outcome.appended.snapshots + outcome.appended.deletes,
        "left to the next time": outcome.appended.busy + outcome.appended.impossible,
        "pages": outcome.pages,
        "requests": outcome.requests,
        "listing (s)": round(outcome.listing_seconds, 3),
        "comparing (s)": round(outcome.comparing_seconds, 3),
        "records per second": round((outcome.source + outcome.listed) / seconds, 1) if seconds else 0.0,
    }


def chart(outcome: Outcome) -> str:
    """Return the counts as bars, in Markdown; the shortest bar is one sign, or a single record could not be seen."""
    rows = [(name, outcome.count(kind)) for name, kind in _BARS]
    rows = [("matched", outcome.matched), *rows]
    if outcome.unlisted:
        rows.append(("not listed", outcome.unlisted))
    rows = [(name, count) for name, count in rows if count or name in ("matched", "missing", "stale", "extra")]
    most = max((count for _, count in rows), default=0)
    bars = [
        f"{name:<14} {'█' * max(round(_WIDTH * count / most), 1) if count else '':<{_WIDTH}} {count:,}"
        for name, count in rows
    ]
    return "```\n" + "\n".join(bars) + "\n```"


_BARS: tuple[tuple[str, Kind], ...] = (
    ("missing", "missing"),
    ("stale", "stale"),
    ("extra", "extra"),
    ("in flight", "in_flight"),
    ("dead", "dead"),
    ("not renderable", "unrenderable"),
)


def samples(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return some records of each kind: kind, key, and the fields or the reason."""
    return [
        (name, _key(finding), ", ".join(finding.fields) or finding.reason or "")
        for name, kind in _BARS
        for finding in outcome.summary.samples.get(kind, ())
    ]


def line(outcome: Outcome) -> str:
    """Return one line for the log and the terminal."""
    found = ", ".join(f"{outcome.count(kind):,} {name}" for name, kind in _BARS if outcome.count(kind))
    said = f"{outcome.source:,} rows, {outcome.listed:,} records: {found or 'they agree'}"
    if outcome.unlisted:
        said += f"; {outcome.unlisted:,} not in a list that is not believed"
    if outcome.appended.snapshots or outcome.appended.deletes:
        said += f"; to be repaired: {outcome.appended.snapshots + outcome.appended.deletes:,}"
    if outcome.guard.refused:
        said += f"; {outcome.guard.refused}"
    return f"{outcome.target}/{outcome.stream}  {said}"


def verdicts(outcome: Outcome) -> list[Verdict]:
    """Return what each check says."""
    return [_nothing_missing(outcome), _nothing_stale(outcome), _nothing_extra(outcome)]


_OWN_REPAIR = "delivery brings them; the next reconciliation should be clean"
_LAUNCH = "launch this asset with `repair: {}` (`dry_run: true` first), or write that into the route's `reconcile`"
_DELETE = (
    "if they are not the target's own, launch this asset with `repair: all` and `delete_extra: true` (`dry_run: true` "
    "first), or write both into the route's `reconcile`"
)
_CUT = "mend the route's `read`: its list leaves out records that the target has; nothing is repaired until it does not"
_SHORT = (
    "look at the target; if it has lost them, launch this asset with `trust_listing: true`, a `repair` and a "
    "`max_repair_fraction` that allows so many; if not, mend the route's `read`, or give it a `total`"
)


def _nothing_missing(outcome: Outcome) -> Verdict:
    missing = outcome.count("missing")
    if outcome.meaning.missing is not None:
        return _not_judged(outcome, "missing", outcome.meaning.missing)
    if outcome.unlisted:
        sentence = (
            f"the list looks cut short: it lacks {outcome.unlisted:,} of {outcome.owed:,} records. Either the target "
            "has lost them, or it did not list them, and nothing is missing"
        )
        if outcome.there:
            sentence = (
                f"the list is cut short: it lacks {outcome.unlisted:,} of {outcome.owed:,} records, and of "
                f"{outcome.asked:,} of those that were asked for one by one {outcome.there:,} are there"
            )
            return _bad(outcome, "missing", sentence, _CUT)
        return _bad(outcome, "missing", sentence, _SHORT)
    if missing:
        sentence = f"{missing:,} of {outcome.source:,} records are not at the target, and not on their way"
        return _bad(outcome, "missing", sentence, _advice(outcome, "missing", _LAUNCH.format("missing")))
    return _good(outcome, "missing", "the target has every record that it should have")


def _nothing_stale(outcome: Outcome) -> Verdict:
    stale = outcome.count("stale")
    if outcome.meaning.stale is not None:
        return _not_judged(outcome, "stale", outcome.meaning.stale)
    if stale:
        fields = ", ".join(f"{name} ({count:,})" for name, count in outcome.summary.fields[:5])
        sentence = f"{stale:,} records at the target are not as they should be; they differ in {fields}"
        loosely = "if the target merely writes a field another way, say so in `read.fields`; if not, "
        return _bad(outcome, "stale", sentence, _advice(outcome, "stale", loosely + _LAUNCH.format("stale")))
    return _good(outcome, "stale", "what the target has is as it should be")


def _nothing_extra(outcome: Outcome) -> Verdict:
    extra = outcome.count("extra")
    if outcome.meaning.extra is not None:
        return _not_judged(outcome, "extra", outcome.meaning.extra)
    if extra:
        sentence = f"{extra:,} records at the target have no row in the source"
        return _bad(outcome, "extra", sentence, _advice(outcome, "extra", _DELETE))
    return _good(outcome, "extra", "the target has nothing that the source has not got")


def _advice(outcome: Outcome, kind: Repaired, otherwise: str) -> str:
    if kind in outcome.guard.kinds:
        return _OWN_REPAIR
    if kind in outcome.guard.would and outcome.guard.refused:
        return outcome.guard.refused
    if kind in outcome.guard.cannot:
        return f"this cannot be repaired from here: {outcome.guard.cannot[kind]}"
    return otherwise


def _good(outcome: Outcome, kind: Repaired, sentence: str) -> Verdict:
    return Verdict(
        name=f"nothing_{kind}", passed=True, sentence=sentence, what_to_do="nothing", numbers=_beside(outcome, kind)
    )


def _not_judged(outcome: Outcome, kind: Repaired, why: str) -> Verdict:
    return _good(outcome, kind, f"not judged: {why}")


def _bad(outcome: Outcome, kind: Repaired, sentence: str, what_to_do: str) -> Verdict:
    return Verdict(
        name=f"nothing_{kind}",
        passed=False,
        sentence=sentence,
        what_to_do=what_to_do,
        numbers=_beside(outcome, kind),
        keys=[_key(finding) for finding in outcome.summary.samples.get(kind, ())],
    )


def _beside(outcome: Outcome, kind: Repaired) -> dict[str, int]:
    return {kind: outcome.count(kind), "in flight": outcome.count("in_flight"), "dead": outcome.count("dead")}


def _key(finding: Finding) -> str:
    return finding.match if finding.key is None else finding.key


def conservation(counts: Conservation) -> Verdict:
    """Say whether every captured change is in one place."""
    settled = counts.accepted + counts.superseded + counts.filtered + counts.dead
    held = {
        "captured": counts.captured,
        "accepted": counts.accepted,
        "superseded": counts.superseded,
        "filtered": counts.filtered,
        "dead": counts.dead,
        "claimed": counts.claimed,
        "pending": counts.pending,
    }
    total = settled + counts.claimed + counts.pending
    if counts.holds:
        return Verdict(
            name="conservation",
            passed=True,
            sentence=f"{counts.captured:,} captured = accepted + superseded + filtered + dead + claimed + pending",
            what_to_do="nothing" if not counts.pending + counts.claimed else "nothing: delivery brings what is pending",
            numbers=held,
        )
    return Verdict(
        name="conservation",
        passed=False,
        sentence=f"{counts.captured:,} changes were captured, but {total:,} are accounted for",
        what_to_do=(
            "rows of distributary.change_log or target_state were changed by hand, or restored apart from each other: "
            "reconcile this target's streams and repair what differs"
        ),
        numbers=held,
    )
