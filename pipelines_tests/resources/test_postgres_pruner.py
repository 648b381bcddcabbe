"""What is pruned is what nobody needs; what is where still adds up; and nobody waits."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from pipelines.delivery.ledger import Settlement, TargetLedger, Window
from pipelines_tests.contracts.ledgers import claim_each, claim_of, left_over, read
from resources.postgres_ledger import PostgresLedger
from resources.postgres_pruner import PostgresPruner

OLD = datetime.now(UTC) - timedelta(days=10)
WEEK = datetime.now(UTC) - timedelta(days=7)


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def ledger(database: str) -> PostgresLedger:
    ledger = PostgresLedger(database)
    ledger.register({"crm": "beginning", "email": "beginning"})
    return ledger


@pytest.fixture
def pruner(database: str, ledger: PostgresLedger) -> PostgresPruner:
    return PostgresPruner(database)


def append(connection: psycopg.Connection, count: int, *, at: datetime = OLD, target: str | None = None) -> list[int]:
    rows = connection.execute(
        "insert into distributary.change_log (stream, key, operation, payload, changed_at, target)"
        " select 'people', n::text, 'update', '{}', %s, %s from generate_series(1, %s) n returning change_id",
        [at, target, count],
    )
    return [change_id for (change_id,) in rows]


def accept(ledger: PostgresLedger, target: str, *, at_most: int = 1000) -> None:
    with ledger.open_target(target, run_id="run") as opened:
        assert opened is not None
        settle(opened, at_most)


def settle(opened: TargetLedger, at_most: int) -> None:
    batches = claim_each(opened, read(opened, max_records=at_most))
    opened.settle([Settlement(batch_id=batch_id, accepted=[change]) for batch_id, change in batches.items()])


def prune(
    pruner: PostgresPruner, *, holding: Sequence[str] = ("crm", "email"), dropped: Sequence[str] = ()
) -> dict[str, int]:
    """Prune what is older than a week and return how much went, and what was missed by whom."""
    found = {"changes": 0, "batches": 0}
    for step in pruner.prune(before=WEEK, holding=holding, dropped=dropped):
        found["changes"] += step.changes
        found["batches"] += step.batches
        for target, count in (step.missed or {}).items():
            found[target] = found.get(target, 0) + count
    return found


def left(connection: psycopg.Connection) -> list[int]:
    return [row[0] for row in connection.execute("select change_id from distributary.change_log order by 1")]


def assert_it_adds_up(ledger: PostgresLedger, **captured: int) -> None:
    for target, count in captured.items():
        found = ledger.conservation(target)
        assert found.holds, found
        assert found.captured == count


def test_what_every_target_has_settled_goes_and_it_still_adds_up(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    append(connection, 5)
    accept(ledger, "crm")
    accept(ledger, "email", at_most=3)
    assert_it_adds_up(ledger, crm=5, email=5)

    assert prune(pruner)["changes"] == 3

    assert len(left(connection)) == 2
    assert_it_adds_up(ledger, crm=5, email=5)
    accept(ledger, "email")
    assert_it_adds_up(ledger, email=5)


def test_what_is_not_old_enough_stays(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    append(connection, 2)
    young = append(connection, 2, at=datetime.now(UTC))
    accept(ledger, "crm")
    accept(ledger, "email")

    assert prune(pruner) == {"changes": 2, "batches": 0}
    assert left(connection) == young


def test_what_is_claimed_or_has_an_open_dead_letter_stays(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    """The one will be sent again as it was; the other may be redriven."""
    ids = append(connection, 4)
    accept(ledger, "email")
    with ledger.open_target("crm", run_id="run") as crm:
        assert crm is not None
        changes = read(crm).records
        crm.claim(Window(claims=[claim_of(changes[0])], filtered=changes[1:]))
    for change_id, state in ((ids[1], "open"), (ids[2], "discarded")):
        connection.execute(
            "insert into distributary.dead_letter (target, change_id, stream, key, operation, reason, state)"
            " values ('crm', %s, 'people', 'x', 'update', '422', %s)",
            [change_id, state],
        )

    prune(pruner)

    assert left(connection) == ids[:2]
    assert_it_adds_up(ledger, crm=4, email=4)


def test_what_is_addressed_to_one_target_waits_for_no_other(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    append(connection, 3, target="crm")
    accept(ledger, "crm")

    assert prune(pruner)["changes"] == 3
    assert_it_adds_up(ledger, crm=3, email=0)


def test_a_target_that_began_later_adds_up_too(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    """It left out what was there before it; some of that is gone before it came, some goes after."""
    append(connection, 2)
    accept(ledger, "crm")
    accept(ledger, "email")
    prune(pruner)
    append(connection, 3)
    ledger.register({"late": "now"})
    append(connection, 1)
    for target in ("crm", "email", "late"):
        accept(ledger, target)

    assert prune(pruner, holding=["crm", "email", "late"])["changes"] == 4
    assert_it_adds_up(ledger, crm=6, email=6, late=1)


def test_a_target_that_no_longer_holds_the_log_misses_what_goes_and_it_is_counted(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    """Claimed or pending: nothing of it is owed any more, and if it is served again it goes on with what is left."""
    append(connection, 4)
    accept(ledger, "crm")
    with ledger.open_target("email", run_id="run") as email:
        assert email is not None
        first, second, *_ = read(email).records
        email.claim(Window(claims=[claim_of(first, second)]))

    assert prune(pruner, holding=["crm"], dropped=["email"]) == {"changes": 4, "batches": 0, "email": 4}

    assert_it_adds_up(ledger, crm=4, email=4)
    append(connection, 1, at=datetime.now(UTC))
    with ledger.open_target("email", run_id="run") as email:
        assert email is not None
        assert left_over(email) == []
        settle(email, 10)
    assert ledger.conservation("email").accepted == 1
    assert_it_adds_up(ledger, email=5)


def test_the_trail_goes_with_its_age_but_not_what_is_in_flight(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner
) -> None:
    append(connection, 3)
    accept(ledger, "crm", at_most=2)
    with ledger.open_target("crm", run_id="run") as crm:
        assert crm is not None
        crm.claim(Window(claims=[claim_of(*read(crm).records)]))
    connection.execute("update distributary.batch set finished_at = %s where finished_at is not null", [OLD])
    connection.execute("update distributary.batch set claimed_at = %s", [OLD])

    assert prune(pruner)["batches"] == 2
    assert connection.execute("select state from distributary.batch").fetchall() == [("claimed",)]


def test_it_goes_in_small_steps_and_stops_at_what_is_young(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no transaction is long, and the cost does not grow with the log."""
    monkeypatch.setattr("resources.postgres_pruner._ROWS_AT_ONCE", 10)
    append(connection, 25)
    append(connection, 100, at=datetime.now(UTC))
    for target in ("crm", "email"):
        accept(ledger, target)

    steps = [step.changes for step in pruner.prune(before=WEEK, holding=["crm", "email"], dropped=[])]

    assert steps == [10, 10, 5, 0, 0]


def test_neither_a_writer_nor_a_drain_waits_for_it(
    connection: psycopg.Connection, ledger: PostgresLedger, pruner: PostgresPruner, database: str
) -> None:
    """An open transaction of a writer, and an open drain, while all that is old goes."""
    append(connection, 20)
    accept(ledger, "crm")
    accept(ledger, "email")
    with psycopg.connect(database) as writer, ledger.open_target("crm", run_id="run") as crm:
        assert crm is not None
        append(writer, 1, at=datetime.now(UTC))
        steps = pruner.prune(before=WEEK, holding=["crm", "email"], dropped=[])

        assert next(steps).changes == 20
        append(connection, 1, at=datetime.now(UTC))
        settle(crm, 10)
        assert sum(step.changes for step in steps) == 0
        writer.commit()
        settle(crm, 10)

    assert_it_adds_up(ledger, crm=22, email=22)


def test_every_target_of_the_ledger_is_a_holder(connection: psycopg.Connection, pruner: PostgresPruner) -> None:
    connection.execute("update distributary.target_state set status = 'disabled' where target = 'email'")

    assert [(one.target, one.status) for one in pruner.holders()] == [("crm", "active"), ("email", "disabled")]
