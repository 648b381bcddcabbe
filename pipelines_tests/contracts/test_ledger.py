"""What every ledger does, the one in Postgres and the fake that stands in for it: one suite over both."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any
from uuid import uuid4

import pytest

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.ledger import (
    LONG_TAIL,
    Claim,
    LedgerConflict,
    PendingWindow,
    Settlement,
    TargetLedger,
    TargetState,
    Window,
)
from pipelines.delivery.outcome import DeadRecord
from pipelines_tests.contracts.ledgers import (
    DeadLetter,
    FakeSubject,
    PostgresSubject,
    Subject,
    Writer,
    claim_each,
    claim_of,
    comes_true,
    ids,
    left_over,
    read,
)
from pipelines_tests.fakes.ledger import LOG_ID


@pytest.fixture(params=["fake", "postgres"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        yield FakeSubject()
        return
    with ExitStack() as stack:
        yield PostgresSubject(request.getfixturevalue("database"), stack)


@pytest.fixture
def crm(subject: Subject) -> Iterator[TargetLedger]:
    """The open ledger of a target that began with the log."""
    subject.ledger.register({"crm": "beginning"})
    with subject.open("crm") as ledger:
        yield ledger


def counts(subject: Subject, target: str = "crm") -> dict[str, int]:
    """Return where every change is, without the zeros, having checked that none is missing or counted twice."""
    found = subject.ledger.conservation(target)
    assert found.holds, found
    names = ("captured", "accepted", "superseded", "filtered", "dead", "claimed", "pending")
    return {name: number for name in names if (number := getattr(found, name))}


def accept_all(ledger: TargetLedger) -> PendingWindow:
    """Claim and accept what is pending, as a drain does; return what was read."""
    window = read(ledger)
    batches = claim_each(ledger, window)
    ledger.settle([Settlement(batch_id=batch_id, accepted=[change]) for batch_id, change in batches.items()])
    return window


def close_gaps(subject: Subject, ledger: TargetLedger, *, up_to: int) -> None:
    """Read and claim until everything up to an id is settled in one range."""

    def closed() -> bool:
        accept_all(ledger)
        return subject.settled_ranges("crm")[:1] == [(0, up_to)]

    assert comes_true(closed), subject.settled_ranges("crm")


# --- registering ------------------------------------------------------------------------------------------------------


def test_a_target_from_the_beginning_is_owed_the_whole_log(subject: Subject) -> None:
    subject.append()
    subject.append()
    subject.ledger.register({"crm": "beginning"})

    assert counts(subject) == {"captured": 2, "pending": 2}


def test_a_target_from_now_is_owed_only_what_comes(subject: Subject) -> None:
    subject.append()
    subject.ledger.register({"crm": "now"})
    assert counts(subject) == {}

    later = subject.append()

    assert counts(subject) == {"captured": 1, "pending": 1}
    with subject.open("crm") as crm:
        assert ids(read(crm).records) == [later]


def test_a_target_from_now_begins_on_an_empty_log_too(subject: Subject) -> None:
    subject.ledger.register({"crm": "now"})
    subject.append()

    assert counts(subject) == {"captured": 1, "pending": 1}


def test_a_change_open_at_now_is_delivered_when_it_commits(subject: Subject) -> None:
    """Its id lies behind what is left out, but it was not there to be left out."""
    late = subject.begin()
    late_id = late.append("customers", "1")
    subject.append()
    subject.ledger.register({"crm": "now"})
    assert counts(subject) == {}

    late.commit()

    assert counts(subject) == {"captured": 1, "pending": 1}
    with subject.open("crm") as crm:
        assert ids(accept_all(crm).records) == [late_id]
        close_gaps(subject, crm, up_to=late_id + 1)


def test_a_target_from_a_snapshot_is_owed_its_rows_and_what_comes(subject: Subject) -> None:
    """As from now; and its streams are to be loaded, which is work though nothing is pending."""
    subject.append(key="before")
    subject.ledger.register({"crm": "snapshot"}, streams={"crm": ["customers"], "email": ["orders"]})
    with subject.open("crm") as crm:
        assert read(crm).records == []
        after = subject.append(key="after")
        assert ids(read(crm).records) == [after]
        accept_all(crm)
    assert owed(subject, "customers") == (True, False, False)
    assert counts(subject) == {"captured": 1, "accepted": 1}


def test_now_leaves_out_nothing_that_is_addressed_to_the_target(subject: Subject) -> None:
    """Whoever addressed it meant this target; and what is addressed elsewhere is not counted as left out."""
    subject.append()
    subject.append(target="email")
    mine = subject.append(target="crm")
    subject.ledger.register({"crm": "now"})

    assert counts(subject) == {"captured": 1, "pending": 1}
    with subject.open("crm") as crm:
        assert ids(read(crm).records) == [mine]


def test_registering_again_changes_nothing(subject: Subject, crm: TargetLedger) -> None:
    subject.append()
    accept_all(crm)
    subject.append()
    crm.hold(status="paused", reason="401", failed_runs=2, retry_in=None)

    subject.ledger.register({"crm": "now"})
    subject.ledger.register({"crm": "beginning", "email": "beginning"})

    assert counts(subject) == {"captured": 2, "accepted": 1, "pending": 1}
    assert as_left(crm) == TargetState(
        log_id=LOG_ID, target="crm", status="paused", reason="401", failed_runs=2, retry_at=None
    )
    assert counts(subject, "email") == {"captured": 2, "pending": 2}


def test_a_target_that_is_not_registered_is_named(subject: Subject) -> None:
    with pytest.raises(LookupError, match="'crm' is not registered"), subject.ledger.open_target("crm", run_id="run"):
        pass
    with pytest.raises(LookupError, match="'crm' is not registered"):
        subject.ledger.conservation("crm")


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_one_drain_at_a_time_has_a_target(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning", "email": "beginning"})

    with (
        subject.ledger.open_target("crm", run_id="first") as first,
        subject.ledger.open_target("crm", run_id="second") as second,
        subject.ledger.open_target("email", run_id="second") as other,
    ):
        assert first is not None
        assert second is None
        assert other is not None


def test_a_refused_drain_leaves_the_lock_where_it_is(subject: Subject, crm: TargetLedger) -> None:
    for _ in range(2):
        with subject.ledger.open_target("crm", run_id="late") as ledger:
            assert ledger is None
    assert crm.state().target == "crm"


def test_the_lock_is_free_as_soon_as_its_holder_leaves(subject: Subject) -> None:
    """Also if it leaves by an exception. At once: the next run must not find a target held by nobody."""
    subject.ledger.register({"crm": "beginning"})
    for _ in range(20):
        with suppress(ZeroDivisionError), subject.ledger.open_target("crm", run_id="run") as ledger:
            assert ledger is not None
            raise ZeroDivisionError


def test_who_has_left_cannot_write(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    subject.append()
    with subject.open("crm") as ledger:
        window = read(ledger)

    with pytest.raises(subject.lost):
        claim_each(ledger, window)
    assert counts(subject) == {"captured": 1, "pending": 1}


# --- pending ----------------------------------------------------------------------------------------------------------


def test_nothing_is_pending_in_an_empty_log(crm: TargetLedger) -> None:
    assert read(crm) == PendingWindow(records=[], complete=True, decided_up_to=None)


def test_a_record_is_read_as_it_was_written(subject: Subject, crm: TargetLedger) -> None:
    first = subject.append("orders", "ключ", operation="insert", payload='{"name": "Zoë"}'.encode())
    second = subject.append("orders", "ключ", operation="delete", payload=b"{}", replays=first)

    one, two = read(crm).records

    assert one[:5] == (first, "orders", "ключ", "insert", '{"name": "Zoë"}'.encode())
    assert one.replays is None
    assert abs(one.changed_at - subject.now()) < timedelta(minutes=1)
    assert (two.change_id, two.operation, two.replays) == (second, "delete", first)


def test_the_oldest_are_read_first_and_no_more_than_asked_for(subject: Subject, crm: TargetLedger) -> None:
    written = [subject.append(key=str(n)) for n in range(5)]

    window = read(crm, max_records=3)

    assert ids(window.records) == written[:3]
    assert not window.complete
    assert window.decided_up_to is None


def test_a_window_that_is_just_full_does_not_claim_to_be_complete(subject: Subject, crm: TargetLedger) -> None:
    for n in range(3):
        subject.append(key=str(n))

    assert not read(crm, max_records=3).complete
    assert read(crm, max_records=4).complete


def test_reading_changes_nothing(subject: Subject, crm: TargetLedger) -> None:
    subject.append()
    assert ids(read(crm).records) == ids(read(crm).records)
    assert counts(subject) == {"captured": 1, "pending": 1}


def test_a_window_ends_with_the_record_that_passes_its_bytes(subject: Subject, crm: TargetLedger) -> None:
    for n in range(5):
        subject.append(key=str(n), payload=b'{"text": "%s"}' % (b"x" * 1000))

    window = read(crm, max_bytes=2500)

    assert len(window.records) == 3
    assert not window.complete


def test_a_record_larger_than_the_window_is_read_alone(subject: Subject, crm: TargetLedger) -> None:
    """Else it would never be read, and nothing after it."""
    large = subject.append(payload=b'{"text": "%s"}' % (b"x" * 1000))
    subject.append()

    window = read(crm, max_bytes=1)

    assert ids(window.records) == [large]
    assert not window.complete


@pytest.mark.parametrize(("max_records", "max_bytes"), [(0, 1000), (-1, 1000), (1000, 0)])
def test_a_window_without_room_is_refused(
    subject: Subject, crm: TargetLedger, max_records: int, max_bytes: int
) -> None:
    """Nothing would be read, and that would look as if nothing were pending: the gaps would close over it."""
    subject.append()
    with pytest.raises(ValueError, match="room for at least one record"):
        crm.pending(max_records=max_records, max_bytes=max_bytes)


def test_a_record_addressed_to_one_target_is_pending_there_alone(subject: Subject, crm: TargetLedger) -> None:
    subject.ledger.register({"email": "beginning"})
    subject.append(target="email")
    mine = subject.append(target="crm")
    everyones = subject.append()

    assert ids(read(crm).records) == [mine, everyones]
    assert counts(subject) == {"captured": 2, "pending": 2}
    assert counts(subject, "email") == {"captured": 2, "pending": 2}


def test_what_is_open_or_rolled_back_is_not_pending(subject: Subject, crm: TargetLedger) -> None:
    writer = subject.begin()
    writer.append("customers", "1")
    subject.draw_and_roll_back()

    assert read(crm).records == []

    writer.rollback()
    assert read(crm).records == []


def test_a_late_commit_appears_behind_what_is_settled(subject: Subject, crm: TargetLedger) -> None:
    """A cursor would have passed it by."""
    late = subject.begin()
    late_id = late.append("customers", "late")
    early_id = subject.append(key="early")
    assert ids(accept_all(crm).records) == [early_id]

    late.commit()

    assert ids(accept_all(crm).records) == [late_id]
    assert counts(subject) == {"captured": 2, "accepted": 2}


# --- gaps -------------------------------------------------------------------------------------------------------------


def test_the_gap_of_a_rolled_back_id_closes(subject: Subject, crm: TargetLedger) -> None:
    subject.append()
    subject.draw_and_roll_back()
    last = subject.append()

    close_gaps(subject, crm, up_to=last)

    assert subject.settled_ranges("crm") == [(0, last)]
    assert counts(subject) == {"captured": 2, "accepted": 2}


def test_the_gap_of_a_record_addressed_elsewhere_closes(subject: Subject, crm: TargetLedger) -> None:
    subject.append()
    subject.append(target="email")
    last = subject.append()

    close_gaps(subject, crm, up_to=last)
    assert counts(subject) == {"captured": 2, "accepted": 2}


def test_a_rolled_back_id_at_the_end_of_the_log_closes_too(subject: Subject, crm: TargetLedger) -> None:
    subject.append()
    last = subject.draw_and_roll_back()

    close_gaps(subject, crm, up_to=last)


def test_an_open_transaction_keeps_its_gap_open(subject: Subject, crm: TargetLedger) -> None:
    """And what it commits in the end is delivered."""
    late = subject.begin()
    late_id = late.append("customers", "late")
    last = subject.append()
    for _ in range(5):
        assert accept_all(crm).decided_up_to is None

    late.commit()

    assert ids(accept_all(crm).records) == [late_id]
    close_gaps(subject, crm, up_to=last)
    assert counts(subject) == {"captured": 2, "accepted": 2}


def test_an_open_transaction_that_rolls_back_lets_its_gap_close(subject: Subject, crm: TargetLedger) -> None:
    late = subject.begin()
    late.append("customers", "late")
    last = subject.append()
    accept_all(crm)
    assert accept_all(crm).decided_up_to is None

    late.rollback()

    close_gaps(subject, crm, up_to=last)


def test_only_ids_up_to_the_fence_are_decided(subject: Subject, crm: TargetLedger) -> None:
    """A transaction that began after the fence may be open still, with an id after it."""
    first = subject.append()
    fenced = subject.draw_and_roll_back()
    accept_all(crm)
    accept_all(crm)  # both are settled or drawn by now, so a fence stands
    late = subject.begin()
    late_id = late.append("customers", "late")
    after = subject.append()

    close_gaps(subject, crm, up_to=fenced)

    assert subject.settled_ranges("crm")[-1] == (after, after)
    assert first < fenced < late_id < after
    late.commit()
    assert ids(accept_all(crm).records) == [late_id]
    close_gaps(subject, crm, up_to=after)
    assert counts(subject) == {"captured": 3, "accepted": 3}


def test_where_no_id_was_ever_drawn_none_is_decided(subject: Subject, crm: TargetLedger) -> None:
    """A new sequence shows the id that it will give first as its last value."""
    for _ in range(3):
        assert read(crm).decided_up_to is None
    writer = subject.begin()
    first_id = writer.append("customers", "1")
    for _ in range(3):
        assert accept_all(crm).decided_up_to is None

    writer.commit()

    assert ids(accept_all(crm).records) == [first_id]


def test_a_record_in_the_window_that_closes_the_gaps_is_not_closed_over(subject: Subject, crm: TargetLedger) -> None:
    """It was open at the fence, has committed since, and is read together with the decision."""
    late = subject.begin()
    late_id = late.append("customers", "late")
    last = subject.append()
    accept_all(crm)
    accept_all(crm)
    late.commit()
    assert comes_true(lambda: read(crm).decided_up_to == last)

    window = read(crm)
    assert ids(window.records) == [late_id]
    assert window.decided_up_to == last
    batches = claim_each(crm, window)

    assert counts(subject) == {"captured": 2, "accepted": 1, "claimed": 1}
    assert subject.settled_ranges("crm") == [(0, late_id - 1), (last, last)]
    crm.settle([Settlement(batch_id=batch_id, accepted=[change]) for batch_id, change in batches.items()])
    assert subject.settled_ranges("crm") == [(0, last)]


def test_what_is_claimed_stays_claimed_when_the_gaps_close(subject: Subject, crm: TargetLedger) -> None:
    subject.draw_and_roll_back()
    held_id = subject.append()
    held = claim_each(crm, read(crm))
    last = subject.append()

    def closed() -> bool:
        accept_all(crm)
        return subject.settled_ranges("crm") == [(0, held_id - 1), (last, last)]

    assert comes_true(closed)
    assert subject.claimed_ids("crm") == {held_id}
    crm.settle([Settlement(batch_id=batch_id, accepted=[change]) for batch_id, change in held.items()])
    assert counts(subject) == {"captured": 2, "accepted": 2}


def test_a_window_that_left_something_out_decides_nothing(subject: Subject, crm: TargetLedger) -> None:
    subject.draw_and_roll_back()
    for n in range(3):
        subject.append(key=str(n), payload=b'{"text": "%s"}' % (b"x" * 1000))
    assert comes_true(lambda: read(crm).decided_up_to is not None)

    assert read(crm, max_records=2).decided_up_to is None
    assert read(crm, max_records=3).decided_up_to is None
    assert read(crm, max_bytes=1500).decided_up_to is None


def test_a_fence_outlives_the_drain_that_took_it(subject: Subject) -> None:
    """The next drain closes by it what it stands for, and nothing that was open then."""
    subject.ledger.register({"crm": "beginning"})
    late = subject.begin()
    late_id = late.append("customers", "late")
    rolled_back = subject.draw_and_roll_back()
    with subject.open("crm") as first:
        accept_all(first)
    beyond = subject.append()
    with subject.open("crm") as second:
        accept_all(second)
        assert subject.settled_ranges("crm") == [(beyond, beyond)]
        late.commit()
        assert comes_true(lambda: read(second).decided_up_to == rolled_back)
        assert ids(accept_all(second).records) == [late_id]
        assert subject.settled_ranges("crm") == [(0, beyond)]
    assert counts(subject) == {"captured": 2, "accepted": 2}


def test_gaps_close_even_if_nothing_is_pending(subject: Subject, crm: TargetLedger) -> None:
    last = subject.draw_and_roll_back()
    assert comes_true(lambda: read(crm).decided_up_to == last)

    window = read(crm)
    assert window.records == []
    assert crm.claim(Window(decided_up_to=window.decided_up_to)) == []
    assert subject.settled_ranges("crm") == [(0, last)]


# --- claims -----------------------------------------------------------------------------------------------------------


def test_every_change_is_in_one_place_at_every_step(subject: Subject, crm: TargetLedger) -> None:
    for n in range(7):
        subject.append(key=str(n))
    assert counts(subject) == {"captured": 7, "pending": 7}

    one, two, three, four, five, six, seven = read(crm).records
    first, second = crm.claim(
        Window(
            claims=[claim_of(one, two), claim_of(three, four)],
            superseded=[five],
            filtered=[six],
            dead=[DeadRecord(change=seven, reason="cannot be rendered", attempts=0)],
        )
    )
    assert counts(subject) == {"captured": 7, "superseded": 1, "filtered": 1, "dead": 1, "claimed": 4}
    assert read(crm).records == []

    crm.settle([Settlement(batch_id=first, accepted=[one], attempts=1)])
    assert counts(subject) == {"captured": 7, "accepted": 1, "superseded": 1, "filtered": 1, "dead": 1, "claimed": 3}

    crm.settle(
        [
            Settlement(batch_id=first, filtered=[two], attempts=1),
            Settlement(batch_id=second, accepted=[three], dead=[DeadRecord(change=four, reason="422")], attempts=1),
        ]
    )
    assert counts(subject) == {"captured": 7, "accepted": 2, "superseded": 1, "filtered": 2, "dead": 2}
    assert [(row.state, row.accepted, row.dead, row.attempts) for row in subject.batches()] == [
        ("settled", 1, 0, 2),
        ("settled", 1, 1, 1),
    ]


def test_batch_ids_come_in_the_order_of_the_claims(subject: Subject, crm: TargetLedger) -> None:
    for n in range(30):
        subject.append(key=str(n))
    claims = [claim_of(change, lane=change.change_id % 4) for change in read(crm).records]

    batch_ids = crm.claim(Window(claims=claims))

    rows = {row.batch_id: row for row in subject.batches()}
    assert [rows[batch_id].change_ids for batch_id in batch_ids] == [(c.changes[0].change_id,) for c in claims]
    assert [rows[batch_id].lane for batch_id in batch_ids] == [c.lane for c in claims]
    assert list(batch_ids) == sorted(batch_ids)


def test_an_empty_window_claims_nothing(subject: Subject, crm: TargetLedger) -> None:
    assert crm.claim(Window()) == []
    crm.settle([])
    assert counts(subject) == {}


def test_the_last_answer_of_a_batch_is_kept(subject: Subject, crm: TargetLedger) -> None:
    subject.append()
    ((batch_id, change),) = claim_each(crm, read(crm)).items()

    crm.settle([Settlement(batch_id=batch_id, attempts=3, status=503, seconds=0.5, error="503")])
    crm.settle([Settlement(batch_id=batch_id, accepted=[change], attempts=1, status=200, seconds=0.25)])

    (row,) = subject.batches()
    assert (row.state, row.attempts, row.status, row.error) == ("settled", 4, 200, "503")


def test_what_each_of_many_batches_was_told_is_kept(subject: Subject, crm: TargetLedger) -> None:
    """One was accepted, one failed in odd words, one was not even sent; written down at once."""
    for key in "abcd":
        subject.append(key=key)
    one, two, three, four = read(crm).records
    claims = [claim_of(one), claim_of(two, three), claim_of(four)]
    filtered, unanswered, accepted = crm.claim(Window(claims=claims))

    crm.settle(
        [
            Settlement(batch_id=accepted, accepted=[four], attempts=2, status=200, seconds=0.25),
            Settlement(batch_id=unanswered, set_aside=True, attempts=3, error='a "b", {c}\\ \u2603\n'),
            Settlement(batch_id=filtered, filtered=[one]),
        ]
    )

    told = {row.batch_id: (row.state, row.accepted, row.attempts, row.status, row.error) for row in subject.batches()}
    assert told == {
        filtered: ("settled", 0, 0, None, None),
        unanswered: ("claimed", 0, 3, None, 'a "b", {c}\\ \u2603\n'),
        accepted: ("settled", 1, 2, 200, None),
    }
    assert [leftover.set_aside for leftover in left_over(crm)] == [1]


# --- leftovers --------------------------------------------------------------------------------------------------------


def test_leftovers_are_what_was_claimed_as_it_was_claimed(subject: Subject) -> None:
    """The same members in the same order, batch by batch, so that bytes and keys come out the same."""
    subject.ledger.register({"crm": "beginning", "email": "beginning"})
    for n in range(5):
        subject.append(key=str(n), payload=b'{"n": %d}' % n)
    with subject.open("crm") as crashed:
        one, two, three, four, five = read(crashed).records
        batch_ids = crashed.claim(
            Window(claims=[claim_of(three, one, lane=2), claim_of(two, lane=1), claim_of(five, four, lane=2)])
        )
    with subject.open("email") as other:
        assert left_over(other) == []

    with subject.open("crm") as crm:
        leftovers = left_over(crm)

        assert [leftover.batch_id for leftover in leftovers] == list(batch_ids)
        assert [list(leftover.changes) for leftover in leftovers] == [[three, one], [two], [five, four]]
        assert [leftover.lane for leftover in leftovers] == [2, 1, 2]
        assert {(leftover.stream, leftover.operation) for leftover in leftovers} == {("customers", "upsert")}
        assert read(crm).records == []


def test_leftovers_have_the_stream_the_operation_and_the_key_of_their_claims(subject: Subject) -> None:
    """Each its own, of many in one window, and whatever a table is called."""
    subject.ledger.register({"crm": "beginning"})
    written = [
        (stream, operation, uuid4())
        for operation in ("upsert", "delete", "insert")
        for stream in ("customers", 'a,"b"\\{c}', "null", "\N{SNOWMAN}'s", "customers")
    ]
    for stream, _, _ in written:
        subject.append(stream)
    with subject.open("crm") as crashed:
        changes = read(crashed).records
        crashed.claim(
            Window(
                claims=[
                    Claim(lane=0, stream=stream, operation=operation, changes=[change], idempotency_key=key)
                    for change, (stream, operation, key) in zip(changes, written, strict=True)
                ]
            )
        )

    with subject.open("crm") as crm:
        found = left_over(crm)

    assert [(left.stream, left.operation, left.idempotency_key) for left in found] == written


def test_what_is_told_of_a_batch_in_parts_adds_up_though_it_is_written_at_once(
    subject: Subject, crm: TargetLedger
) -> None:
    for key in "abc":
        subject.append(key=key)
    one, two, three = read(crm).records
    (batch_id,) = crm.claim(Window(claims=[claim_of(one, two, three)]))

    crm.settle(
        [
            Settlement(batch_id=batch_id, accepted=[one], attempts=1, status=207, error="one of them"),
            Settlement(batch_id=batch_id, dead=[DeadRecord(change=two, reason="422")], attempts=2, status=422),
            Settlement(batch_id=batch_id, filtered=[three], attempts=3),
        ]
    )

    (row,) = subject.batches()
    assert (row.state, row.accepted, row.dead, row.attempts) == ("settled", 1, 1, 6)
    assert (row.status, row.error) == (422, "one of them")


def test_of_a_partly_settled_batch_the_rest_is_left_over(subject: Subject, crm: TargetLedger) -> None:
    for n in range(4):
        subject.append(key=str(n))
    one, two, three, four = read(crm).records
    first, second = crm.claim(Window(claims=[claim_of(four, three, one), claim_of(two)]))
    crm.settle([Settlement(batch_id=first, accepted=[three]), Settlement(batch_id=second, accepted=[two])])

    (leftover,) = left_over(crm)

    assert leftover.batch_id == first
    assert list(leftover.changes) == [four, one]
    crm.settle([Settlement(batch_id=first, accepted=[one], dead=[DeadRecord(change=four, reason="422")])])
    assert left_over(crm) == []
    assert counts(subject) == {"captured": 4, "accepted": 3, "dead": 1}


def test_a_batch_is_left_over_as_long_as_a_member_is_claimed(subject: Subject, crm: TargetLedger) -> None:
    """A claimed change that no leftover names would never be sent again."""
    subject.append()
    subject.append()
    one, two = read(crm).records
    (batch_id,) = crm.claim(Window(claims=[claim_of(one, two)]))

    crm.settle([Settlement(batch_id=batch_id, accepted=[one])])

    assert [list(leftover.changes) for leftover in left_over(crm)] == [[two]]


def parts_of(ledger: TargetLedger, *, max_records: int = 1000, max_bytes: int = 1_000_000) -> list[list[list[int]]]:
    """Return the leftovers' members by part and batch."""
    parts = ledger.leftovers(max_records=max_records, max_bytes=max_bytes)
    return [[ids(left.changes) for left in part] for part in parts]


