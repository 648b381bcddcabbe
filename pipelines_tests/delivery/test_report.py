"""The numbers that people are shown are the ones that happened."""

import pickle
from datetime import UTC, date, datetime, timedelta, timezone
from random import Random

import pytest

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.ledger import Settlement
from pipelines.delivery.outcome import DeadRecord
from pipelines.delivery.report import OTHER_REASONS, DrainReport, Recorder, Sample, Tally

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)


def change(change_id: int, *, stream: str = "customers", changed_at: datetime = NOON) -> ChangeRecord:
    return ChangeRecord(change_id, stream, str(change_id), "update", b"{}", instant_of(changed_at))


def test_counts_are_kept_by_stream_and_day() -> None:
    recorder = Recorder()

    recorder.count("accepted", [change(1), change(2), change(3, stream="orders")])
    recorder.count("accepted", [change(4, changed_at=NOON + timedelta(days=1))])
    recorder.count("superseded", [change(5)])
    recorder.count("filtered", [change(6)])

    assert dict(recorder.tallies) == {
        ("customers", date(2025, 3, 1)): Tally(accepted=2, superseded=1, filtered=1),
        ("orders", date(2025, 3, 1)): Tally(accepted=1),
        ("customers", date(2025, 3, 2)): Tally(accepted=1),
    }


def test_what_became_of_batches_is_counted_by_stream_and_day() -> None:
    """A batch may hold changes of two days, in whatever order they were made, and end in several ways."""
    recorder = Recorder()
    midnight = datetime(2025, 3, 2, tzinfo=UTC)
    last, first = midnight - timedelta(microseconds=1), midnight
    before_2000 = datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC)

    recorder.settled(
        [
            Settlement(batch_id=1, accepted=[change(1), change(2), change(3)]),
            Settlement(batch_id=2, accepted=[change(4, changed_at=at) for at in (first, last, before_2000, first)]),
            Settlement(
                batch_id=3,
                accepted=[change(5, stream="orders", changed_at=first)],
                filtered=[change(6, stream="orders")],
                dead=[DeadRecord(change=change(7, stream="orders", changed_at=last), reason="answered 400")],
            ),
            Settlement(batch_id=4, attempts=3),
        ],
        now=midnight,
    )

    assert dict(recorder.tallies) == {
        ("customers", date(2025, 3, 1)): Tally(accepted=4),
        ("customers", date(2025, 3, 2)): Tally(accepted=2),
        ("customers", date(1999, 12, 31)): Tally(accepted=1),
        ("orders", date(2025, 3, 2)): Tally(accepted=1),
        ("orders", date(2025, 3, 1)): Tally(filtered=1, dead=1),
    }
    assert recorder.refusals == {"answered 400": 1}


def test_the_lag_is_the_time_from_a_change_to_its_acceptance() -> None:
    """Of many a few stand for all; no clock makes it less than none."""
    recorder = Recorder()
    made_at = [NOON - timedelta(seconds=number) for number in range(100)]

    recorder.settled([Settlement(batch_id=1, accepted=[change(1, changed_at=at) for at in made_at])], now=NOON)
    assert [recorder.lags.quantile(fraction) for fraction in (0.0, 0.5, 1.0)] == [0, 25, 75]

    recorder.settled([Settlement(batch_id=2, accepted=[change(2, changed_at=NOON + timedelta(hours=1))])], now=NOON)
    assert recorder.lags.quantile(0.0) == 0


def test_a_day_is_a_day_in_utc() -> None:
    """A change read in another time zone counts for the same partition."""
    recorder = Recorder()
    one_o_clock_in_berlin = datetime(2025, 3, 2, 0, 30, tzinfo=timezone(timedelta(hours=1)))

    recorder.count("accepted", [change(1, changed_at=one_o_clock_in_berlin)])

    assert list(recorder.tallies) == [("customers", date(2025, 3, 1))]


