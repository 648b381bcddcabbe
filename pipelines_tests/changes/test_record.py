"""What a change says of itself."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from pipelines.changes.record import (
    ChangeColumns,
    ChangeRecord,
    change_ids,
    instant_of,
    keys,
    original_ids,
    payloads,
    picked,
    replays,
    time_of,
)

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


# --- column by column -------------------------------------------------------------------------------------------------

RECORDS = [
    ChangeRecord(number, "people", f"k{number}", "update", b'{"id": %d}' % number, number * 10, replays)
    for number, replays in ((3, None), (5, 2), (6, None), (9, None))
]
COLUMNS = ChangeColumns([list(column) for column in zip(*RECORDS, strict=True)])


def test_columns_are_a_sequence_of_the_records_that_they_hold() -> None:
    assert list(COLUMNS) == RECORDS
    assert [COLUMNS[place] for place in range(-4, 4)] == [RECORDS[place] for place in range(-4, 4)]
    assert (len(COLUMNS), bool(COLUMNS), RECORDS[1] in COLUMNS) == (4, True, True)
    assert isinstance(COLUMNS[0], ChangeRecord)
    with pytest.raises(IndexError):
        COLUMNS[4]


def test_columns_are_equal_to_the_same_changes_kept_however() -> None:
    assert COLUMNS == RECORDS
    assert RECORDS == COLUMNS
    assert COLUMNS[:] == COLUMNS
    assert RECORDS[1:] != COLUMNS
    assert COLUMNS != 1


@pytest.mark.parametrize("cut", [slice(1, 3), slice(None, None, 2), slice(2, 2), slice(-1, None), slice(0, 99)])
def test_a_part_of_columns_is_the_same_part_of_the_records(cut: slice) -> None:
    assert isinstance(COLUMNS[cut], ChangeColumns)
    assert list(COLUMNS[cut]) == RECORDS[cut]


def test_no_changes_are_none_in_columns_too() -> None:
    nothing = ChangeColumns([[] for _ in ChangeRecord._fields])

    assert not nothing
    assert list(nothing) == list(keys(nothing)) == list(original_ids(nothing)) == []


@pytest.mark.parametrize("changes", [RECORDS, COLUMNS])
def test_a_field_of_many_is_the_same_however_they_are_kept(changes: list[ChangeRecord] | ChangeColumns) -> None:
    assert list(change_ids(changes)) == [3, 5, 6, 9]
    assert list(keys(changes)) == ["k3", "k5", "k6", "k9"]
    assert payloads(changes)[1] == b'{"id": 5}'
    assert list(replays(changes)) == [None, 2, None, None]
    assert list(original_ids(changes)) == [3, 2, 6, 9]
    assert list(picked(changes, [3, 0])) == [RECORDS[3], RECORDS[0]]
    assert list(picked(changes, [])) == []
