"""What is true of the ledger because it is in Postgres: connections, snapshots, plans. The rest is the contract's."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from random import Random
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pipelines.delivery.ledger import LONG_TAIL, LedgerConflict, LedgerFailed, Settlement, TargetLedger, Window
from pipelines.delivery.outcome import DeadRecord
from pipelines_tests.contracts.ledgers import (
    PostgresSubject,
    Writer,
    claim_each,
    claim_of,
    comes_true,
    ids,
    left_over,
    read,
)
from pipelines_tests.fakes.target import change
from resources.postgres_ledger import PostgresTargetLedger, _Ids, _in_order
from resources.sql import statements


@pytest.fixture
def subject(database: str) -> Iterator[PostgresSubject]:
    with ExitStack() as stack:
        subject = PostgresSubject(database, stack)
        subject.ledger.register({"crm": "beginning"})
        yield subject


def accept_all(ledger: TargetLedger) -> list[int]:
    """Claim and accept what is pending; return its change ids."""
    window = read(ledger)
    batches = claim_each(ledger, window)
    ledger.settle([Settlement(batch_id=batch_id, accepted=[change]) for batch_id, change in batches.items()])
    return ids(window.records)


def test_a_change_has_the_time_of_its_row_to_the_microsecond(subject: PostgresSubject) -> None:
    """Whether it is pending or left over."""
    subject.append()
    at = datetime(2024, 2, 29, 12, 0, 0, 7, tzinfo=UTC)
    subject.rows("update distributary.change_log set changed_at = %s returning 1", at)
    with subject.open("crm") as crm:
        window = read(crm)
        claim_each(crm, window)
    with subject.open("crm") as crm:
        (left,) = left_over(crm)

    assert [change.changed_at for change in (*window.records, *left.changes)] == [at, at]


# --- the lock and its connection --------------------------------------------------------------------------------------


def test_a_killed_connection_frees_the_lock_and_its_holder_cannot_write(subject: PostgresSubject) -> None:
    """There is no moment at which two drains could both write."""
    for _ in range(2):
        subject.append()
    with subject.open("crm") as crm:
        claimed, pending = read(crm).records
        (batch_id,) = crm.claim(Window(claims=[claim_of(claimed)]))

        subject.rows(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where application_name = 'distributary drain crm' and datname = current_database()"
        )
        with subject.open("crm") as successor:
            with pytest.raises(psycopg.OperationalError):
                crm.settle([Settlement(batch_id=batch_id, accepted=[claimed])])
            with pytest.raises(psycopg.OperationalError):
                crm.claim(Window(claims=[claim_of(pending)]))
            assert [ids(leftover.changes) for leftover in left_over(successor)] == [[claimed.change_id]]
            successor.settle([Settlement(batch_id=batch_id, accepted=[claimed])])
    found = subject.ledger.conservation("crm")
    assert (found.accepted, found.claimed, found.pending, found.holds) == (1, 0, 1, True)


_HOLD_THE_LOCK = """
import sys
from resources.postgres_ledger import PostgresLedger
with PostgresLedger(sys.argv[1]).open_target("crm", run_id="other") as ledger:
    print("held" if ledger else "refused", flush=True)
    sys.stdin.read()
"""


def test_a_database_that_fails_under_a_drain_is_told_in_one_sentence(subject: PostgresSubject) -> None:
    """Not in an exception of the driver's, which nobody above the adapter knows."""

    def drain_whose_connection_is_cut() -> None:
        with subject.open("crm") as crm:
            subject.rows(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where application_name = 'distributary drain crm' and datname = current_database()"
            )
            crm.check()

    with pytest.raises(LedgerFailed, match=r"^the database failed: [^\n]+$"):
        drain_whose_connection_is_cut()


@pytest.mark.parametrize("trouble", ["set default_transaction_read_only = on", "set role pg_monitor"])
def test_a_database_that_no_longer_lets_a_drain_write_is_told_in_one_sentence(
    subject: PostgresSubject, trouble: str
) -> None:
    """A demoted primary, a role without its rights: the driver has another class of exception for each."""
    subject.append()

    def drain_that_may_not_write() -> None:
        with subject.open("crm") as crm:
            assert isinstance(crm, PostgresTargetLedger)
            crm._connection.execute(trouble)
            claim_each(crm, read(crm))

    with pytest.raises(LedgerFailed, match=r"^the database failed: [^\n]+$"):
        drain_that_may_not_write()