def test_dead_letters_are_counted_by_reason() -> None:
    recorder = Recorder()

    recorder.bury([DeadRecord(change=change(1), reason="answered 400"), DeadRecord(change=change(2), reason="x")])
    recorder.bury([DeadRecord(change=change(3), reason="answered 400")])

    assert recorder.refusals == {"answered 400": 2, "x": 1}
    assert recorder.tallies[("customers", date(2025, 3, 1))].dead == 3


def test_reasons_without_end_are_counted_together() -> None:
    recorder = Recorder()

    for number in range(1000):
        recorder.bury([DeadRecord(change=change(number), reason=f"the transform failed: no such person {number}")])
    recorder.bury([DeadRecord(change=change(1000), reason="the transform failed: no such person 3")])

    assert len(recorder.refusals) == 21
    assert recorder.refusals["the transform failed: no such person 3"] == 2
    assert recorder.refusals[OTHER_REASONS] == 980


def test_totals_sum_over_streams_and_days() -> None:
    report = DrainReport(
        target="crm",
        end="caught_up",
        tallies={("a", date(2025, 3, 1)): Tally(accepted=2, dead=1), ("b", date(2025, 3, 2)): Tally(accepted=3)},
        seconds=2.5,
    )

    assert report.total("accepted") == 5
    assert report.total("dead") == 1
    assert report.total("filtered") == 0
    assert report.records_per_second == 2.0


def test_a_drain_that_took_no_time_has_no_rate() -> None:
    assert DrainReport(target="crm", end="caught_up").records_per_second == 0


def test_a_report_travels_between_processes() -> None:
    report = DrainReport(target="crm", end="caught_up", tallies={("a", date(2025, 3, 1)): Tally(accepted=2)})

    assert pickle.loads(pickle.dumps(report)) == report


def test_quantiles_are_by_nearest_rank() -> None:
    sample = Sample()
    for value in [5, 1, 4, 2, 3]:
        sample.add(value)

    assert sample.quantile(0.5) == 3
    assert sample.quantile(0.95) == 5
    assert sample.quantile(0.2) == 1
    assert sample.quantile(0.0) == 1


def test_an_empty_sample_has_no_quantiles() -> None:
    assert Sample().quantile(0.5) is None


def test_a_sample_of_a_long_stream_is_fair_and_small() -> None:
    """Every part of the stream is drawn from, not its beginning or its end."""
    sample = Sample(size=500, seed=3)
    values = list(range(20_000))
    Random(1).shuffle(values)
    for value in values:
        sample.add(value)

    assert len(sample._kept) == 500
    assert sample.quantile(0.5) == pytest.approx(10_000, rel=0.15)
    assert sample.quantile(0.95) == pytest.approx(19_000, rel=0.05)


def test_each_number_of_a_stream_is_as_likely_to_be_in_its_sample() -> None:
    """The first, the last and those between: over many samples, each part of the stream has its share."""
    parts = [0] * 10
    for seed in range(200):
        sample = Sample(size=20, seed=seed)
        for value in range(1000):
            sample.add(value)
        for value in sample._kept:
            parts[int(value) // 100] += 1

    assert sum(parts) == 4000
    assert all(340 <= number <= 460 for number in parts)  # 400, give or take three standard deviations


@pytest.mark.parametrize("at_once", [1, 7, 100, 1000])
def test_many_numbers_at_once_are_sampled_as_one_by_one(at_once: int) -> None:
    one_by_one, together = Sample(size=20), Sample(size=20)
    for value in range(1000):
        one_by_one.add(value)
    for start in range(0, 1000, at_once):
        values = range(start, min(1000, start + at_once))
        together.add_many(len(values), values.__getitem__)

    assert together._kept == one_by_one._kept


def test_a_sample_no_larger_than_its_stream_is_the_stream() -> None:
    sample = Sample(size=3)
    for value in (3, 1, 2):
        sample.add(value)

    assert sorted(sample._kept) == [1, 2, 3]