def test_leftovers_are_read_a_part_at_a_time(subject: Subject, crm: TargetLedger) -> None:
    """As many whole batches as there is room for, but one at least."""
    for n in range(8):
        subject.append(key=str(n))
    one, two, three, four, five, six, seven, eight = read(crm).records
    crm.claim(
        Window(
            claims=[claim_of(one, two), claim_of(three), claim_of(four, five, six), claim_of(seven), claim_of(eight)]
        )
    )

    assert parts_of(crm, max_records=8) == [[[1, 2], [3], [4, 5, 6], [7], [8]]]
    assert parts_of(crm, max_records=4) == [[[1, 2], [3]], [[4, 5, 6], [7]], [[8]]]
    assert parts_of(crm, max_records=2) == [[[1, 2]], [[3]], [[4, 5, 6]], [[7], [8]]]
    assert parts_of(crm, max_records=1) == [[[1, 2]], [[3]], [[4, 5, 6]], [[7]], [[8]]]


def test_large_leftovers_come_fewer_at_a_time(subject: Subject, crm: TargetLedger) -> None:
    text = "".join(map(chr, Random(1).choices(range(97, 123), k=1500)))
    for n in range(4):
        subject.append(key=str(n), payload=b'{"text": "%s"}' % text.encode())
    crm.claim(Window(claims=[claim_of(one) for one in read(crm).records]))

    assert parts_of(crm, max_bytes=1) == [[[1]], [[2]], [[3]], [[4]]]
    assert parts_of(crm, max_bytes=4000) == [[[1], [2]], [[3], [4]]]
    assert parts_of(crm, max_bytes=100_000) == [[[1], [2], [3], [4]]]