def test_a_killed_process_frees_the_lock(subject: PostgresSubject) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD_THE_LOCK, subject.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with subject.ledger.open_target("crm", run_id="mine") as ledger:
            assert ledger is None
        assert [found.held for found in subject.ledger.owed({"crm": []})] == [True]
        other.kill()

    def is_free() -> bool:
        with subject.ledger.open_target("crm", run_id="mine") as ledger:
            return ledger is not None

    assert comes_true(is_free)


def test_a_lock_of_another_database_or_another_use_is_not_ours(subject: PostgresSubject) -> None:
    """Advisory locks belong to a database; and a lock on one 64-bit number is none on two of 32 bits."""
    ((target_id,),) = subject.rows("select target_id from distributary.target_state where target = 'crm'")
    subject.rows("select pg_advisory_lock((1684632436::bigint << 32) | %s)", target_id)

    assert [found.held for found in subject.ledger.owed({"crm": []})] == [False]
    with subject.open("crm"):
        assert [found.held for found in subject.ledger.owed({"crm": []})] == [True]


# --- ids, in binary ---------------------------------------------------------------------------------------------------

_WORD, _LONG = 2**16, 2**32


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([], id="none"),
        pytest.param([1], id="one"),
        pytest.param([_LONG], id="one large one"),
        pytest.param(list(range(1, 201)), id="small"),
        pytest.param(list(range(_WORD - 20, _WORD + 20)), id="around two bytes"),
        pytest.param(list(range(_WORD, _WORD + 15)), id="a few"),
        pytest.param(list(range(_WORD, _WORD + 16)), id="a few more"),
        pytest.param(list(range(10_000_000, 10_070_000)), id="many"),
        pytest.param(list(range(_LONG - 20, _LONG + 20)), id="around four bytes"),
        pytest.param([*range(_LONG - 1, _LONG - 41, -1), *range(_WORD, 2**31, 2**25)], id="not in order"),
        pytest.param([_LONG + n * 10**15 for n in range(9_000)], id="very large"),
        pytest.param([2**63 - 1] * 20, id="the largest"),
        pytest.param([1, _LONG] * 10, id="of several widths, and as long as if they had one"),
        pytest.param([0, -1, -_WORD, -(2**63)], id="not ids at all"),
    ],
)
def test_ids_are_sent_as_they_are(ids: list[int], database: str) -> None:
    with psycopg.connect(database) as connection:
        PostgresTargetLedger(connection, "crm", run_id="")
        (found,) = connection.execute("select %s::bigint[]", [_Ids(ids)]).fetchone() or ()
        (empty,) = connection.execute("select %s = '{}'::bigint[]", [_Ids(ids)]).fetchone() or ()

    assert found == ids
    assert empty == (not ids)


# --- what a target says -----------------------------------------------------------------------------------------------


def test_texts_that_postgres_cannot_hold_are_kept_as_far_as_they_can_be(subject: PostgresSubject) -> None:
    """A target must not be able to stop its drain by what it answers."""
    odd = "a\0b\udcffc" + "x" * 5000
    for _ in range(3):
        subject.append()
    with subject.open("crm") as crm:
        one, two, three = read(crm).records
        (batch_id,) = crm.claim(
            Window(claims=[claim_of(one, three)], dead=[DeadRecord(change=two, reason=odd, response=odd, attempts=0)])
        )
        crm.settle(
            [
                Settlement(
                    batch_id=batch_id,
                    accepted=[three],
                    dead=[DeadRecord(change=one, reason=odd, status=10**12, response=odd)],
                    error=odd,
                )
            ]
        )
        crm.hold(status="paused", reason=odd, failed_runs=1, retry_in=None)

        reason = crm.state().reason
    letters = subject.rows("select reason, response, status_code from distributary.dead_letter order by change_id")
    ((error,),) = subject.rows("select error from distributary.batch")
    for text in (reason, error, *(row[0] for row in letters), *(row[1] for row in letters)):
        assert text.startswith("a\N{REPLACEMENT CHARACTER}b?cxxx")
        assert len(text) == 2000
    assert [row[2] for row in letters] == [None, None]


