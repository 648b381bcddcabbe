"""Days of a sync asset, materialized in one process over a real database: what is sent again, and what is not."""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from threading import Condition
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.jobs import delivery_job
from pipelines.operating.assets import sync_assets
from pipelines.operating.backfilling import Backfill
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.target import ScriptedTarget
from resources.capture import install_capture
from resources.postgres_backfiller import PostgresBackfiller
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader
from resources.system_clock import SystemClock

SOURCE = SourceConfig.model_validate({"tables": {"people": {"key": "id"}}})
FIRST = date(2026, 3, 1)


class World:
    """A source with people, a target that takes them, and Dagster in one process."""

    def __init__(self, url: str, connection: psycopg.Connection, *, mode: str, **target: Any) -> None:
        self.connection, self.url = connection, url
        self.status = 200
        self.target = ScriptedTarget(lambda _: self.status)
        delete = {"path": "/people/${_key}", "record": {"name": "$name", "gone": True}}
        routes = {"people": {"mode": mode, "upsert": {"path": "/people"}, "delete": delete}}
        config = target_config("crm", routes=routes, dead_letter_guard=1, **target)
        (self.asset,) = sync_assets([config])
        self.resources: dict[str, Any] = {
            "ledger": PostgresLedger(url),
            "targets": FakeTargetCatalog([config], clients={"crm": self.target}),
            "clock": SystemClock(),
            "loader": PostgresLoader(url, SOURCE),
            "backfiller": PostgresBackfiller(url, SOURCE),
        }

    def write(self, key: str, name: str | None, *, day: int) -> None:
        """Change one person, on the *day*th day of the story; no name is a deletion."""
        if name is None:
            self.connection.execute("delete from people where id = %s", [key])
        else:
            self.connection.execute(
                "insert into people values (%s, %s) on conflict (id) do update set name = excluded.name", [key, name]
            )
        self.connection.execute(
            "update distributary.change_log set changed_at = %s"
            " where change_id = (select max(change_id) from distributary.change_log)",
            [FIRST + timedelta(days=day, hours=0)],
        )

    def deliver(self) -> list[tuple[str, str, str]]:
        """Run `delivery_job`; return method, name and idempotency key of what the target was sent."""
        before = len(self.target.sent)
        delivery_job.execute_in_process(resources=self.resources, raise_on_error=False)
        return self.sent(before)

    def materialize(
        self, first: int, last: int, *, instance: dg.DagsterInstance | None = None, backfill: str | None = None
    ) -> tuple[dg.ExecuteInProcessResult, list[tuple[str, str, str]]]:
        """Materialize the days from *first* to *last*, as a backfill does."""
        before = len(self.target.sent)
        days = {
            "dagster/asset_partition_range_start": (FIRST + timedelta(days=first)).isoformat(),
            "dagster/asset_partition_range_end": (FIRST + timedelta(days=last)).isoformat(),
        }
        tags = days if backfill is None else {**days, "dagster/backfill": backfill}
        done = dg.materialize(
            [self.asset], resources=self.resources, tags=tags, instance=instance, raise_on_error=False
        )
        return done, self.sent(before)

    def sent(self, since: int) -> list[tuple[str, str, str]]:
        return [
            (
                request.request.method,
                json.loads(request.body)["name"],
                str(request.key),
            )
            for request in self.target.sent[since:]
        ]


class Ending(SystemClock):
    """Time in which, whenever it is waited, one run more ends: the last first."""

    def __init__(self, instance: dg.DagsterInstance, runs: list[str]) -> None:
        self._instance, self.left = instance, list(runs)

    def wait(self, condition: Condition, seconds: float | None) -> None:
        if self.left:
            self._instance.delete_run(self.left.pop())
        else:
            super().wait(condition, seconds)


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table people (id text primary key, name text)")
        install_capture(connection, SOURCE)
        yield connection


def told(sent: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    return [(method, what) for method, what, _ in sent]


def test_of_a_route_of_states_the_keys_of_those_days_are_sent_as_they_are_now(
    database: str, connection: psycopg.Connection
):
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=0)
    world.write("2", "Bea", day=1)
    world.write("3", "Cyd", day=1)
    world.write("4", "Dan", day=2)
    world.deliver()
    world.write("2", "Bea B.", day=5)
    world.write("3", None, day=5)
    world.deliver()

    done, sent = world.materialize(1, 1)

    assert done.success
    assert sorted(told(sent)) == [("DELETE", "Cyd"), ("POST", "Bea B.")]
    (event,) = [event for event in done.get_asset_materialization_events() if event.partition == "2026-03-02"]
    assert event.materialization.metadata["sent again"].value == 2
    assert world.resources["ledger"].conservation("crm").holds


def test_of_a_route_of_events_they_are_sent_themselves_in_order_under_their_own_keys(
    database: str, connection: psycopg.Connection
):
    world = World(database, connection, mode="event")
    for day, (key, name) in enumerate([("1", "Ada"), ("1", "Ada B."), ("2", "Bea"), ("1", None), ("1", "Ada C.")]):
        world.write(key, name, day=day)
    first = world.deliver()

    done, sent = world.materialize(1, 3)

    assert done.success
    assert sent == first[1:4]
    assert told(sent) == [("POST", "Ada B."), ("POST", "Bea"), ("DELETE", "Ada B.")]


