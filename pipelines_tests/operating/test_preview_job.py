"""`preview_job`: what is said to come next is what is then sent, nothing is sent or written for it, and masks hold."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import Destination, policy_of
from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.routing import Transform, compile_routes
from pipelines.operating.jobs import preview_job
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.target import ScriptedTarget
from resources.capture import install_capture
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader
from resources.system_clock import SystemClock

SOURCE = SourceConfig.model_validate({"tables": {"people": {"key": "id"}}})
ROUTES: Any = {
    "people": {
        "record": {"id": "$id", "contact": {"mail": "$email"}, "name": "$name"},
        "upsert": {"path": "/people", "batch": {"max_records": 2}},
        "delete": {"path": "/people/${_key}"},
    }
}


class World:
    def __init__(self, url: str, connection: psycopg.Connection, **target: Any) -> None:
        self.connection = connection
        self.target = ScriptedTarget()
        config = target_config("crm", **{"routes": ROUTES, **target})
        self.resources: dict[str, Any] = {
            "ledger": PostgresLedger(url),
            "targets": FakeTargetCatalog(
                [config], clients={"crm": self.target}, misconfigured=target.get("misconfigured")
            ),
            "clock": SystemClock(),
            "loader": PostgresLoader(url, SOURCE),
            "source": SOURCE,
        }
        self.resources["targets"].owed(self.resources["ledger"])

    def write(self, *people: tuple[str, str]) -> None:
        for key, name in people:
            self.connection.execute(
                "insert into people values (%s, %s, %s) on conflict (id) do update set name = excluded.name",
                [key, name, f"{name.lower()}@example.org"],
            )

    def preview(self, **config: Any) -> Any:
        return preview_job.execute_in_process(
            run_config={"ops": {"preview": {"config": config}}}, resources=self.resources, raise_on_error=False
        )

    def deliver(self) -> None:
        delivery_job.execute_in_process(resources=self.resources, raise_on_error=False)

    def ledger_rows(self) -> list[Any]:
        """Return all that is in the ledger, and when it was written."""
        return [
            self.connection.execute(f"select t.*, t.xmin::text from distributary.{table} t order by 1").fetchall()  # type: ignore[call-overload]
            for table in ("target_state", "batch", "dead_letter", "change_log")
        ]


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table people (id text primary key, name text, email text)")
        install_capture(connection, SOURCE)
        yield connection


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    return lambda: capsys.readouterr().out.splitlines()


def test_what_is_shown_is_what_is_then_sent(database: str, connection: psycopg.Connection, said: Any):
    world = World(database, connection)
    world.write(("1", "Ada"), ("2", "Bea"), ("3", "Cyd"), ("1", "Ada B."))
    connection.execute("delete from people where id = '2'")
    before = world.ledger_rows()

    done = world.preview(requests=10)

    assert done.success
    lines = said()
    assert lines[0] == "crm: of 5 changes that are owed"
    assert lines[1:4] == ["  people delete: 1 in 1 request", "  people upsert: 2 in 1 request", "  superseded: 2"]
    assert (world.target.sent, world.ledger_rows()) == ([], before)
    world.deliver()
    sent = [(f"  {one.request.method} {one.path}", (one.body or b"").decode()) for one in world.target.sent]
    for start, body in sent:
        assert any(line.startswith(start) for line in lines)
        assert not body or f"    {body}" in lines


def test_chosen_columns_are_masked_wherever_they_go(database: str, connection: psycopg.Connection, said: Any):
    world = World(database, connection)
    world.write(("1", "Ada"), ("2", "Bea"))
    connection.execute("delete from people where id = '2'")

    world.preview(mask=["email", "_key"])

    text = "\n".join(said())
    assert '{"id":"1","contact":{"mail":"***"},"name":"Ada"}' in text
    assert "@example.org" not in text
    assert "DELETE /people/***" in text or "DELETE /people/%2A%2A%2A" in text


def test_a_masked_key_is_shown_nowhere(database: str, connection: psycopg.Connection, said: Any):
    """Not as the key of what would be refused, and not because the mask names its column and not `_key`."""
    record = {"id": "$id", "name": "$name", "nick": "$nick"}
    deleting = {"path": "/people/${_key}"}
    routes = {"people": {"record": record, "upsert": {"path": "/people"}, "delete": {**deleting, "record": {}}}}
    for mask in ("_key", "id"):
        world = World(database, connection, routes=routes)
        world.write((f"secret-{mask}", "Ada"), (f"secret-{mask}-too", "Bea"))
        connection.execute("delete from people where id = %s", [f"secret-{mask}"])

        done = world.preview(mask=[mask], requests=10)

        text = "\n".join(said())
        assert done.success
        assert "would be dead letters" in text
        assert "DELETE /people/" in text
        assert "secret" not in text


def test_fields_inside_of_a_column_are_masked_too(database: str, connection: psycopg.Connection, said: Any):
    connection.execute("alter table people add contact jsonb")
    world = World(database, connection, routes={"people": {"upsert": {"path": "/people"}}})
    contact = '{"phones": [{"number": "secret"}], "email": "secret", "size": 1.10}'
    connection.execute("insert into people values ('1', 'Ada', 'x', %s)", [contact])

    world.preview(mask=["email", "number"])

    text = "\n".join(said())
    assert '"phones":[{"number":"***"}]' in text
    assert '"size":1.10' in text
    assert "secret" not in text


def test_a_mask_that_hides_nothing_is_refused_and_nothing_shown(
    database: str, connection: psycopg.Connection, said: Any
):
    world = World(database, connection)
    world.write(("1", "Ada"))

    done = world.preview(mask=["name", "emial"])

    assert not done.success
    (failure,) = [one for one in done.all_events if one.event_type_value == "STEP_FAILURE"]
    assert "ops.preview.config.mask: no change that is owed has a column or field emial" in str(
        failure.event_specific_data
    )
    assert said() == []


def test_where_nothing_is_owed_there_is_nothing_to_hide(database: str, connection: psycopg.Connection, said: Any):
    assert World(database, connection).preview(mask=["emial"]).success
    assert said() == ["crm: of 0 changes that are owed"]


def test_a_column_that_a_table_has_may_be_masked_though_no_change_has_it(
    database: str, connection: psycopg.Connection, said: Any
):
    """A deletion may hold nothing but its key."""
    world = World(database, connection)
    connection.execute(
        "insert into distributary.change_log (stream, key, operation, payload) values ('people', '1', 'delete', '{}')"
    )

    world.resources["targets"].columns = lambda: frozenset({"id", "name", "email"})

    assert world.preview(mask=["email"]).success
    assert "  people delete: 1 in 1 request" in said()


def test_what_cannot_be_rendered_is_named(database: str, connection: psycopg.Connection, said: Any):
    routes = {"people": {"record": {"id": "$id", "nick": "$nick"}, "upsert": {"path": "/people"}}}
    world = World(database, connection, routes=routes)
    world.write(("1", "Ada"), ("2", "Bea"))

    done = world.preview()

    lines = said()
    assert lines[0] == "crm: of 2 changes that are owed"
    assert lines[1].startswith("  people: 2 would be dead letters: ")
    assert lines[1].endswith("(1, 2)")
    assert "nick" in lines[1]
    assert done.output_for_node("preview") is None
    (event,) = [one for one in done.all_node_events if one.event_type_value == "STEP_OUTPUT"]
    assert event.event_specific_data.metadata["refused"].value == 2


def test_what_is_claimed_comes_first(database: str, connection: psycopg.Connection, said: Any):
    world = World(database, connection)
    world.target._then = 503
    world.write(("1", "Ada"))
    world.deliver()
    world.write(("2", "Bea"))
    said()

    world.preview()

    lines = said()
    assert lines[:2] == ["crm: of 2 changes that are owed", "  people upsert: 2 in 2 requests"]
    assert "Ada" in lines[3]
    assert "Bea" in lines[5]


def test_no_more_is_looked_at_than_is_asked_for(database: str, connection: psycopg.Connection, said: Any):
    world = World(database, connection)
    world.write(*((str(n), "Ada") for n in range(7)))

    world.preview(records=4, requests=0)

    assert said() == ["crm: of the first 4 changes that are owed", "  people upsert: 4 in 2 requests"]


def test_a_target_that_is_not_there_is_named(database: str, connection: psycopg.Connection):
    done = World(database, connection).preview(targets=["cmr"])

    assert not done.success
    (failure,) = [one for one in done.all_events if one.event_type_value == "STEP_FAILURE"]
    assert "there is no target cmr; configured are: crm." in str(failure.event_specific_data)


def shout(change: dict[str, Any]) -> Any:
    """Return the mail in capitals; one of a single letter is refused, and told."""
    mail = change["row"]["email"]
    if len(mail) == 1:
        raise ValueError(f"{mail} is no mail")
    return {"mail": mail.upper()}


def test_what_a_transform_says_of_a_masked_value_is_not_shown(database: str, connection: psycopg.Connection, said: Any):
    routes = {"people": {"transform": "m:shout", "upsert": {"path": "/people"}}}
    world = World(database, connection, routes=routes)
    catalog = world.resources["targets"]
    config = catalog.configs()["crm"]
    destination = Destination(
        policy=policy_of(config),
        routes=compile_routes(config, {"m:shout": Transform(name="m:shout", function=shout)}),
        connect=world.target.connect,
    )
    catalog.destination = lambda _: destination
    world.write(("1", "Ada"))
    connection.execute("insert into people values ('2', 'Bea', '§')")

    world.preview(mask=["email"])

    text = "\n".join(said())
    assert "1 would be dead letters: for the sake of a value that is masked (2)" in text
    assert '{"mail":"***"}' in text
    assert "§" not in text
    world.preview()
    assert "ValueError: § is no mail" in "\n".join(said())
