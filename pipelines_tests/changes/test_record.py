"""What a change says of itself."""

from datetime import UTC, datetime, timedelta, timezone

from pipelines.changes.record import ChangeRecord, instant_of, time_of

LEAP_DAY = datetime(2024, 2, 29, 12, 0, 0, 7, tzinfo=UTC)


def test_an_instant_is_a_time_to_the_microsecond_before_and_after_the_beginning() -> None:
    assert instant_of(datetime(2000, 1, 1, tzinfo=UTC)) == 0
    for time in (LEAP_DAY, datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)):
        assert time_of(instant_of(time)) == time


def test_it_is_the_same_instant_in_whatever_zone_the_time_is_told() -> None:
    in_berlin = LEAP_DAY.astimezone(timezone(timedelta(hours=1)))

    assert instant_of(in_berlin) == instant_of(LEAP_DAY)


def test_a_change_tells_its_time_in_utc() -> None:
    change = ChangeRecord(1, "people", "1", "insert", b"{}", instant_of(LEAP_DAY))

    assert change.changed_at == LEAP_DAY
    assert change.changed_at.tzinfo is UTC