def test_a_replay_is_not_replayed(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="event")
    world.write("1", "Ada", day=0)
    world.deliver()
    world.materialize(0, 0)

    _, sent = world.materialize(0, 0)

    assert told(sent) == [("POST", "Ada")]


@pytest.mark.parametrize(("mode", "counts"), [("state", [1, 2, 0, 1]), ("event", [3, 3, 0, 1])])
def test_each_day_tells_its_own_number_and_that_of_the_run(
    database: str, connection: psycopg.Connection, mode: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
):
    """A state counts on the day on which its key changed last."""
    monkeypatch.setattr("resources.postgres_backfiller._AT_ONCE", 2)
    world = World(database, connection, mode=mode)
    for version, (day, key) in enumerate([(0, "1"), (0, "2"), (0, "3"), (1, "1"), (1, "1"), (1, "2"), (3, "4")]):
        world.write(key, f"{key} for the {version}th time", day=day)
    connection.execute("delete from people where id = '2'")
    world.deliver()

    first, _ = world.materialize(0, 1)
    second, _ = world.materialize(0, 3)

    assert [first.success, second.success] == [True, True]
    for run, days in ((first, 2), (second, 4)):
        told = {
            event.partition: (metadata["sent again"].value, metadata["sent again by this run"].value)
            for event in run.get_asset_materialization_events()
            if "sent again" in (metadata := event.materialization.metadata)  # the others are of the delivery
        }
        assert told == {
            (FIRST + timedelta(days=day)).isoformat(): (counts[day], sum(counts[:days])) for day in range(days)
        }


def test_days_without_changes_send_nothing(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=0)
    world.deliver()

    done, sent = world.materialize(3, 9)

    assert (done.success, sent) == (True, [])
    assert {event.partition for event in done.get_asset_materialization_events()} == {
        (FIRST + timedelta(days=day)).isoformat() for day in range(3, 10)
    }


def test_a_target_that_is_down_gets_them_later(database: str, connection: psycopg.Connection):
    """They are in the log: the run fails, and whichever delivers next brings them."""
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=0)
    world.deliver()
    world.status = 503

    done, _ = world.materialize(0, 0)
    world.status = 200

    assert not done.success
    (failure,) = [event for event in done.all_events if event.event_type_value == "STEP_FAILURE"]
    assert "crm: 1 records were appended, and are delivered once it is well" in str(failure.event_specific_data)
    assert told(world.deliver()) == [("POST", "Ada")]


def test_a_target_that_was_never_delivered_to_is_named(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=0)

    done, sent = world.materialize(0, 0)

    assert (done.success, sent) == (False, [])


def test_what_is_refused_fails_the_run(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=0)
    world.write("2", "Bea", day=0)
    world.deliver()
    world.status = 422

    done, _ = world.materialize(0, 0)

    assert not done.success
    (failure,) = [event for event in done.all_events if event.event_type_value == "STEP_FAILURE"]
    assert "2 records were appended and 2 dead-lettered (2 x answered 422); see dead_letters" in str(
        failure.event_specific_data
    )


