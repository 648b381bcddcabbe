"""Whatever lies in the log and however it is read: a window is what a plain query finds, and complete only if it is."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import psycopg
import pytest

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.ledger import PendingWindow
from pipelines_tests.contracts.ledgers import PostgresSubject, ids
from resources.postgres_ledger import PostgresTargetLedger
from resources.sql import statements

_INSERT = """
insert into distributary.change_log (change_id, stream, key, operation, payload, target, replays)
overriding system value values (%s, %s, %s, %s, %s, %s, %s)
"""
_PLAIN = """
select l.change_id, l.stream, l.key, l.operation, convert_to(l.payload::text, 'UTF8'), l.changed_at, l.replays
from distributary.change_log l
join distributary.target_state s on s.target = 'crm'
where (l.target is null or l.target = 'crm') and not (s.settled + s.claimed) @> l.change_id
order by l.change_id
"""
_SETTLE = """
update distributary.target_state
set settled = settled + (select range_agg(int8range(id, id, '[]')) from unnest(%s::bigint[]) as id)
where target = 'crm'
"""


@pytest.fixture
def subject(database: str) -> Iterator[PostgresSubject]:
    with ExitStack() as stack:
        subject = PostgresSubject(database, stack)
        subject.ledger.register({"crm": "beginning"})
        yield subject


def pending_by_a_plain_query(connection: psycopg.Connection) -> list[ChangeRecord]:
    rows = connection.execute(_PLAIN).fetchall()
    return [ChangeRecord(*row[:5], instant_of(row[5]), row[6]) for row in rows]


def random_ids(random: Random, number: int) -> list[int]:
    """Return ids as logs have them: long runs, every second of some, far apart, a jump."""
    found: list[int] = []
    at = random.choice([1, 5_000_000])  # the beginning may be pruned
    while len(found) < number:
        step, length = random.choice([(1, 1500), (1, 700), (1, 30), (2, 120), (64, 40), (3_000, 5)])
        found += range(at, at + step * length, step)
        at = found[-1] + random.choice([1, 2, 30, 200, 1_000_000_000])
    return found[:number]


def random_row(random: Random, change_id: int, *, others: float) -> tuple[object, ...]:
    note = "n" * random.choice([0, 10, 300] * 20 + [5_000, 60_000])
    operation = random.choice(["insert", "update", "update", "delete", "snapshot"])
    target = random.choice(["crm", "email"]) if random.random() < others else None
    replays = random.randrange(change_id) if random.random() < 0.05 else None
    payload = json.dumps({"id": change_id, "note": note})
    return change_id, random.choice(["a", "b,", "c\x01"]), f"{change_id % 50}", operation, payload, target, replays


def write(connection: psycopg.Connection, rows: list[tuple[object, ...]]) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(_INSERT, rows)


@pytest.mark.parametrize("others", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_window_is_what_a_plain_query_finds(subject: PostgresSubject, seed: int, others: float) -> None:
    """Some is settled out of order before, some is committed late, some never; all of it is read in the end."""
    random = Random(seed)
    rows = [random_row(random, change_id, others=others) for change_id in random_ids(random, 5_000)]
    late = [row for row in rows if random.random() < random.choice([0.0, 0.01])]
    undone = [row for row in rows if row not in late and random.random() < 0.01]
    ways: set[bool] = set()
    read: list[int] = []
    with (
        psycopg.connect(subject.url, autocommit=True) as plain,
        psycopg.connect(subject.url) as writer,
        subject.open("crm") as crm,
    ):
        assert isinstance(crm, PostgresTargetLedger)
        write(plain, [row for row in rows if row not in late and row not in undone])
        write(writer, undone)
        writer.rollback()
        write(writer, late)
        if seed == 0:
            plain.execute(_SETTLE, [random.sample([row[0] for row in rows if row not in late], 300)])
        expected = pending_by_a_plain_query(plain)
        owed = ids(expected)
        while expected or late:
            if late and (not expected or random.random() < 0.1):
                writer.commit()
                owed += [int(str(row[0])) for row in late if row[5] in (None, "crm")]
                late = []
                expected = pending_by_a_plain_query(plain)
            ways.add(crm._in_a_row)
            records, complete = crm.read_pending(
                max_records=random.choice([1, 99, 150, 400, 700]), max_bytes=random.choice([30_000, 10**6, 10**9])
            )

            assert records == expected[: len(records)]
            assert complete <= (len(records) == len(expected))
            assert len(records) > 0 or not expected

            read += ids(records)
            if records:
                plain.execute(_SETTLE, [ids(records)])
            expected = expected[len(records) :]
        assert crm.read_pending(max_records=1, max_bytes=1) == ([], True)
    assert sorted(read) == sorted(owed)
    assert ways == ({False} if others == 0.5 else {False, True})


@pytest.fixture
def in_a_row(subject: PostgresSubject) -> Iterator[PostgresTargetLedger]:
    """Return a ledger that has read and settled 200 changes in a row, with 800 behind them."""
    with psycopg.connect(subject.url, autocommit=True) as connection, subject.open("crm") as crm:
        assert isinstance(crm, PostgresTargetLedger)
        connection.execute(
            "insert into distributary.change_log (stream, key, operation, payload)"
            " select 's', i::text, 'insert', '{}' from generate_series(1, 1000) i"
        )
        first = crm.pending(max_records=200, max_bytes=10**6)
        connection.execute(_SETTLE, [ids(first.records)])
        assert crm._in_a_row
        yield crm


def change(subject: PostgresSubject, statement: str) -> None:
    subject.rows(f"{statement} returning 1")


def test_what_comes_late_goes_before_what_is_in_a_row(subject: PostgresSubject, in_a_row: PostgresTargetLedger) -> None:
    change(subject, "update distributary.target_state set settled = settled - '{[7,7],[9,9]}'")

    window = in_a_row.pending(max_records=100, max_bytes=10**6)

    assert ids(window.records) == [7, 9, *range(201, 299)]
    assert not window.complete


def test_gaps_that_nobody_foresaw_make_a_window_smaller_but_not_complete(
    subject: PostgresSubject, in_a_row: PostgresTargetLedger
) -> None:
    """That it holds less than was asked for does not mean that this is all."""
    change(subject, "delete from distributary.change_log where change_id > 200 and mod(change_id, 50) > 0")

    window = in_a_row.pending(max_records=200, max_bytes=10**6)
    change(subject, "update distributary.target_state set settled = '{[0,600]}'")
    rest = in_a_row.pending(max_records=200, max_bytes=10**6)

    assert 0 < len(window.records) < 200
    assert ids(window.records) == [*range(250, 1001, 50)][: len(window.records)]
    assert not window.complete
    assert window.decided_up_to is None
    assert rest == PendingWindow(records=rest.records, complete=True, decided_up_to=rest.decided_up_to)
    assert ids(rest.records) == [*range(650, 1001, 50)]


def test_a_window_in_a_row_is_complete_where_the_log_ends(
    subject: PostgresSubject, in_a_row: PostgresTargetLedger
) -> None:
    change(subject, "update distributary.target_state set settled = '{[0,700]}'")

    full = in_a_row.pending(max_records=300, max_bytes=10**6)
    roomy = in_a_row.pending(max_records=301, max_bytes=10**6)

    assert ids(full.records) == ids(roomy.records) == [*range(701, 1001)]
    assert (full.complete, roomy.complete) == (False, True)
    assert in_a_row._in_a_row


def test_a_window_in_a_row_ends_where_it_has_enough_bytes(in_a_row: PostgresTargetLedger) -> None:
    window = in_a_row.pending(max_records=500, max_bytes=200)

    assert ids(window.records) == [*range(201, 301)]
    assert not window.complete


def test_what_differs_within_a_row_is_read_as_it_is(subject: PostgresSubject, in_a_row: PostgresTargetLedger) -> None:
    change(subject, "update distributary.change_log set stream = 't' where mod(change_id, 3) = 0")
    change(subject, "update distributary.change_log set operation = 'delete' where mod(change_id, 7) = 0")
    change(subject, "update distributary.change_log set replays = change_id - 1 where mod(change_id, 101) = 0")

    records = in_a_row.pending(max_records=300, max_bytes=10**6).records

    assert ids(records) == [*range(201, 501)]
    for one in records:
        assert one.stream == ("s" if one.change_id % 3 else "t")
        assert one.operation == ("insert" if one.change_id % 7 else "delete")
        assert one.replays == (None if one.change_id % 101 else one.change_id - 1)
        assert one.key == str(one.change_id)
    assert in_a_row._in_a_row


def test_a_key_that_holds_what_keys_are_joined_by_is_read_as_it_is(
    subject: PostgresSubject, in_a_row: PostgresTargetLedger
) -> None:
    change(subject, "update distributary.change_log set key = E'a\\x01b' where change_id in (250, 251)")

    records = in_a_row.pending(max_records=300, max_bytes=10**6).records
    again = in_a_row.pending(max_records=300, max_bytes=10**6).records

    assert [one.key for one in records if one.change_id in (249, 250, 251, 252)] == ["249", "a\x01b", "a\x01b", "252"]
    assert records == again
    assert ids(records) == [*range(201, 501)]


def test_nothing_is_sorted_that_is_read_in_a_row(subject: PostgresSubject) -> None:
    """But where the parts begin: so the first comes before the last is read."""
    with psycopg.connect(subject.url) as connection:
        connection.execute(statements("ledger")["read_by_index"])
        query = "explain (format json) " + statements("ledger")["pending_in_a_row"]
        parameters = {"target": "crm", "max_records": 10_000, "ids_at_once": 100}
        row = psycopg.ClientCursor(connection).execute(query, parameters).fetchone()
    assert row is not None

    def below(node: dict[str, Any]) -> list[str]:
        return [node["Node Type"], *(one for each in node.get("Plans", []) for one in below(each))]

    gathered = row[0][0]["Plan"]["Plans"][-1]
    assert gathered["Node Type"] == "Aggregate"
    assert below(gathered) == ["Aggregate", "Index Scan"]
    assert row[0][0]["Plan"]["Node Type"] == "Nested Loop"
