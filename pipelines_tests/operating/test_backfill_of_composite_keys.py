"""Days of a stream whose key is two columns, a number and a text, sent again over a real database."""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
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

SOURCE = SourceConfig.model_validate({"tables": {"stock": {"key": ["shop", "code"]}}})
RECORD = {"shop": "$shop", "code": "$code", "amount": "$amount"}
FIRST = date(2026, 3, 1)

# Texts that a separator or a quote inside of them could mix up, and numbers that sort otherwise as texts.
KEYS = [(1, "a"), (2, "a"), (10, "a"), (1, "a,1"), (1, 'b "x"'), (-1, ""), (1, "1"), (11, "ä/ö]"), (1, "\\n")]

Sent = tuple[str, int, str, int]


class World:
    """A source with the stock of shops, a target that takes it, and Dagster in one process."""

    def __init__(self, url: str, connection: psycopg.Connection, *, mode: str) -> None:
        self.connection = connection
        self.target = ScriptedTarget()
        route = {
            "mode": mode,
            "record": RECORD,
            "upsert": {"path": "/stock"},
            "delete": {"path": "/stock/${_key}", "record": RECORD},
        }
        config = target_config("crm", routes={"stock": route})
        (self.asset,) = sync_assets([config])
        self.backfiller = PostgresBackfiller(url, SOURCE)
        self.resources: dict[str, Any] = {
            "ledger": PostgresLedger(url),
            "targets": FakeTargetCatalog([config], clients={"crm": self.target}),
            "clock": SystemClock(),
            "loader": PostgresLoader(url, SOURCE),
            "backfiller": self.backfiller,
        }

    def write(self, shop: int, code: str, amount: int | None, *, day: int) -> None:
        """Change what a shop has of something, on the *day*th day of the story; None: it has it no more."""
        if amount is None:
            self.connection.execute("delete from stock where (shop, code) = (%s, %s)", [shop, code])
        else:
            self.connection.execute(
                "insert into stock values (%s, %s, %s) on conflict (shop, code) do update set amount = excluded.amount",
                [shop, code, amount],
            )
        self.connection.execute(
            "update distributary.change_log set changed_at = %s"
            " where change_id = (select max(change_id) from distributary.change_log)",
            [FIRST + timedelta(days=day)],
        )

    def deliver(self) -> list[tuple[Sent, str]]:
        before = len(self.target.sent)
        assert delivery_job.execute_in_process(resources=self.resources).success
        return self.sent(before)

    def send_again(self, day: int) -> list[tuple[Sent, str]]:
        """Materialize a day; return what the target was sent and under which keys."""
        before = len(self.target.sent)
        key = (FIRST + timedelta(days=day)).isoformat()
        assert dg.materialize([self.asset], resources=self.resources, partition_key=key).success
        return self.sent(before)

    def sent(self, since: int) -> list[tuple[Sent, str]]:
        found: list[tuple[Sent, str]] = []
        for request in self.target.sent[since:]:
            record = json.loads(request.body or b"")
            found.append(((request.request.method, record["shop"], record["code"], record["amount"]), str(request.key)))
        return found


@pytest.fixture
def connection(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection]:
    monkeypatch.setattr("resources.postgres_backfiller._AT_ONCE", 2)  # so that there are several steps
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table stock (shop int, code text, amount int, primary key (shop, code))")
        install_capture(connection, SOURCE)
        yield connection


def test_in_mode_state_each_is_sent_as_it_is_now(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="state")
    for shop, code in KEYS:
        world.write(shop, code, 5, day=0)
    world.write(3, "a", 5, day=1)
    world.deliver()
    world.write(10, "a", 6, day=1)
    world.write(1, 'b "x"', None, day=1)
    world.deliver()

    again = [record for record, _ in world.send_again(0)]

    now = {(shop, code): amount for shop, code, amount in connection.execute("select * from stock") if shop != 3}
    assert len(again) == len(KEYS)
    assert {(shop, code): amount for method, shop, code, amount in again if method == "POST"} == now
    assert [record for record in again if record[0] == "DELETE"] == [("DELETE", 1, 'b "x"', 5)]


def test_in_mode_event_they_are_sent_themselves_under_their_own_keys(database: str, connection: psycopg.Connection):
    world = World(database, connection, mode="event")
    for shop, code in KEYS:
        world.write(shop, code, 5, day=0)
    world.write(1, "a", None, day=0)
    world.write(1, "a", 7, day=0)
    first = world.deliver()
    world.write(10, "a", 6, day=1)
    world.deliver()

    assert world.send_again(0) == first
    assert [record for record, _ in first[-2:]] == [("DELETE", 1, "a", 5), ("POST", 1, "a", 7)]


@pytest.mark.parametrize("mode", ["state", "event"])
def test_one_that_is_interrupted_goes_on_with_no_gap(database: str, connection: psycopg.Connection, mode: Any):
    world = World(database, connection, mode=mode)
    for shop, code in KEYS:
        world.write(shop, code, 5, day=0)
    world.deliver()
    since = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
    backfill = Backfill(target="crm", stream="stock", mode=mode, since=since, until=since + timedelta(days=1))
    steps = world.backfiller.run(backfill, run_id="interrupted")
    assert [next(steps).done for _ in range(3)] == [False] * 3
    steps.close()  # type: ignore[attr-defined]

    again = [record[1:3] for record, _ in world.send_again(0)]

    assert sorted(again) == sorted(KEYS)