def test_how_to_look_for_dead_letters_is_decided_anew_each_time(subject: PostgresSubject) -> None:
    """A plan that was made while there were few takes seconds for a window when there are thousands."""
    subject.ledger.register({"crm": "beginning"})
    with subject.open("crm") as crm:
        assert isinstance(crm, PostgresTargetLedger)
        for _ in range(8):
            crm.blocked({("customers", "1")})
            crm._supersede([change(1)])
            crm._execute("decided")
        prepared = crm._connection.execute("select statement from pg_prepared_statements").fetchall()

    assert prepared
    assert not [statement for (statement,) in prepared if "dead_letter" in statement]


@pytest.mark.parametrize("statement", ["blocked", "supersede"])
@pytest.mark.parametrize("analyzed", [True, False])
def test_dead_letters_of_many_keys_are_found_by_the_index(
    subject: PostgresSubject, statement: str, analyzed: bool
) -> None:
    """Not by comparing each key with each other: 10,000 of them took seconds for every commit."""
    number = 1_000
    with psycopg.connect(subject.url, autocommit=True) as connection:
        connection.execute(
            "insert into distributary.dead_letter (target, change_id, stream, key, operation, reason)"
            " select 'crm', i, 'customers', i::text, 'upsert', '400' from generate_series(1, %s) i",
            [number],
        )
        if analyzed:
            connection.execute("analyze distributary.dead_letter")
        connection.execute(statements("ledger")["read_by_index"])
        parameters = {
            "target": "crm",
            "change_ids": list(range(number + 1, 2 * number + 1)),
            "streams": ["customers"] * number,
            "record_keys": [str(i) for i in range(1, number + 1)],
        }
        query = "explain (analyze, format json) " + statements("ledger")[statement]
        row = psycopg.ClientCursor(connection).execute(query, parameters).fetchone()
    assert row is not None

    def removed(node: dict[str, Any]) -> int:
        own = sum(node.get(f"Rows Removed by {what}", 0) for what in ("Filter", "Join Filter", "Index Recheck"))
        return int(own * node["Actual Loops"]) + sum(removed(one) for one in node.get("Plans", []))

    assert removed(row[0][0]["Plan"]) < 10 * number


def test_nothing_is_dead_without_its_dead_letter(subject: PostgresSubject) -> None:
    """They are two statements: if the second fails, as here for what is there already, the first was none."""
    for _ in range(2):
        subject.append()
    with subject.open("crm") as crm:
        claimed, pending = read(crm).records
        (batch_id,) = crm.claim(Window(claims=[claim_of(claimed)]))
        for change in (claimed, pending):
            subject.rows(
                "insert into distributary.dead_letter (target, change_id, stream, key, operation, reason)"
                " values ('crm', %s, 'customers', '1', 'update', '') returning 1",
                change.change_id,
            )

        with pytest.raises(psycopg.errors.UniqueViolation):
            crm.settle([Settlement(batch_id=batch_id, dead=[DeadRecord(change=claimed, reason="422")])])
        with pytest.raises(psycopg.errors.UniqueViolation):
            crm.claim(Window(dead=[DeadRecord(change=pending, reason="cannot be rendered")]))

        assert subject.claimed_ids("crm") == {claimed.change_id}
        assert ids(read(crm).records) == [pending.change_id]


@pytest.mark.parametrize("statement", ["delete from", "update"])
def test_the_row_of_a_target_with_batches_stays(subject: PostgresSubject, statement: str) -> None:
    """It is not looked up for each batch, as a foreign key's would be; one without batches may go."""
    subject.ledger.register({"other": "beginning"})
    subject.append()
    with subject.open("crm") as crm:
        accept_all(crm)
    sets = "set target = 'another_' || target" if statement == "update" else ""

    with pytest.raises(psycopg.errors.ForeignKeyViolation, match="'crm' has to stay: there are batches of it"):
        subject.rows(f"{statement} distributary.target_state {sets} where target = 'crm' returning 1")

    assert subject.rows(f"{statement} distributary.target_state {sets} where target = 'other' returning 1") == [(1,)]
    assert subject.rows("select distinct target from distributary.batch") == [("crm",)]


def test_nothing_is_claimed_for_a_target_whose_row_went(subject: PostgresSubject) -> None:
    subject.append()
    with subject.open("crm") as crm:
        window = read(crm)
        subject.rows("delete from distributary.target_state where target = 'crm' returning 1")
        with pytest.raises(LedgerConflict):
            claim_each(crm, window)

    assert subject.rows("select count(*) from distributary.batch") == [(0,)]


