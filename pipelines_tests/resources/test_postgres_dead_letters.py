"""A redrive appends what it closes, in one transaction; what it does not mean, it leaves."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.operating.dead_letters import CannotRedrive, Redrive, Selection
from resources.capture import install_capture
from resources.postgres_dead_letters import PostgresDeadLetters

SOURCE = SourceConfig.model_validate({"tables": {"people": {"key": "id"}}})


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table people (id text primary key, name text)")
        install_capture(connection, SOURCE)
        connection.execute("insert into distributary.target_state (target) values ('crm'), ('email')")
        yield connection


@pytest.fixture
def letters(database: str, connection: psycopg.Connection) -> PostgresDeadLetters:
    return PostgresDeadLetters(database, SOURCE)


def write(connection: psycopg.Connection, *keys: str, name: str = "old") -> list[int]:
    """Write a row of each key and return the changes' ids."""
    ids = []
    for key in keys:
        connection.execute(
            "insert into people values (%s, %s) on conflict (id) do update set name = excluded.name || people.name",
            [key, name],
        )
        row = connection.execute("select max(change_id) from distributary.change_log").fetchone()
        assert row is not None
        ids.append(row[0])
    return ids


def bury(
    connection: psycopg.Connection, *change_ids: int, target: str = "crm", reason: str = "answered 422", days: int = 0
) -> None:
    connection.execute(
        "insert into distributary.dead_letter (target, change_id, stream, key, operation, reason, died_at)"
        " select %s, change_id, stream, key, operation, %s, now() - make_interval(days => %s)"
        " from distributary.change_log where change_id = any(%s)",
        [target, reason, days, list(change_ids)],
    )


def states(connection: psycopg.Connection) -> dict[tuple[str, int], str]:
    rows = connection.execute("select target, change_id, state from distributary.dead_letter")
    return {(target, change_id): state for target, change_id, state in rows}


def addressed(connection: psycopg.Connection, target: str = "crm") -> list[tuple[str, str, Any, int | None]]:
    rows = connection.execute(
        "select operation, key, payload ->> 'name', replays from distributary.change_log where target = %s"
        " order by change_id",
        [target],
    )
    return rows.fetchall()


STATE = Redrive(target="crm", stream="people", mode="state", whole_keys=False)
EVENT = Redrive(target="crm", stream="people", mode="event", whole_keys=False)


