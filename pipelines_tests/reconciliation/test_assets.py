"""What Dagster is told: assets, checks, failures; and what a launch may set."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.reconciliation.assets import reconciliation_assets
from pipelines_tests.fakes.catalog import FakeTargetCatalog
from pipelines_tests.reconciliation.world import World, failing
from resources.postgres_ledger import PostgresLedger
from resources.postgres_workspace import PostgresWorkspaces

API = dg.AssetKey(["reconciliation", "api"])
PEOPLE = dg.AssetKey(["reconciliation", "api", "people"])
CHECKS = {"nothing_missing", "nothing_stale", "nothing_extra"}


@pytest.fixture
def world(database: str) -> Iterator[World]:
    with psycopg.connect(database, autocommit=True) as connection:
        made = World.made(database, connection)
        made.fill(5)
        yield made


def run(
    world: World,
    *,
    selection: Any = None,
    config: dict[str, Any] | None = None,
    misconfigured: dict[str, str] | None = None,
    **target: Any,
) -> dg.ExecuteInProcessResult:
    found = world.config().model_copy(update=target)
    catalog = FakeTargetCatalog([found], clients={"api": world.api.target}, misconfigured=misconfigured)
    return dg.materialize(
        reconciliation_assets([found]),
        selection=selection,
        run_config={"ops": {"reconcile_api": {"config": config}}} if config else None,
        resources={
            "ledger": PostgresLedger(world.url),
            "targets": catalog,
            "workspaces": PostgresWorkspaces(world.url, world.source),
            "source": world.source,
            "clock": world.clock,
        },
        raise_on_error=False,
    )


def materialized(result: dg.ExecuteInProcessResult) -> set[dg.AssetKey]:
    return {event.materialization.asset_key for event in result.get_asset_materialization_events()}


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    (event,) = result.get_step_failure_events()
    data = event.step_failure_data
    assert data.user_failure_data is not None
    return str(data.user_failure_data.description)


def test_all_of_a_target_is_materialized_and_checked(world: World) -> None:
    result = run(world)

    assert result.success
    assert materialized(result) == {API, PEOPLE}
    assert {name: one.passed for name, one in checks(result).items()} == dict.fromkeys({*CHECKS, "conservation"}, True)


def test_a_stream_alone_is_materialized_with_its_checks(world: World) -> None:
    result = run(world, selection=dg.AssetSelection.assets(PEOPLE))

    assert materialized(result) == {PEOPLE}
    assert set(checks(result)) == CHECKS


def test_a_check_may_be_executed_without_its_asset(world: World) -> None:
    del world.api.records["p01"]
    result = run(world, selection=dg.AssetSelection.checks(dg.AssetCheckKey(PEOPLE, "nothing_missing")))

    assert result.success
    assert materialized(result) == set()
    (found,) = checks(result).values()
    assert (found.check_name, found.passed, found.severity) == ("nothing_missing", False, dg.AssetCheckSeverity.ERROR)
    assert found.description == "1 of 5 records are not at the target, and not on their way"
    assert found.metadata["sample keys"].value == ["p01"]
    assert "repair: missing" in str(found.metadata["what to do"].value)


def test_numbers_are_plottable_and_no_payload_is_among_what_is_told(world: World) -> None:
    world.execute("update people set name = 'secret' where id = 'p01'")
    world.deliver()
    world.api.records["p01"]["name"] = "other secret"
    result = run(world, selection=dg.AssetSelection.assets(PEOPLE))

    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    numbers = {name: value.value for name, value in metadata.items() if isinstance(value.value, int | float)}
    assert (numbers["source rows"], numbers["stale"], numbers["matched ratio"]) == (5, 1, 0.8)
    assert "secret" not in str(metadata)
    assert "stale" in str(metadata["chart"].value)


def test_a_list_that_cannot_be_read_fails_the_run_and_says_nothing_of_records(world: World) -> None:
    world.api.before = lambda number, path: failing(404)
    result = run(world)

    assert not result.success
    assert materialized(result) == {API}
    assert set(checks(result)) == {"conservation"}
    assert failure(result).startswith("api/people: answered 404; mend read.path")


def test_a_target_that_is_not_critical_fails_no_run_and_warns(world: World) -> None:
    del world.api.records["p01"]
    warned = run(world, critical=False)
    world.api.before = lambda number, path: failing(404)
    unread = run(world, critical=False)

    assert warned.success
    assert checks(warned)["nothing_missing"].severity == dg.AssetCheckSeverity.WARN
    assert unread.success
    assert materialized(unread) == {API}


@pytest.mark.parametrize("status", ["paused", "disabled"])
def test_a_target_that_is_not_active_is_left_alone(world: World, status: str) -> None:
    result = run(world, status=status)

    assert result.success
    assert materialized(result) == set()
    assert world.api.paths == []


def test_a_secret_that_is_missing_is_told_and_the_changes_are_counted_all_the_same(world: World) -> None:
    result = run(world, misconfigured={"api": "the environment variable X is not set"})

    assert materialized(result) == {API}
    assert "the environment variable X is not set" in failure(result)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"repair": "everything"}, "'everything' is not one of off, missing, stale, all"),
        ({"repair": "missing", "delete_extra": True}, "goes with repair: all"),
        ({"max_repair_fraction": 7.0}, "is not from 0 to 1"),
    ],
)
def test_a_launch_that_cannot_be_meant_is_refused(world: World, config: dict[str, Any], said: str) -> None:
    assert said in failure(run(world, config=config))
    assert world.api.paths == []


def test_what_is_repaired_is_told(world: World) -> None:
    del world.api.records["p01"]
    result = run(world, selection=dg.AssetSelection.assets(PEOPLE), config={"repair": "missing"})

    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["repaired"].value == 1
    told = checks(result)["nothing_missing"]
    assert (told.passed, told.metadata["what to do"].value) == (
        False,
        "delivery brings them; the next reconciliation should be clean",
    )
    assert [key for _, key, _ in world.addressed()] == ["p01"]