def test_a_conflict_leaves_the_connection_usable(subject: PostgresSubject) -> None:
    subject.append()
    with subject.open("crm") as crm:
        (change,) = read(crm).records
        with pytest.raises(LedgerConflict):
            crm.settle([Settlement(batch_id=1, accepted=[change])])
        assert accept_all(crm) == [change.change_id]


# --- gaps, under whatever transactions do -----------------------------------------------------------------------------


def fence_of(subject: PostgresSubject) -> tuple[Any, ...]:
    (row,) = subject.rows("select fence_xid::text, fence_change_id from distributary.target_state where target = 'crm'")
    return row


def test_a_fence_is_taken_only_while_there_are_gaps(subject: PostgresSubject) -> None:
    """A target that has caught up must not write, nor use up transaction ids, at every poll."""
    subject.append()
    with subject.open("crm") as crm:
        accept_all(crm)
        assert comes_true(lambda: accept_all(crm) == [] and subject.settled_ranges("crm") == [(0, 1)])
        for _ in range(5):
            assert read(crm).records == []
        assert fence_of(subject) == (None, None)

        subject.append()
        accept_all(crm)
        for _ in range(5):
            read(crm)
        assert subject.settled_ranges("crm") == [(0, 2)]
        assert fence_of(subject) == (None, None)


def test_the_set_stays_small_however_many_ids_are_rolled_back(subject: PostgresSubject) -> None:
    random = Random(1)
    with psycopg.connect(subject.url) as writer:
        for key in range(300):
            writer.execute(
                "insert into distributary.change_log (stream, key, operation, payload)"
                " values ('a', %s, 'insert', '{}')",
                [str(key)],
            )
            writer.rollback() if random.random() < 0.5 else writer.commit()
    with subject.open("crm") as crm:
        accept_all(crm)
        assert len(subject.settled_ranges("crm")) > 50

        assert comes_true(lambda: accept_all(crm) == [] and subject.settled_ranges("crm") == [(0, 300)])
    assert subject.ledger.conservation("crm").holds


def test_a_change_within_a_savepoint_is_open_as_long_as_its_transaction(subject: PostgresSubject) -> None:
    """A subtransaction has an id of its own, drawn late; what counts is that of the whole, drawn first."""
    insert = "insert into distributary.change_log (stream, key, operation, payload) values ('a', '1', 'insert', '{}')"
    with psycopg.connect(subject.url) as writer:
        writer.execute("savepoint kept")
        writer.execute(insert)
        writer.execute("release kept")
        writer.execute("savepoint undone")
        writer.execute(insert)
        writer.execute("rollback to undone")
        last = subject.append()
        with subject.open("crm") as crm:
            for expected in ([last], [], [], []):
                assert accept_all(crm) == expected
            assert subject.settled_ranges("crm") == [(last, last)]

            writer.commit()

            assert accept_all(crm) == [last - 2]
            assert comes_true(lambda: accept_all(crm) == [] and subject.settled_ranges("crm") == [(0, last)])


def test_an_id_that_was_drawn_but_not_yet_written_keeps_its_gap_open(subject: PostgresSubject) -> None:
    """Its transaction must be known by then: hence xid is the log's first column. Here writing the row takes long."""
    slow_insert = (
        "insert into distributary.change_log (stream, key, operation, payload)"
        " values ('a', '1', 'insert', (select '{}'::jsonb from (select pg_advisory_xact_lock(42)) slow))"
    )
    subject.append()  # the first id of a sequence gives its transaction an id too; most do not
    subject.rows("select pg_advisory_lock(42)")
    with psycopg.connect(subject.url) as connection, ThreadPoolExecutor(1) as thread:
        slow = thread.submit(connection.execute, slow_insert)
        try:
            assert comes_true(lambda: subject.rows(statements("ledger")["last_change_id"]) == [(2,)])
            subject.append()
            with subject.open("crm") as crm:
                for expected in ([1, 3], [], [], []):
                    assert accept_all(crm) == expected
                assert subject.settled_ranges("crm") == [(1, 1), (3, 3)]
        finally:
            subject.rows("select pg_advisory_unlock(42)")
        slow.result()
        connection.commit()
    with subject.open("crm") as crm:
        assert accept_all(crm) == [2]


