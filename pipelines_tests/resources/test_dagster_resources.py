"""What ops and sensors are handed for their ports, and when it is looked for."""

from pathlib import Path

import dagster as dg
import pytest

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.ledger import Ledger
from resources.config_files import ConfigError
from resources.dagster_resources import LedgerResource, TargetCatalogResource
from resources.database import DatabaseUnreachable
from resources.postgres_ledger import PostgresLedger
from resources.target_files import FileTargetCatalog


@dg.op
def take_ports(ledger: dg.ResourceParam[Ledger], targets: dg.ResourceParam[TargetCatalog]) -> list[str]:
    """Use both ports as our ops do."""
    ledger.register({"crm": "beginning"})
    assert isinstance(ledger, PostgresLedger)
    assert isinstance(targets, FileTargetCatalog)
    return [state.target for state in targets.owed(ledger)]


@dg.job
def port_job() -> None:
    """Run the one op."""
    take_ports()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "targets").mkdir()
    (tmp_path / "source.yaml").write_text("tables: {people: {key: id}}\n")
    (tmp_path / "targets" / "crm.yaml").write_text(
        "name: crm\nbase_url: http://crm\nroutes: {people: {upsert: {path: /}}}\n"
    )
    return tmp_path


def test_an_op_that_asks_for_ports_gets_the_adapters(database, folder):
    resources = {"ledger": LedgerResource(url=database), "targets": TargetCatalogResource(folder=str(folder))}

    assert port_job.execute_in_process(resources=resources).output_for_node("take_ports") == ["crm"]


def test_unless_told_otherwise_they_are_those_that_the_environment_names(database, folder, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", str(folder))
    resources = {"ledger": LedgerResource(), "targets": TargetCatalogResource()}

    assert port_job.execute_in_process(resources=resources).output_for_node("take_ports") == ["crm"]


def test_files_changed_since_the_code_was_loaded_are_read_anew(folder):
    """A run goes by what the files say when its step starts, not by what the code server read weeks ago."""
    resource = TargetCatalogResource(folder=str(folder))
    (folder / "targets" / "crm.yaml").unlink()

    with dg.build_init_resource_context() as context, resource.yield_for_execution(context) as catalog:
        assert list(catalog.configs()) == []


def test_a_folder_that_does_not_exist_is_named_when_a_step_starts(monkeypatch):
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", "/nowhere/at/all")

    with (
        pytest.raises(ConfigError, match="DISTRIBUTARY_CONFIG is '/nowhere/at/all'"),
        dg.build_init_resource_context() as context,
        TargetCatalogResource().yield_for_execution(context),
    ):
        pass


def test_a_database_that_cannot_be_reached_is_told_when_it_is_asked_and_without_the_password(folder):
    """A step that only sends, or a page of the UI, does not fail for it."""
    resource = LedgerResource(url="postgresql://me:hunter2@127.0.0.1:9/shop")

    with dg.build_init_resource_context() as context, resource.yield_for_execution(context) as ledger:
        with pytest.raises(DatabaseUnreachable, match=r"Cannot reach the database 'shop' at 127\.0\.0\.1:9") as told:
            ledger.owed({"crm": ["people"]})
        assert "hunter2" not in str(told.value)
