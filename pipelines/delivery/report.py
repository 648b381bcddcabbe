"""What a drain did: the numbers that people and the Dagster UI are shown."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import lru_cache, partial
from math import ceil, log, log1p
from random import Random
from typing import Literal

from pipelines.changes.record import ChangeRecord, instant_of, instants, streams, time_of
from pipelines.delivery.ledger import Settlement
from pipelines.delivery.outcome import DeadRecord

_FOR_ONE_LAG = 25
"""Accepted changes of which one stands for all: what a sample keeps, it must draw for."""
_MOST_REASONS = 20
_MICROSECONDS_OF_A_DAY = 86_400_000_000
OTHER_REASONS = "other reasons"

_Count = Literal["accepted", "superseded", "filtered"]
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
    """A fair sample of a stream of numbers, in constant memory and little time (Li's algorithm L, 1994)."""

    def __init__(self, *, size: int = 1000, seed: int = 1) -> None:
        self._size = size
        self._random = Random(seed)
        self._seen = 0
        self._kept: list[float] = []
        self._next = 1
        """Which number is the next to be kept: how many are passed over is drawn, not whether each is."""
        self._share = 1.0

    def add(self, value: float) -> None:
        """Take *value* into account."""
        self._seen += 1
        if self._seen == self._next:
            self._keep(value)

    def add_many(self, number: int, value_at: Callable[[int], float]) -> None:
        """Take so many values into account; *value_at* is asked, by their places, for the few that are kept."""
        before = self._seen
        self._seen += number
        while self._next <= self._seen:
            self._keep(value_at(self._next - before - 1))

    def _keep(self, value: float) -> None:
        if len(self._kept) < self._size:
            self._kept.append(value)
        else:
            self._kept[int(self._random.random() * self._size)] = value  # `randrange` takes ten times as long
        self._next += 1
        if len(self._kept) == self._size:
            self._share *= self._above_zero() ** (1 / self._size)
            self._next += int(log(self._above_zero()) / log1p(-self._share))

    def _above_zero(self) -> float:
        return 1.0 - self._random.random()

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

    def settled(self, settlements: Sequence[Settlement], *, now: datetime) -> None:
        """Add what became of batches, each of one stream, and how long some of their changes took until *now*."""
        until = instant_of(now)
        made_at_of: dict[str, list[int]] = defaultdict(list)
        for settlement in settlements:
            if accepted := settlement.accepted:
                made_at_of[streams(accepted)[0]] += instants(accepted)
            if settlement.filtered:
                self.count("filtered", settlement.filtered)
            if settlement.dead:
                self.bury(settlement.dead)
        for stream, made_at in made_at_of.items():
            self._count("accepted", made_at, stream)
            some = made_at[:: max(1, min(_FOR_ONE_LAG, len(made_at) // 4))]
            self.lags.add_many(len(some), partial(_lag, some, until))

    def count(self, name: _Count, changes: Sequence[ChangeRecord]) -> None:
        """Add *changes* to one count of their streams and days."""
        made_at, of_streams = instants(changes), streams(changes)
        if len(set(of_streams)) == 1:
            self._count(name, made_at, of_streams[0])
            return
        for stream, instant in zip(of_streams, made_at, strict=True):
            self._add(name, stream, _day_of(instant), 1)

    def _count(self, name: _Count, made_at: Sequence[int], stream: str) -> None:
        ordered = sorted(made_at)  # as they nearly are: then it takes less than to look for the first and the last
        day = _day_of(ordered[0])
        if day == _day_of(ordered[-1]):  # as of a batch it nearly always is
            self._add(name, stream, day, len(ordered))
            return
        for instant in ordered:
            self._add(name, stream, _day_of(instant), 1)

    def _add(self, name: _Count, stream: str, day: int, number: int) -> None:
        tally = self.tallies[(stream, _date_of(day))]
        setattr(tally, name, getattr(tally, name) + number)

    def bury(self, dead: Sequence[DeadRecord]) -> None:
        """Add dead letters, by their reasons."""
        for record in dead:
            self._tally_of(record.change).dead += 1
            # A transform's own words may be others for each record: they must not fill the memory, nor a run's failure.
            known = record.reason in self.refusals or len(self.refusals) < _MOST_REASONS
            self.refusals[record.reason if known else OTHER_REASONS] += 1

    def _tally_of(self, change: ChangeRecord) -> Tally:
        return self.tallies[(change.stream, _date_of(_day_of(change.instant)))]


def _lag(made_at: Sequence[int], until: int, place: int) -> float:
    # The clocks of two machines: a change cannot have been delivered before it was made.
    return max(0.0, (until - made_at[place]) / 1e6)


def _day_of(instant: int) -> int:
    return instant // _MICROSECONDS_OF_A_DAY


@lru_cache
def _date_of(day: int) -> date:
    return time_of(day * _MICROSECONDS_OF_A_DAY).date()