class _Interrupted(PostgresTargetLedger):
    """Between any two of its statements somebody writes."""

    def __init__(self, ledger: TargetLedger, interrupt: Any) -> None:
        assert isinstance(ledger, PostgresTargetLedger)
        super().__init__(ledger._connection, ledger._target, run_id=ledger._run_id)
        self._prepared = ledger._prepared
        self._interrupt = interrupt

    def _execute(self, name: str, **parameters: Any) -> psycopg.Cursor[Any]:
        self._interrupt()
        found = super()._execute(name, **parameters)
        self._interrupt()
        return found


@pytest.mark.parametrize("seed", range(3))
def test_writers_between_any_two_statements_lose_nothing(subject: PostgresSubject, seed: int) -> None:
    """Above all between reading the sequence and taking the fence. Some began long before, some stay open for long."""
    random = Random(seed)
    still_open: list[tuple[Writer, list[int]]] = []
    committed: list[int] = []

    def interrupt() -> None:
        fate = random.random()
        if fate < 0.35:
            still_open.append((subject.begin(), []))
        if still_open and fate < 0.7:
            writer, written = random.choice(still_open)
            written.append(writer.append("customers", "1"))
        elif still_open:
            writer, written = still_open.pop(random.randrange(len(still_open)))
            if fate < 0.8:
                writer.rollback()
            else:
                writer.commit()
                committed.extend(written)

    delivered: list[int] = []
    with subject.open("crm") as ledger:
        crm = _Interrupted(ledger, interrupt)
        for _ in range(40):
            delivered += accept_all(crm)
        for writer, written in still_open:
            writer.commit()
            committed.extend(written)

        def caught_up() -> bool:
            delivered.extend(accept_all(ledger))
            return len(subject.settled_ranges("crm")) == 1

        assert comes_true(caught_up)

    assert sorted(delivered) == sorted(committed)
    assert subject.ledger.conservation("crm").holds


def test_a_fence_of_another_cluster_is_taken_anew(subject: PostgresSubject) -> None:
    """After a dump and a restore transaction ids begin again, and the old fence would keep the gaps open for years."""
    subject.draw_and_roll_back()
    last = subject.append()
    subject.rows(
        "update distributary.target_state set fence_xid = '9000000000000', fence_change_id = %s returning target", last
    )
    with subject.open("crm") as crm:
        assert comes_true(lambda: not accept_all(crm) and subject.settled_ranges("crm") == [(0, last)])


def test_an_id_given_by_hand_behind_what_is_settled_is_noticed(subject: PostgresSubject) -> None:
    """It cannot be delivered, for nothing tells it from a settled one; but the books do not balance any more."""
    subject.draw_and_roll_back()
    last = subject.append()
    with subject.open("crm") as crm:
        assert comes_true(lambda: not accept_all(crm) and subject.settled_ranges("crm") == [(0, last)])
    assert subject.ledger.conservation("crm").holds

    with pytest.raises(psycopg.errors.GeneratedAlways):
        subject.rows(
            "insert into distributary.change_log (change_id, stream, key, operation, payload)"
            " values (1, 'a', '1', 'insert', '{}') returning 1"
        )
    subject.rows(
        "insert into distributary.change_log (change_id, stream, key, operation, payload) overriding system value"
        " values (1, 'a', '1', 'insert', '{}') returning 1"
    )

    assert not subject.ledger.conservation("crm").holds


# --- how it reads -----------------------------------------------------------------------------------------------------


def scans_of_the_log(connection: psycopg.Connection, name: str, **parameters: object) -> set[str]:
    """Return how the plan of a statement reads the change log, for these parameters."""
    query = "explain (format json) " + statements("ledger")[name]
    row = psycopg.ClientCursor(connection).execute(query, parameters).fetchone()
    assert row is not None

    def walk(node: dict[str, Any]) -> Iterator[str]:
        if node.get("Relation Name") == "change_log" or node.get("Index Name") == "change_log_pkey":
            yield node["Node Type"]
        for below in node.get("Plans", []):
            yield from walk(below)

    return set(walk(row[0][0]["Plan"]))


def fill(subject: PostgresSubject, *, rows: int) -> None:
    subject.rows(
        "insert into distributary.change_log (stream, key, operation, payload)"
        " select 'customers', i::text, 'insert', jsonb_build_object('id', i) from generate_series(1, %s) i returning 1",
        rows,
    )


def make_gaps(subject: PostgresSubject, *, gaps: int) -> None:
    subject.rows(
        "update distributary.target_state set settled ="
        " (select range_agg(int8range(2 * i, 2 * i, '[]')) from generate_series(1, %s) i) returning 1",
        gaps,
    )