def test_what_is_written_down_of_a_part_does_not_come_again_with_the_next(subject: Subject, crm: TargetLedger) -> None:
    for n in range(6):
        subject.append(key=str(n))
    one, two, three, four, five, six = read(crm).records
    first, second, third = crm.claim(Window(claims=[claim_of(one, two), claim_of(three, four), claim_of(five, six)]))
    parts = crm.leftovers(max_records=2, max_bytes=1_000_000)

    assert [left.batch_id for left in next(parts)] == [first]
    crm.split(first, [claim_of(one), claim_of(two)])
    assert [left.batch_id for left in next(parts)] == [second]
    crm.settle([Settlement(batch_id=second, accepted=[three, four])])
    assert [left.batch_id for left in next(parts)] == [third]
    assert list(parts) == []
    assert parts_of(crm) == [[[1], [2], [5, 6]]]


# --- what comes next --------------------------------------------------------------------------------------------------


def test_what_a_target_is_sent_next_can_be_looked_at_beside_its_drain(subject: Subject, crm: TargetLedger) -> None:
    """What is claimed, then what is pending, then what is dead and may block it; and nothing changes by that."""
    for key in ("a", "b", "a", "c"):
        subject.append(key=key)
    one, two, three, four = read(crm).records
    (first, _) = crm.claim(Window(claims=[claim_of(one), claim_of(two)]))
    crm.settle([Settlement(batch_id=first, dead=[refused_as(one)])])
    before = (subject.batches(), counts(subject), crm.state())

    seen = subject.ledger.upcoming("crm", max_records=10, max_bytes=1_000_000)

    assert [[change.change_id for change in left.changes] for left in seen.leftovers] == [ids([two])]
    assert list(seen.pending) == [three, four]
    assert seen.blocked == {("customers", "a"): one.change_id}
    assert (seen.more, seen.log_id) == (False, crm.state().log_id)
    assert (subject.batches(), counts(subject), crm.state()) == before


