"""The comparison must see every way in which a target can be wrong; a check that never fails proves nothing."""

from typing import Any

from demo.readback import compare, folded, out_of_order, repeated


def plane(tailnum: str, **fields: Any) -> dict[str, Any]:
    return {"tailnum": tailnum, **fields}


def event(id_: int, operation: str, row: dict[str, Any], stream: str = "planes") -> dict[str, Any]:
    return {"event_id": id_, "operation": operation, "stream": stream, "row": row}


def test_equal_records_make_no_difference() -> None:
    held = {("N1",): plane("N1", seats=3, year=None, engines={"count": 2})}
    assert compare("planes", held, dict(held)) == []


def test_a_missing_and_an_extra_record_are_each_named() -> None:
    assert compare("planes", {("N1",): plane("N1")}, {("N2",): plane("N2")}) == [
        "planes N1 is missing",
        "planes N2 should not be there",
    ]


def test_a_field_that_differs_is_named_with_both_values() -> None:
    found = compare("planes", {("N1",): plane("N1", seats=3)}, {("N1",): plane("N1", seats=4)})
    assert found == ["planes N1: seats is 4, should be 3"]


def test_a_field_that_is_not_there_is_not_the_same_as_null() -> None:
    found = compare("planes", {("N1",): plane("N1", year=None)}, {("N1",): plane("N1")})
    assert found == ["planes N1: year is not there, should be None"]


def test_a_field_that_should_have_stayed_at_home_shows() -> None:
    found = compare("planes", {("N1",): plane("N1")}, {("N1",): plane("N1", internal_note="x")})
    assert found == ["planes N1: internal_note is 'x', should be not there"]


def test_a_float_may_differ_in_its_last_bits_only() -> None:
    """Kinto's JSON reader turns the first of these into the second; the third is another number."""
    sent, stored, other = -124.76833333333333, -124.76833333333332, -124.7683333333

    def differences(value: float) -> list[str]:
        return compare("airports", {("X",): {"position": {"lon": sent}}}, {("X",): {"position": {"lon": value}}})

    assert differences(stored) == []
    assert len(differences(other)) == 1


def test_events_add_up_to_the_rows_that_they_tell_of() -> None:
    events = [
        event(1, "insert", plane("N1", seats=1)),
        event(2, "insert", plane("N2", seats=2)),
        event(3, "update", plane("N1", seats=5)),
        event(4, "delete", plane("N2", seats=2)),
        event(5, "insert", {"carrier": "ZZ"}, stream="airlines"),
    ]
    assert folded(events, "planes") == {("N1",): plane("N1", seats=5)}


def test_an_event_that_came_twice_is_named() -> None:
    assert repeated([event(1, "insert", plane("N1")), event(1, "insert", plane("N1"))]) == [(1, 2)]


def test_an_event_that_came_after_a_later_one_of_its_row_is_named() -> None:
    events = [event(3, "update", plane("N1")), event(1, "insert", plane("N2")), event(2, "insert", plane("N1"))]
    assert out_of_order(events) == ["event 2 came after event 3, both of planes N1"]
