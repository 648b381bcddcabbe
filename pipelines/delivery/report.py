"""What a drain did: the numbers that people and the Dagster UI are shown."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from math import ceil
from random import Random
from typing import Literal

from pipelines.changes.record import ChangeRecord, instant_of, instants, streams, time_of
from pipelines.delivery.outcome import DeadRecord

_LAGS_OF_A_BATCH = 4
_MOST_REASONS = 20
OTHER_REASONS = "other reasons"

End = Literal["caught_up", "deferred", "paused", "stopped", "held", "failed"]


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of one stream's changes of one day (UTC)."""

    accepted: int = 0
    superseded: int = 0
    filtered: int = 0
    dead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReport:
    """How one target's drain ended. Plain values only: it travels between processes."""

    target: str
    end: End
    reason: str | None = None
    tallies: Mapping[tuple[str, date], Tally] = field(default_factory=dict)
    requests: int = 0
    retries: int = 0
    seconds: float = 0.0
    latency_p50: float | None = None
    latency_p95: float | None = None
    lag_p50: float | None = None
    lag_p95: float | None = None
    """Seconds from a change to its acceptance."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Dead letters by reason; from the twenty-first reason on they are counted together."""

    def total(self, name: Literal["accepted", "superseded", "filtered", "dead"]) -> int:
        """Return one count over all streams and days."""
        return sum(getattr(tally, name) for tally in self.tallies.values())

    @property
    def records_per_second(self) -> float:
        """Return accepted records a second of the drain's own time, lingering left out."""
        return self.total("accepted") / self.seconds if self.seconds > 0 else 0.0


class Sample:
    """A fair sample of a stream of numbers, in constant memory (Vitter's algorithm R, 1985)."""

    def __init__(self, *, size: int = 2000, seed: int = 1) -> None:
        self._size = size
        self._random = Random(seed)
        self._seen = 0
        self._kept: list[float] = []

    def add(self, value: float) -> None:
        """Take *value* into account."""
        self._seen += 1
        if len(self._kept) < self._size:
            self._kept.append(value)
        elif (place := int(self._random.random() * self._seen)) < self._size:  # `randrange` takes ten times as long
            self._kept[place] = value

    def quantile(self, fraction: float) -> float | None:
        """Return the value that *fraction* of the sample does not exceed (nearest rank); None if there is none."""
        if not self._kept:
            return None
        ordered = sorted(self._kept)
        return ordered[max(0, ceil(fraction * len(ordered)) - 1)]


class Recorder:
    """Gathers a drain's numbers. Belongs to one thread."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, date], Tally] = defaultdict(Tally)
        self.latencies = Sample()
        self.lags = Sample()
        self.refusals: dict[str, int] = defaultdict(int)
        self.requests = 0
        self.retries = 0

    def count(self, name: Literal["accepted", "superseded", "filtered"], changes: Sequence[ChangeRecord]) -> None:
        """Add *changes* to one count of their streams and days."""
        if not changes:
            return
        made_at, of_streams = instants(changes), streams(changes)
        first, last = _day_of(min(made_at)), _day_of(max(made_at))
        if first == last and len(set(of_streams)) == 1:  # as a batch nearly always is
            self._add(name, of_streams[0], first, len(changes))
            return
        for stream, instant in zip(of_streams, made_at, strict=True):
            self._add(name, stream, _day_of(instant), 1)

    def _add(self, name: str, stream: str, day: date, number: int) -> None:
        tally = self.tallies[(stream, day)]
        setattr(tally, name, getattr(tally, name) + number)

    def lag(self, now: datetime, accepted: Sequence[ChangeRecord]) -> None:
        """Take into account how long some of a batch's changes took: a few stand for all."""
        until = instant_of(now)
        for instant in instants(accepted)[:: max(1, len(accepted) // _LAGS_OF_A_BATCH)]:
            # The clocks of two machines: a change cannot have been delivered before it was made.
            self.lags.add(max(0.0, (until - instant) / 1e6))

    def bury(self, dead: Sequence[DeadRecord]) -> None:
        """Add dead letters, by their reasons."""
        for record in dead:
            self._tally_of(record.change).dead += 1
            # A transform's own words may be others for each record: they must not fill the memory, nor a run's failure.
            known = record.reason in self.refusals or len(self.refusals) < _MOST_REASONS
            self.refusals[record.reason if known else OTHER_REASONS] += 1

    def _tally_of(self, change: ChangeRecord) -> Tally:
        return self.tallies[(change.stream, _day_of(change.instant))]


def _day_of(instant: int) -> date:
    return time_of(instant).date()
