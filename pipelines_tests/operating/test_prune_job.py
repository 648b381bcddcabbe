"""`prune_job` in one process, over a real database: what it removes and what it says."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.jobs import delivery_job
from pipelines.operating.jobs import prune_job
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.loader import FakeLoader
from resources.postgres_ledger import PostgresLedger
from resources.postgres_pruner import PostgresPruner
from resources.system_clock import SystemClock


def prune(database: str, **source: Any) -> dg.ExecuteInProcessResult:
    catalog = FakeTargetCatalog([target_config("crm")])
    resources: dict[str, Any] = {
        "ledger": PostgresLedger(database),
        "targets": catalog,
        "clock": SystemClock(),
        "loader": FakeLoader(FakeLedger()),
    }
    delivery_job.execute_in_process(resources=resources)
    return prune_job.execute_in_process(
        resources={
            "pruner": PostgresPruner(database),
            "source": SourceConfig.model_validate({"tables": {"people": {"key": "id"}}, **source}),
            "targets": catalog,
            "clock": SystemClock(),
        }
    )


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out.splitlines()[-1]


@pytest.fixture
def ten_days_old(database: str) -> int:
    with psycopg.connect(database, autocommit=True) as connection:
        return connection.execute(
            "insert into distributary.change_log (stream, key, operation, payload, changed_at)"
            " select 'people', n::text, 'insert', '{}', now() - interval '10 days' from generate_series(1, 7) n"
        ).rowcount


@pytest.mark.usefixtures("ten_days_old")
def test_what_is_older_than_retention_days_is_removed(database: str, said: Callable[[], str]) -> None:
    prune(database, retention_days=30)
    assert said() == "0 changes and 0 batches older than 30 days removed."

    result = prune(database, retention_days=9)

    assert said() == "7 changes and 0 batches older than 9 days removed."
    (output,) = [event for event in result.all_node_events if event.is_successful_output]
    assert output.step_output_data.metadata["changes"].value == 7


@pytest.mark.usefixtures("ten_days_old")
def test_without_retention_days_nothing_is_removed(database: str, said: Callable[[], str]) -> None:
    prune(database)

    assert said() == "The log is kept for ever: source.yaml sets no retention_days."