@pytest.mark.parametrize("statement", ["pending", "pending_in_a_row"])
@pytest.mark.parametrize("gaps", [0, 10_000])
@pytest.mark.parametrize("analyzed", [True, False])
def test_pending_is_read_through_the_index(subject: PostgresSubject, gaps: int, analyzed: bool, statement: str) -> None:
    """Also on a log that was never analyzed, which else is sorted whole for each window."""
    fill(subject, rows=20_000)
    if gaps:
        make_gaps(subject, gaps=gaps)
    with psycopg.connect(subject.url, autocommit=True) as connection:
        if analyzed:
            connection.execute("analyze distributary.change_log")
        connection.execute(statements("ledger")["read_by_index"])

        found = scans_of_the_log(connection, statement, target="crm", max_records=1000, ids_at_once=100)

    assert found == {"Index Scan"}
    with subject.open("crm") as crm:
        assert isinstance(crm, PostgresTargetLedger)
        crm._in_a_row = statement == "pending_in_a_row"
        step = 2 if gaps else 1
        assert ids(read(crm, max_records=1000).records) == list(range(1, 1 + 1000 * step, step))


def test_payloads_that_compress_well_are_weighed_as_they_are_held(subject: PostgresSubject) -> None:
    """As stored, all of these together are smaller than the bound; as text, each is a tenth of it."""
    subject.ledger.register({"crm": "beginning"})
    with psycopg.connect(subject.url, autocommit=True) as connection:
        connection.execute(
            "insert into distributary.change_log (stream, key, operation, payload)"
            " select 'customers', i::text, 'insert', jsonb_build_object('note', repeat('e', 100000))"
            " from generate_series(1, 400) i"
        )

    with subject.open("crm") as crm:
        window = crm.pending(max_records=1000, max_bytes=1_000_000)
        again = crm.pending(max_records=1000, max_bytes=1_000_000)

    assert len(window.records) == 10
    assert not window.complete
    assert window.decided_up_to is None
    assert again == window


def test_a_window_bounded_by_bytes_begins_where_the_last_one_ended(subject: PostgresSubject) -> None:
    """Small ones, then large ones, then small ones: what was usual is no longer, and nothing is left out for it."""
    subject.ledger.register({"crm": "beginning"})
    with psycopg.connect(subject.url, autocommit=True) as connection:
        connection.execute(
            "insert into distributary.change_log (stream, key, operation, payload)"
            " select 'customers', i::text, 'insert', jsonb_build_object("
            "   'note', repeat('e', case when i between 201 and 230 then 50000 else 100 end))"
            " from generate_series(1, 500) i"
        )

    windows = []
    with subject.open("crm") as crm:
        while not windows or not windows[-1].complete:
            windows.append(crm.pending(max_records=150, max_bytes=200_000))
            assert sum(len(one.payload) for one in windows[-1].records) < 200_000 + 50_100
            claim_each(crm, windows[-1])

    assert [one for window in windows for one in ids(window.records)] == list(range(1, 501))
    assert min(len(window.records) for window in windows[:-1]) <= 5


def test_a_preview_that_is_bounded_by_bytes_still_says_what_is_blocked(subject: PostgresSubject) -> None:
    """All that it says is of one instant, so in one transaction; and a read that is stopped fails its own."""
    subject.ledger.register({"crm": "beginning"})
    with psycopg.connect(subject.url, autocommit=True) as connection:
        connection.execute(
            "insert into distributary.change_log (stream, key, operation, payload)"
            " select 'customers', i::text, 'insert',"
            "   (select jsonb_object_agg(n, md5(random()::text || i)) from generate_series(1, 100) n)"
            " from generate_series(1, 5000) i"
        )

    seen = subject.ledger.upcoming("crm", max_records=5_000, max_bytes=1_000_000)

    assert 100 < len(seen.pending) < 1_000
    assert ids(seen.pending) == list(range(1, len(seen.pending) + 1))
    assert seen.more
    assert seen.blocked == {}