def test_a_row_that_others_hold_for_long_is_waited_for_and_the_others_are_appended_once(
    database: str, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("resources.source_rows._LOCK_TIMEOUT", "20ms")
    monkeypatch.setattr("resources.postgres_backfiller._PAUSE", 0.01)
    world = World(database, connection, mode="state")
    for key in "abcdefg":
        world.write(key, key.upper(), day=0)
    world.deliver()
    since = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
    backfill = Backfill(target="crm", stream="people", mode="state", since=since, until=since + timedelta(days=1))
    steps = world.resources["backfiller"].run(backfill, run_id="run")
    with psycopg.connect(database) as writer:
        writer.execute("update people set name = 'newer' where id = 'd'")
        waited = [next(steps).appended for _ in range(5)]
        writer.commit()
    last = list(steps)[-1]

    assert waited == [6] * 5
    assert (last.appended, last.done) == (7, True)
    addressed = connection.execute(
        "select key from distributary.change_log where target is not null order by change_id"
    ).fetchall()
    assert sorted(key for (key,) in addressed) == list("abcdefg")
    assert addressed[-1] == ("d",)


@pytest.mark.parametrize("status", ["paused", "disabled"])
def test_a_target_whose_file_says_to_leave_it_alone_is_left_alone(
    database: str, connection: psycopg.Connection, status: str
):
    """Nothing is appended either: it would all go out at once, and without being asked for, when it is active again."""
    World(database, connection, mode="state").deliver()
    world = World(database, connection, mode="state", status=status)
    world.write("1", "Ada", day=0)

    done, sent = world.materialize(0, 0)

    assert (done.success, sent) == (False, [])
    (failure,) = [event for event in done.all_events if event.event_type_value == "STEP_FAILURE"]
    assert f"crm: its file has status: {status}, so nothing is appended or sent" in str(failure.event_specific_data)
    addressed = connection.execute("select * from distributary.change_log where target is not null").fetchall()
    assert addressed == []


@pytest.mark.parametrize("mode", ["state", "event"])
def test_one_that_is_interrupted_goes_on_where_it_was(
    database: str, connection: psycopg.Connection, mode: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("resources.postgres_backfiller._AT_ONCE", 2)
    world = World(database, connection, mode=mode)
    for key in "abcdefg":
        world.write(key, key.upper(), day=0)
    world.deliver()
    days = world.asset.partitions_def.time_window_for_partition_key(FIRST.isoformat())  # type: ignore[union-attr, attr-defined]
    backfill = Backfill(target="crm", stream="people", mode=mode, since=days.start, until=days.end)
    interrupted = world.resources["backfiller"].run(backfill, run_id="interrupted")
    next(interrupted)
    next(interrupted)
    interrupted.close()
    connection.execute("update people set name = 'newer' where id in ('a', 'g')")

    done, sent = world.materialize(0, 0)

    assert done.success
    again = [event.materialization.metadata.get("sent again") for event in done.get_asset_materialization_events()]
    assert [count.value for count in again if count is not None] == [7]  # with those of the run before
    names = [name for _, name in told(sent)]
    if mode == "state":
        assert sorted(names) == ["B", "C", "D", "E", "F", "newer", "newer"]
    else:
        # What was appended goes out first, as it was; then what was changed meanwhile; then the rest.
        assert sorted(names) == ["A", "B", "C", "D", "E", "F", "G", "newer", "newer"]


def test_while_another_run_is_at_it_one_waits(
    database: str, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("resources.postgres_backfiller._LOOK_AGAIN", 0.01)
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=0)
    world.deliver()
    since = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
    backfill = Backfill(target="crm", stream="people", mode="state", since=since, until=since + timedelta(days=1))
    steps = world.resources["backfiller"].run(backfill, run_id="run")
    with psycopg.connect(database) as other:
        other.execute("select pg_advisory_lock(hashtextextended('distributary backfill crm/people', 0))")
        waited = [next(steps) for _ in range(5)]
        assert connection.execute("select from distributary.backfill").fetchall() == []
    last = list(steps)[-1]

    assert {(one.appended, one.waiting, one.done) for one in waited} == {(0, True, False)}
    assert (last.appended, last.waiting, last.done) == (1, False, True)


def test_of_one_backfill_the_earlier_days_go_first(database: str, connection: psycopg.Connection):
    """Runs of days that are not next to one another are there at once: neither is behind for ever."""
    world = World(database, connection, mode="event")
    world.write("1", "Ada", day=0)
    world.deliver()
    with dg.DagsterInstance.ephemeral() as instance:
        job = dg.Definitions(assets=[world.asset], resources=world.resources).resolve_implicit_global_asset_job_def()

        def run_of(day: int, *, backfill: str, status: dg.DagsterRunStatus) -> str:
            of_day = (FIRST + timedelta(days=day)).isoformat()
            tags = {
                "dagster/backfill": backfill,
                "dagster/asset_partition_range_start": of_day,
                "dagster/asset_partition_range_end": of_day,
            }
            selected = frozenset({world.asset.key})
            return instance.create_run_for_job(job, tags=tags, status=status, asset_selection=selected).run_id

        earlier = [
            run_of(1, backfill="b", status=dg.DagsterRunStatus.STARTED),
            run_of(2, backfill="b", status=dg.DagsterRunStatus.NOT_STARTED),
        ]
        run_of(1, backfill="other", status=dg.DagsterRunStatus.STARTED)
        run_of(9, backfill="b", status=dg.DagsterRunStatus.STARTED)
        clock = Ending(instance, earlier)
        world.resources["clock"] = clock

        done, _ = world.materialize(5, 5, instance=instance, backfill="b")

        waited = [
            record.user_message for record in instance.all_logs(done.run_id) if "waits for run" in record.user_message
        ]
    assert done.success
    assert clock.left == []
    assert [any(run in line for line in waited) for run in earlier] == [True, True]
    assert len(waited) == 2


def test_what_was_pruned_is_said_to_be_missing(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="state")
    world.write("1", "Ada", day=4)
    world.deliver()
    connection.execute("update distributary.target_state set pruned = 3, accepted = accepted + 3")

    done, _ = world.materialize(0, 5)
    all_there, _ = world.materialize(4, 5)

    def said(run: dg.ExecuteInProcessResult) -> dict[str | None, Any]:
        told = ((event.partition, event.materialization.metadata) for event in run.get_asset_materialization_events())
        return {day: metadata["not sent again"].value for day, metadata in told if "not sent again" in metadata}

    assert set(said(done)) == {f"2026-03-0{day}" for day in range(1, 5)}
    assert "Of what was made before 2026-03-05 00:00 UTC some is no longer in the log" in said(done)["2026-03-01"]
    assert said(all_there) == {}