def test_no_more_is_looked_at_than_was_asked_for(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    for n in range(4):
        subject.append(key=str(n))

    seen = subject.ledger.upcoming("crm", max_records=3, max_bytes=1_000_000)

    assert (ids(seen.pending), seen.more) == ([1, 2, 3], True)


def test_of_a_target_that_is_not_registered_nothing_comes_next(subject: Subject) -> None:
    subject.append()

    seen = subject.ledger.upcoming("nobody", max_records=3, max_bytes=1_000_000)

    assert (seen.leftovers, seen.pending, seen.more) == ([], [], False)


# --- splitting --------------------------------------------------------------------------------------------------------


def split_of(subject: Subject, crm: TargetLedger, *sizes: int) -> tuple[Sequence[ChangeRecord], int, Sequence[int]]:
    """Claim a batch, split it into parts of *sizes*, and return its members, its id and theirs."""
    for n in range(sum(sizes)):
        subject.append(key=str(n))
    members = read(crm).records
    (whole,) = crm.claim(Window(claims=[claim_of(*members)]))
    parts, at = [], 0
    for size in sizes:
        parts.append(claim_of(*members[at : at + size]))
        at += size
    return members, whole, crm.split(whole, parts)


def test_the_parts_of_a_batch_are_left_over_in_its_place(subject: Subject, crm: TargetLedger) -> None:
    """Before a batch that was claimed later, and in the order of their members, however often they were split."""
    members, _, (first, second) = split_of(subject, crm, 4, 2)
    subject.append(key="later")
    (later,) = crm.claim(Window(claims=[claim_of(*read(crm).records)]))
    third, fourth = crm.split(first, [claim_of(*members[:2]), claim_of(*members[2:4])])

    assert [(left.batch_id, ids(left.changes)) for left in left_over(crm)][:3] == [
        (third, ids(members[:2])),
        (fourth, ids(members[2:4])),
        (second, ids(members[4:])),
    ]
    assert [left.batch_id for left in left_over(crm)][3:] == [later]
    assert counts(subject) == {"captured": 7, "claimed": 7}


def test_a_part_is_settled_like_any_batch(subject: Subject, crm: TargetLedger) -> None:
    members, whole, (first, second) = split_of(subject, crm, 1, 2)

    crm.settle([Settlement(batch_id=first, accepted=members[:1], attempts=1, status=200)])
    crm.settle([Settlement(batch_id=second, dead=[refused_as(one) for one in members[1:]], attempts=2, status=400)])

    assert left_over(crm) == []
    assert [(row.batch_id, row.state, row.attempts) for row in subject.batches()] == [
        (whole, "split", 0),
        (first, "settled", 1),
        (second, "settled", 2),
    ]
    assert counts(subject) == {"captured": 3, "accepted": 1, "dead": 2}


def test_only_what_is_still_claimed_of_a_batch_is_split(subject: Subject, crm: TargetLedger) -> None:
    for n in range(3):
        subject.append(key=str(n))
    one, two, three = read(crm).records
    (whole,) = crm.claim(Window(claims=[claim_of(one, two, three)]))
    crm.settle([Settlement(batch_id=whole, accepted=[two])])

    first, second = crm.split(whole, [claim_of(one), claim_of(three)])

    assert [(left.batch_id, ids(left.changes)) for left in left_over(crm)] == [
        (first, ids([one])),
        (second, ids([three])),
    ]


@pytest.mark.parametrize(
    "mistake", ["too little", "too much", "twice", "settled", "split already", "another's", "none"]
)
def test_parts_that_are_not_the_whole_write_nothing(subject: Subject, crm: TargetLedger, mistake: str) -> None:
    """What is in no batch would never be sent again; what is in two, twice."""
    subject.ledger.register({"email": "beginning"})
    for n in range(4):
        subject.append(key=str(n))
    one, two, three, other = read(crm).records
    whole, _ = crm.claim(Window(claims=[claim_of(one, two, three), claim_of(other)]))
    crm.settle([Settlement(batch_id=whole, accepted=[three])])
    parts = {
        "too little": [claim_of(one)],
        "too much": [claim_of(one), claim_of(two), claim_of(other)],
        "twice": [claim_of(one, two), claim_of(two)],
        "settled": [claim_of(one, two), claim_of(three)],
        "none": [],
    }.get(mistake, [claim_of(one), claim_of(two)])
    if mistake == "split already":
        crm.split(whole, parts)
    before = (subject.batches(), subject.claimed_ids("crm"))

    if mistake == "another's":
        with subject.open("email") as email, pytest.raises(LedgerConflict):
            email.split(whole, parts)
    else:
        with pytest.raises(LedgerConflict):
            crm.split(whole, parts)

    assert (subject.batches(), subject.claimed_ids("crm")) == before


# --- conflicts --------------------------------------------------------------------------------------------------------


def conflicting(subject: Subject, crm: TargetLedger) -> tuple[ChangeRecord, ChangeRecord, ChangeRecord, int]:
    """Return a settled, a claimed and a pending change, and the batch that is out."""
    for n in range(3):
        subject.append(key=str(n))
    settled, claimed, pending = read(crm).records
    done, out = crm.claim(Window(claims=[claim_of(settled), claim_of(claimed)]))
    crm.settle([Settlement(batch_id=done, accepted=[settled], attempts=1)])
    return settled, claimed, pending, out


def test_settling_what_is_not_claimed_writes_nothing(subject: Subject, crm: TargetLedger) -> None:
    settled, claimed, pending, out = conflicting(subject, crm)
    before = (counts(subject), subject.batches(), subject.dead_letters())

    for stranger in (settled, pending):
        for settlement in (
            Settlement(batch_id=out, accepted=[claimed, stranger], attempts=1),
            Settlement(batch_id=out, accepted=[claimed], filtered=[stranger], attempts=1),
            Settlement(batch_id=out, accepted=[claimed], dead=[DeadRecord(change=stranger, reason="422")], attempts=1),
        ):
            with pytest.raises(LedgerConflict, match="crm"):
                crm.settle([settlement])

    assert (counts(subject), subject.batches(), subject.dead_letters()) == before
    crm.settle([Settlement(batch_id=out, accepted=[claimed], attempts=1)])
    assert counts(subject) == {"captured": 3, "accepted": 2, "pending": 1}


def test_claiming_what_is_not_pending_writes_nothing(subject: Subject, crm: TargetLedger) -> None:
    settled, claimed, pending, _ = conflicting(subject, crm)
    before = (counts(subject), subject.batches(), subject.dead_letters())
    dead = [DeadRecord(change=pending, reason="cannot be rendered", attempts=0)]

    for stranger in (settled, claimed):
        for window in (
            Window(claims=[claim_of(stranger)], decided_up_to=3),
            Window(claims=[claim_of(pending), claim_of(stranger)]),
            Window(claims=[claim_of(pending)], filtered=[stranger]),
            Window(claims=[claim_of(stranger)], dead=dead, decided_up_to=3),
            Window(superseded=[stranger], dead=dead, decided_up_to=3),
            Window(filtered=[stranger], dead=dead),
        ):
            with pytest.raises(LedgerConflict, match="crm"):
                crm.claim(window)

    assert (counts(subject), subject.batches(), subject.dead_letters()) == before
    assert ids(read(crm).records) == [pending.change_id]


def test_a_change_named_twice_is_a_conflict(subject: Subject, crm: TargetLedger) -> None:
    """Counted twice, it would hide one that is missing."""
    _, claimed, pending, out = conflicting(subject, crm)
    before = (counts(subject), subject.batches(), subject.dead_letters())

    with pytest.raises(LedgerConflict, match="twice"):
        crm.claim(Window(claims=[claim_of(pending), claim_of(pending)]))
    with pytest.raises(LedgerConflict, match="twice"):
        crm.claim(Window(claims=[claim_of(pending)], superseded=[pending]))
    with pytest.raises(LedgerConflict, match="twice"):
        crm.settle([Settlement(batch_id=out, accepted=[claimed], dead=[DeadRecord(change=claimed, reason="422")])])

    assert (counts(subject), subject.batches(), subject.dead_letters()) == before


def test_batches_that_lie_in_one_another_settle_at_once_and_no_change_twice(
    subject: Subject, crm: TargetLedger
) -> None:
    """As those of two streams that are written by turns."""
    for n in range(9):
        subject.append(key=str(n))
    changes = read(crm).records
    evens, odds, last = changes[0:8:2], changes[1:8:2], changes[8:]
    first, second, third = crm.claim(Window(claims=[claim_of(*evens), claim_of(*odds), claim_of(*last)]))
    before = (counts(subject), subject.batches())

    for twice in ([*odds[:3], evens[3]], [*odds[:3], odds[0]], [*odds, last[0]]):
        with pytest.raises(LedgerConflict, match="twice"):
            crm.settle(
                [
                    Settlement(batch_id=second, accepted=twice),
                    Settlement(batch_id=third, accepted=last),
                    Settlement(batch_id=first, accepted=evens),
                ]
            )
    with pytest.raises(LedgerConflict, match="twice"):  # as many as from the first of them to the last
        crm.settle([Settlement(batch_id=first, accepted=[changes[n] for n in (0, 1, 1, 3)])])
    assert (counts(subject), subject.batches()) == before

    crm.settle(
        [
            Settlement(batch_id=second, accepted=odds[1:]),
            Settlement(batch_id=third, accepted=last),
            Settlement(batch_id=first, accepted=evens),
        ]
    )
    assert counts(subject) == {"captured": 9, "accepted": 8, "claimed": 1}
    assert subject.claimed_ids("crm") == {odds[0].change_id}
    assert [row.state for row in subject.batches()] == ["settled", "claimed", "settled"]


def test_targets_do_not_settle_for_each_other(subject: Subject, crm: TargetLedger) -> None:
    subject.ledger.register({"email": "beginning"})
    subject.append()
    ((batch_id, change),) = claim_each(crm, read(crm)).items()

    with subject.open("email") as email, pytest.raises(LedgerConflict, match="email"):
        email.settle([Settlement(batch_id=batch_id, accepted=[change])])

    assert counts(subject) == {"captured": 1, "claimed": 1}
    assert counts(subject, "email") == {"captured": 1, "pending": 1}


# --- dead letters -----------------------------------------------------------------------------------------------------


def test_dead_letters_say_what_was_refused_and_why(subject: Subject, crm: TargetLedger) -> None:
    subject.append(key="a")
    subject.append(key="b")
    one, two = read(crm).records
    (batch_id,) = crm.claim(
        Window(claims=[claim_of(one)], dead=[DeadRecord(change=two, reason="no column 'email'", attempts=0)])
    )
    crm.settle(
        [Settlement(batch_id=batch_id, dead=[DeadRecord(change=one, reason="answered 422", status=422, response="no")])]
    )

    assert sorted(subject.dead_letters(), key=lambda letter: letter.key) == [
        DeadLetter("crm", one.change_id, "customers", "a", "answered 422", 422, 1),
        DeadLetter("crm", two.change_id, "customers", "b", "no column 'email'", None, 0),
    ]
    assert counts(subject) == {"captured": 2, "dead": 2}


def refused_as(change: ChangeRecord, **more: Any) -> DeadRecord:
    return DeadRecord(change=change, reason="answered 422", **more)


def test_a_key_is_blocked_by_its_first_open_dead_letter(subject: Subject, crm: TargetLedger) -> None:
    """Only here, only that key of that stream."""
    subject.ledger.register({"email": "beginning"})
    for stream, key in [("customers", "a"), ("customers", "b"), ("customers", "a"), ("orders", "a")]:
        subject.append(stream, key)
    one, two, three, four = read(crm).records
    batch_id, _ = crm.claim(Window(claims=[claim_of(one, three), claim_of(two, four)], dead=[]))
    crm.settle([Settlement(batch_id=batch_id, dead=[refused_as(one), refused_as(three, blocked_by=one.change_id)])])

    asked = [("customers", "a"), ("customers", "b"), ("orders", "a")]
    assert crm.blocked(asked) == {("customers", "a"): one.change_id}
    assert crm.blocked([("customers", "b")]) == {}
    assert crm.blocked([]) == {}
    with subject.open("email") as email:
        assert email.blocked(asked) == {}
    assert subject.blocks() == {one.change_id: None, three.change_id: one.change_id}


def test_a_newer_accepted_state_closes_the_dead_letters_of_its_key(subject: Subject, crm: TargetLedger) -> None:
    """Where it is to: and none of another key, another stream, or a later change."""
    for stream, key in [
        ("customers", "a"),
        ("customers", "b"),
        ("orders", "a"),
        ("customers", "a"),
        ("customers", "a"),
    ]:
        subject.append(stream, key)
    one, two, three, four, five = read(crm).records
    dead_id, batch_id, last_id = crm.claim(
        Window(claims=[claim_of(one, two), claim_of(three), claim_of(four, five)], dead=[])
    )
    crm.settle([Settlement(batch_id=dead_id, dead=[refused_as(one), refused_as(two)])])
    crm.settle([Settlement(batch_id=batch_id, dead=[refused_as(three)])])
    before = set(subject.blocks())

    crm.settle([Settlement(batch_id=last_id, accepted=[four], dead=[refused_as(five)], supersedes=True)])

    assert before == {one.change_id, two.change_id, three.change_id}
    assert set(subject.blocks()) == {two.change_id, three.change_id, five.change_id}
    assert counts(subject) == {"captured": 5, "accepted": 1, "dead": 4}


def test_without_being_told_to_an_accepted_state_closes_nothing(subject: Subject, crm: TargetLedger) -> None:
    subject.append(key="a")
    subject.append(key="a")
    one, two = read(crm).records
    (batch_id,) = crm.claim(Window(claims=[claim_of(one, two)]))

    crm.settle([Settlement(batch_id=batch_id, accepted=[two], dead=[refused_as(one)])])

    assert set(subject.blocks()) == {one.change_id}


# --- holding and what is owed -----------------------------------------------------------------------------------------


def as_left(ledger: TargetLedger) -> TargetState:
    return replace(ledger.state(), log_id=LOG_ID)


def test_every_target_of_a_log_knows_which_log_it_is(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning", "email": "beginning"})
    with subject.open("crm") as crm, subject.open("email") as email:
        here = crm.state().log_id
        assert email.state().log_id == here
    with subject.open("crm") as again:
        assert again.state().log_id == here


def test_a_hold_is_remembered_until_the_target_resumes(subject: Subject) -> None:
    """From the ledger's own clock on."""
    subject.ledger.register({"crm": "beginning"})
    before = subject.now()
    with subject.open("crm") as first:
        assert as_left(first) == TargetState(log_id=LOG_ID, target="crm")
        first.hold(status="active", reason="answered 503", failed_runs=2, retry_in=3600)
    with subject.open("crm") as second:
        state = as_left(second)
        assert state.retry_at is not None
        assert timedelta(hours=1) - timedelta(seconds=1) <= state.retry_at - before < timedelta(hours=1, minutes=1)
        assert replace(state, retry_at=None) == TargetState(
            log_id=LOG_ID, target="crm", status="active", reason="answered 503", failed_runs=2
        )
        second.resume()
        assert as_left(second) == TargetState(log_id=LOG_ID, target="crm")


def owed(subject: Subject, *streams: str) -> tuple[bool, bool, bool]:
    (found,) = subject.ledger.owed({"crm": streams})
    assert found.target == "crm"
    return found.has_work, found.held, found.waiting


def test_a_long_tail_of_what_is_not_for_a_target_is_work_and_a_short_one_is_not(subject: Subject) -> None:
    """Else each look would pass over it again, and the log would make every tick longer."""
    subject.ledger.register({"crm": "beginning"})
    for _ in range(LONG_TAIL - 1):
        subject.append(stream="orders")
    assert owed(subject, "customers")[0] is False

    subject.append(stream="customers", target="email")

    assert owed(subject, "customers")[0] is True


def test_a_target_has_work_while_a_routed_change_is_pending_or_claimed(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    assert owed(subject, "customers") == (False, False, False)

    subject.append("customers")
    assert owed(subject, "customers") == (True, False, False)
    assert owed(subject, "orders", "customers") == (True, False, False)
    assert owed(subject, "orders") == (False, False, False)
    assert owed(subject) == (False, False, False)

    with subject.open("crm") as crm:
        batches = claim_each(crm, read(crm))
    # What is claimed must be sent or given up, whatever is routed by now.
    assert owed(subject, "orders") == (True, False, False)

    with subject.open("crm") as crm:
        crm.settle([Settlement(batch_id=batch_id, accepted=[change]) for batch_id, change in batches.items()])
    assert owed(subject, "customers") == (False, False, False)


def test_a_late_commit_is_owed_though_later_ids_are_settled(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    late = subject.begin()
    late.append("customers", "late")
    subject.append()
    with subject.open("crm") as crm:
        accept_all(crm)
    assert owed(subject, "customers") == (False, False, False)

    late.commit()

    assert owed(subject, "customers") == (True, False, False)


def test_what_is_addressed_elsewhere_is_not_owed(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    subject.append(target="email")
    assert owed(subject, "customers") == (False, False, False)

    subject.append(target="crm")
    assert owed(subject, "customers") == (True, False, False)


def test_a_target_is_held_while_a_drain_has_its_lock(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning", "email": "beginning"})
    with subject.ledger.open_target("crm", run_id="run"):
        assert [(found.target, found.held) for found in subject.ledger.owed({"email": [], "crm": []})] == [
            ("crm", True),
            ("email", False),
        ]
    assert owed(subject) == (False, False, False)


def test_only_registered_targets_that_are_asked_for_are_answered(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning", "email": "beginning"})
    assert [found.target for found in subject.ledger.owed({"crm": [], "unknown": []})] == ["crm"]
    assert subject.ledger.owed({}) == []


@pytest.mark.parametrize(
    ("status", "hours", "waiting"),
    [
        ("active", 1, True),
        ("active", -1, False),
        ("active", None, False),
        ("paused", 1, True),
        ("paused", -1, False),
        ("paused", None, True),
    ],
)
def test_a_target_waits_until_it_may_be_tried(subject: Subject, status: str, hours: int | None, waiting: bool) -> None:
    """A pause without a time waits for a person."""
    subject.ledger.register({"crm": "beginning"})
    subject.append()
    with subject.open("crm") as crm:
        crm.hold(status=status, reason="why", failed_runs=1, retry_in=None if hours is None else hours * 3600)

    (found,) = subject.ledger.owed({"crm": ["customers"]})

    assert (found.has_work, found.status, found.reason, found.waiting) == (True, status, "why", waiting)


def test_what_was_set_aside_waits_and_what_is_pending_does_not(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    subject.append(key="a")
    with subject.open("crm") as crm:
        ((batch_id, _),) = claim_each(crm, read(crm)).items()
        crm.settle([Settlement(batch_id=batch_id, set_aside=True, attempts=3)])
        crm.hold(status="active", reason="why", failed_runs=0, retry_in=3600)
        assert [left.set_aside for left in left_over(crm)] == [1]
        crm.settle([Settlement(batch_id=batch_id, set_aside=False, attempts=1)])
        assert [left.set_aside for left in left_over(crm)] == [1]
    assert owed(subject, "customers") == (True, False, True)

    subject.append(key="b")

    assert owed(subject, "customers") == (True, False, False)
    assert owed(subject, "orders") == (True, False, True)


def test_a_target_that_was_down_waits_with_all_that_is_pending(subject: Subject) -> None:
    subject.ledger.register({"crm": "beginning"})
    subject.append(key="a")
    with subject.open("crm") as crm:
        crm.hold(status="active", reason="why", failed_runs=1, retry_in=3600)

    assert owed(subject, "customers") == (True, False, True)


# --- the fake against the real one ------------------------------------------------------------------------------------


def without_time(change: ChangeRecord) -> tuple[object, ...]:
    return (*change[:5], change.replays)


class _Both:
    """A fake and a real ledger, taken through the same steps."""

    def __init__(self, fake: Subject, real: Subject, random: Random) -> None:
        self.fake, self.real, self.random = fake, real, random
        self.open: list[tuple[Writer, Writer]] = []
        self.out: dict[int, list[ChangeRecord]] = {}

    def write(self) -> None:
        pair = (self.fake.begin(), self.real.begin())
        for _ in range(self.random.randint(1, 3)):
            stream, key = self.random.choice(["customers", "orders"]), str(self.random.randint(1, 4))
            target = self.random.choice([None, None, None, "crm", "email"])
            assert pair[0].append(stream, key, target=target) == pair[1].append(stream, key, target=target)
        self.open.append(pair)
        if self.random.random() < 0.7:
            self.end()

    def end(self) -> None:
        if self.open:
            pair = self.open.pop(self.random.randrange(len(self.open)))
            rolls_back = self.random.random() < 0.3
            for writer in pair:
                writer.rollback() if rolls_back else writer.commit()

    def read_and_claim(self, crm: tuple[TargetLedger, TargetLedger]) -> None:
        limit = self.random.choice([2, 5, 100])
        expected, found = (read(ledger, max_records=limit) for ledger in crm)
        if expected.decided_up_to is not None and found.decided_up_to is None:
            # Postgres may know a little later that what is over is over.
            assert comes_true(lambda: read(crm[1], max_records=limit).decided_up_to is not None)
            found = read(crm[1], max_records=limit)
        assert [without_time(change) for change in found.records] == [without_time(c) for c in expected.records]
        assert (found.complete, found.decided_up_to) == (expected.complete, expected.decided_up_to)
        of: dict[str, list[ChangeRecord]] = {"claim": [], "superseded": [], "filtered": [], "dead": []}
        for change in found.records:
            of[self.random.choice(["claim", "claim", "claim", "superseded", "filtered", "dead"])].append(change)
        claims = [claim_of(*of["claim"][i : i + 3]) for i in range(0, len(of["claim"]), 3)]
        window = Window(
            claims=claims,
            superseded=of["superseded"],
            filtered=of["filtered"],
            dead=[DeadRecord(change=change, reason="no", attempts=0) for change in of["dead"]],
            decided_up_to=found.decided_up_to,
        )
        batch_ids = crm[0].claim(window)
        assert crm[1].claim(window) == batch_ids
        self.out |= {batch_id: list(claim.changes) for batch_id, claim in zip(batch_ids, claims, strict=True)}

    def settle(self, crm: tuple[TargetLedger, TargetLedger]) -> None:
        settlements = []
        for batch_id in list(self.out):
            if self.random.random() < 0.6:
                members = self.out[batch_id]
                done = members if self.random.random() < 0.7 else members[:1]
                self.out[batch_id] = [change for change in members if change not in done]
                if not self.out[batch_id]:
                    del self.out[batch_id]
                settlements.append(Settlement(batch_id=batch_id, accepted=done, attempts=1))
        for ledger in crm:
            ledger.settle(settlements)

    def split(self, crm: tuple[TargetLedger, TargetLedger]) -> None:
        if several := [batch_id for batch_id, members in self.out.items() if len(members) > 1]:
            batch_id = self.random.choice(several)
            members = self.out.pop(batch_id)
            parts = [claim_of(*members[:1]), claim_of(*members[1:])]
            batch_ids = crm[0].split(batch_id, parts)
            assert crm[1].split(batch_id, parts) == batch_ids
            self.out |= {part_id: list(part.changes) for part_id, part in zip(batch_ids, parts, strict=True)}

    def compare(self, crm: tuple[TargetLedger, TargetLedger]) -> None:
        assert counts(self.real) == counts(self.fake)
        assert self.real.settled_ranges("crm") == self.fake.settled_ranges("crm")
        assert self.real.claimed_ids("crm") == self.fake.claimed_ids("crm")
        assert self.real.batches() == self.fake.batches()
        left = [[(leftover.batch_id, ids(leftover.changes)) for leftover in left_over(ledger)] for ledger in crm]
        assert left[0] == left[1]
        streams = {"crm": self.random.choice([["customers"], ["orders"], ["customers", "orders"]])}
        assert self.real.ledger.owed(streams) == self.fake.ledger.owed(streams)


@pytest.mark.parametrize("seed", range(4))
def test_the_fake_does_as_postgres_does(seed: int, database: str) -> None:
    """Sixty random steps, and after each the same answers, the same sets, the same trail; and conservation holds."""
    with ExitStack() as stack:
        both = _Both(FakeSubject(), PostgresSubject(database, stack), Random(seed))
        opened: list[TargetLedger] = []
        for subject in (both.fake, both.real):
            subject.ledger.register({"crm": "beginning"})
            ledger = stack.enter_context(subject.ledger.open_target("crm", run_id="run"))
            assert ledger is not None
            opened.append(ledger)
        crm = (opened[0], opened[1])
        for _ in range(60):
            step = both.random.choice(["write", "write", "end", "claim", "claim", "settle", "split"])
            match step:
                case "write":
                    both.write()
                case "end":
                    both.end()
                case "claim":
                    both.read_and_claim(crm)
                case "settle":
                    both.settle(crm)
                case "split":
                    both.split(crm)
            both.compare(crm)