def test_what_is_too_large_to_be_sent_together_is_read_one_by_one(
    subject: PostgresSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Postgres answers where several texts make more than a gigabyte: sixty of 20 MB after small ones do."""
    fill(subject, rows=30)
    as_it_is = PostgresTargetLedger._pending

    def refused(self: PostgresTargetLedger, max_records: int, *, ids_at_once: int) -> Iterator[tuple[list[Any], bool]]:
        if ids_at_once > 1:
            raise psycopg.errors.ProgramLimitExceeded("string buffer exceeds maximum allowed length")
        yield from as_it_is(self, max_records, ids_at_once=ids_at_once)

    monkeypatch.setattr(PostgresTargetLedger, "_pending", refused)

    with subject.open("crm") as crm:
        assert ids(crm.pending(max_records=20, max_bytes=32_000_000).records) == list(range(1, 21))


def test_what_postgres_gathers_out_of_order_is_put_in_order() -> None:
    """It does not promise the order of what it gathers; a part that is cut at its bytes must end with the newest."""
    texts = b"3\x011\x012"
    gathered = [[3, 1, 2], ["s"] * 3, ["c", "a", "b"], ["insert"] * 3, texts, [30, 10, 20], [None, 7, None]]

    found = _in_order(gathered)

    assert found == [
        [1, 2, 3],
        ["s"] * 3,
        ["a", "b", "c"],
        ["insert"] * 3,
        b"1\x012\x013",
        [10, 20, 30],
        [7, None, None],
    ]
    assert _in_order(found) is found


def test_whatever_a_payload_and_a_key_hold_is_read_as_it_is(subject: PostgresSubject) -> None:
    """Separators of the columns among it: a control character in JSON is escaped, in a key it is not."""
    subject.ledger.register({"crm": "beginning"})
    notes = ["", "\x01", "a,b", "\\x01", "\u2028é\U0001f600", "\n\r\t\x1f\x7f", '"', "\\"]
    with psycopg.connect(subject.url, autocommit=True) as connection:
        for note in notes:
            connection.execute(
                "insert into distributary.change_log (stream, key, operation, payload) values (%s, %s, 'insert', %s)",
                [f"s{note}", f"k{note}", Jsonb({"note": note})],
            )

    with subject.open("crm") as crm:
        found = crm.pending(max_records=100, max_bytes=1_000_000).records

    assert [(one.stream, one.key) for one in found] == [(f"s{note}", f"k{note}") for note in notes]
    assert [json.loads(one.payload)["note"] for one in found] == notes


def test_what_is_owed_is_found_through_the_index(subject: PostgresSubject) -> None:
    fill(subject, rows=20_000)
    make_gaps(subject, gaps=10_000)
    with psycopg.connect(subject.url, autocommit=True) as connection:
        connection.execute("analyze distributary.change_log")

        found = scans_of_the_log(connection, "owed", streams='{"crm": ["customers"]}', long_tail=LONG_TAIL)

    assert found == {"Index Scan"}


def test_what_is_owed_is_one_query_however_many_targets(
    subject: PostgresSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [f"target_{n}" for n in range(10)]
    subject.ledger.register(dict.fromkeys(targets, "beginning"))
    subject.append()
    asked: list[object] = []
    execute = psycopg.Cursor.execute

    def spy(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(query)
        return execute(self, query, *arguments, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", spy)
    found = subject.ledger.owed({target: ["customers"] for target in targets})

    assert [owed.target for owed in found] == targets
    assert all(owed.has_work for owed in found)
    assert asked == [statements("ledger")["owed"]]


def test_an_open_ledger_reads_by_index_for_its_session_alone(subject: PostgresSubject) -> None:
    with subject.open("crm") as crm:
        assert isinstance(crm, PostgresTargetLedger)
        assert crm._connection.execute("show enable_bitmapscan").fetchone() == ("off",)
    assert subject.rows("show enable_bitmapscan") == [("on",)]


def test_each_drain_has_a_name_that_an_operator_can_find(subject: PostgresSubject) -> None:
    with subject.open("crm"):
        assert subject.rows(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = %s",
            "distributary drain crm",
        ) == [(1,)]


def test_a_key_that_is_too_long_for_an_index_has_its_dead_letter(subject: PostgresSubject) -> None:
    """Random, so that it is not compressed: an index on the key itself would take 2,704 bytes."""
    key = "".join(Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=6000))
    subject.ledger.register({"crm": "beginning"})
    subject.append(key=key)
    with subject.open("crm") as crm:
        (change,) = read(crm).records
        (batch_id,) = crm.claim(Window(claims=[claim_of(change)]))

        crm.settle([Settlement(batch_id=batch_id, dead=[DeadRecord(change=change, reason="422")])])

        assert crm.blocked([("customers", key)]) == {("customers", key): change.change_id}