def test_a_state_is_redriven_as_the_source_has_it_now(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    """The row, once, however many of its changes are dead; or a delete, if it is gone."""
    ids = write(connection, "a", "b", "a", "c")
    bury(connection, *ids)
    write(connection, "a", name="new")
    connection.execute("delete from people where id = 'b'")

    steps = list(letters.redrive(Selection(), STATE, run_id="run"))

    assert sorted(addressed(connection)) == [
        ("delete", "b", "old", None),  # the row as it was
        ("snapshot", "a", "newoldold", None),
        ("snapshot", "c", "old", None),
    ]
    assert set(states(connection).values()) == {"redriven"}
    assert (sum(step.closed for step in steps), sum(step.appended for step in steps)) == (4, 3)


def test_an_event_is_redriven_as_it_was_under_its_own_name(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    """In the order of the originals; its time and its trace are the original's, for its body must be."""
    ids = write(connection, "b", "a", "b")
    bury(connection, *ids)
    write(connection, "a", "b", name="new")

    list(letters.redrive(Selection(), EVENT, run_id="run"))

    assert addressed(connection) == [
        ("insert", "b", "old", ids[0]),
        ("insert", "a", "old", ids[1]),
        ("update", "b", "oldold", ids[2]),
    ]
    times = connection.execute(
        "select count(distinct changed_at) from distributary.change_log where coalesce(replays, change_id) = any(%s)",
        [ids],
    ).fetchone()
    assert times == (3,)


def test_a_replay_that_is_dead_again_stands_for_its_original(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    (original,) = write(connection, "a")
    bury(connection, original)
    list(letters.redrive(Selection(), EVENT, run_id="first"))
    replay = connection.execute("select max(change_id) from distributary.change_log").fetchone()[0]  # type: ignore[index]
    bury(connection, replay)

    list(letters.redrive(Selection(), EVENT, run_id="second"))

    assert [replays for _, _, _, replays in addressed(connection)] == [original, original]


def test_what_is_selected_is_redriven_and_nothing_else(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    ids = write(connection, "a", "b", "c", "d", "e")
    bury(connection, ids[0])
    bury(connection, ids[1], reason="answered 400 (No SUCH country)")
    bury(connection, ids[2], days=3)
    bury(connection, ids[3], target="email")
    now = datetime.now(UTC)
    meant: list[tuple[Selection, list[int]]] = [
        (Selection(keys=["a"]), [ids[0]]),
        (Selection(change_ids=[ids[1]]), [ids[1]]),
        (Selection(reason="no such COUNTRY"), [ids[1]]),
        (Selection(until=now - timedelta(days=2)), [ids[2]]),
        (Selection(since=now - timedelta(days=2), keys=["a", "c"]), [ids[0]]),
        (Selection(targets=["email"]), [ids[3]]),
        (Selection(streams=["pets"]), []),
        (Selection(), ids[:4]),
    ]

    for selection, expected in meant:
        groups = letters.groups(selection)
        assert sum(group.count for group in groups) == len(expected)
    list(letters.redrive(Selection(reason="no such COUNTRY"), STATE, run_id="run"))

    assert states(connection) == {
        ("crm", ids[0]): "open",
        ("crm", ids[1]): "redriven",
        ("crm", ids[2]): "open",
        ("email", ids[3]): "open",
    }
    assert [key for _, key, _, _ in addressed(connection)] == ["b"]


def test_where_a_key_is_blocked_all_that_is_open_of_it_goes_together(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    """Or the rest would be blocked by what was left, or come after it."""
    ids = write(connection, "a", "a", "b")
    bury(connection, ids[0])
    bury(connection, ids[1], ids[2], reason="an earlier change of its key is dead (on_dead: block)")
    whole = Redrive(target="crm", stream="people", mode="event", whole_keys=True)

    list(letters.redrive(Selection(change_ids=[ids[0]]), whole, run_id="run"))

    assert [replays for _, _, _, replays in addressed(connection)] == ids[:2]
    assert states(connection)[("crm", ids[2])] == "open"


@pytest.mark.parametrize("how", [STATE, EVENT], ids=["state", "event"])
def test_an_interrupted_redrive_goes_on_where_it_stopped(
    connection: psycopg.Connection, letters: PostgresDeadLetters, how: Redrive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each letter is open, or closed with its record in the log: never one without the other, never twice."""
    monkeypatch.setattr("resources.postgres_dead_letters._KEYS_AT_ONCE", 2)
    ids = write(connection, *"abcdefg")
    bury(connection, *ids)
    connection.execute("delete from people where id in ('b', 'e')")

    first = letters.redrive(Selection(), how, run_id="first")
    next(first)
    first.close()  # type: ignore[attr-defined]
    closed = {change_id for (_, change_id), state in states(connection).items() if state == "redriven"}
    appended = {key for _, key, _, _ in addressed(connection)}
    assert 0 < len(closed) < 7
    assert appended == {"abcdefg"[ids.index(change_id)] for change_id in closed}

    list(letters.redrive(Selection(), how, run_id="second"))

    assert sorted(key for _, key, _, _ in addressed(connection)) == list("abcdefg")
    assert set(states(connection).values()) == {"redriven"}


def test_a_stream_without_a_table_has_no_state(letters: PostgresDeadLetters) -> None:
    with pytest.raises(CannotRedrive, match=r"pets is no table of source\.yaml"):
        list(
            letters.redrive(
                Selection(), Redrive(target="crm", stream="pets", mode="state", whole_keys=False), run_id="r"
            )
        )


def test_a_table_whose_lock_is_not_had_leaves_the_letters_open(
    connection: psycopg.Connection, letters: PostgresDeadLetters, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resources.source_rows._LOCK_TIMEOUT", "50ms")
    bury(connection, *write(connection, "a"))
    connection.execute("delete from people")
    with psycopg.connect(database) as writer:
        writer.execute("insert into people values ('z')")

        with pytest.raises(CannotRedrive, match="launch the redrive again"):
            list(letters.redrive(Selection(), STATE, run_id="run"))

    assert set(states(connection).values()) == {"open"}
    assert addressed(connection) == []


def test_what_is_discarded_is_closed_with_its_reason_and_not_sent(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    ids = write(connection, "a", "b")
    bury(connection, *ids)

    done = letters.discard(Selection(keys=["a"]), note="the account was closed", run_id="run")

    assert done == 1
    assert addressed(connection) == []
    rows = connection.execute("select change_id, state, note, run_id_closed from distributary.dead_letter order by 1")
    assert rows.fetchall() == [(ids[0], "discarded", "the account was closed", "run"), (ids[1], "open", None, None)]


def test_groups_say_how_many_why_since_when_and_some_keys(
    connection: psycopg.Connection, letters: PostgresDeadLetters
) -> None:
    ids = write(connection, *"abcdefgh")
    bury(connection, *ids[:7])
    bury(connection, ids[7], reason="answered 400")

    first, second = letters.groups(Selection())

    assert (first.target, first.stream, first.reason, first.count) == ("crm", "people", "answered 422", 7)
    assert list(first.example_keys) == list("abcde")
    assert first.oldest <= first.newest <= datetime.now(UTC)
    assert (second.reason, second.count) == ("answered 400", 1)
    assert list(second.example_keys) == ["h"]
