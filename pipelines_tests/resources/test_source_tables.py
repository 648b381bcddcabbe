"""A template's wrong column and a table without triggers are found before a record is harmed or a change missed."""

from pathlib import Path

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import TargetMisconfigured
from resources import migrate
from resources.source_tables import SourceTable, look_at_tables, uncaptured
from resources.target_files import FileTargetCatalog

SOURCE = "tables:\n  customers: {key: id}\n"
TARGET = """name: crm
base_url: http://127.0.0.1:9
routes:
  customers:
    record: {id: $id, email: $emial}
    upsert: {path: /contacts}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source.yaml").write_text(SOURCE)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "crm.yaml").write_text(TARGET)
    return tmp_path


@pytest.fixture
def with_table(database: str) -> str:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("create table customers (id int primary key, email text)")
    return database


def look(url: str, source: SourceConfig) -> dict[str, SourceTable]:
    with psycopg.connect(url) as connection:
        return look_at_tables(connection, source)


def test_a_column_that_the_table_lacks_stops_the_target_and_no_record_is_harmed(folder: Path, with_table: str) -> None:
    catalog = FileTargetCatalog.load(folder, lambda source: look(with_table, source))

    with pytest.raises(TargetMisconfigured, match=r"crm\.yaml: routes\.customers: .*'emial'.* did you mean 'email'\?"):
        catalog.destination("crm")


def test_a_table_without_triggers_is_a_problem_until_it_is_migrated(
    folder: Path, with_table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its changes would be written down by nobody, and every target would look up to date."""
    before = FileTargetCatalog.load(folder, lambda source: look(with_table, source))
    assert before.problems() == [
        "source.yaml: tables.customers: its changes are not captured; run `python -m resources.migrate`"
    ]

    monkeypatch.setenv("DATABASE_URL", with_table)
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", str(folder))
    assert migrate.main([]) == 2  # it captures, and then finds the template's column
    assert "did you mean 'email'?" in capsys.readouterr().err

    after = FileTargetCatalog.load(folder, lambda source: look(with_table, source))
    assert after.problems() == []


def test_a_stream_without_a_table_is_fed_by_hand_and_no_problem(folder: Path, database: str) -> None:
    catalog = FileTargetCatalog.load(folder, lambda source: look(database, source))

    assert catalog.problems() == []
    assert catalog.destination("crm").policy.target == "crm"


def test_a_trigger_that_was_disabled_captures_nothing(with_table: str) -> None:
    source = SourceConfig.model_validate({"tables": {"customers": {"key": "id"}}})
    with psycopg.connect(with_table, autocommit=True) as connection:
        migrate.install_capture(connection, source)
        assert uncaptured(look_at_tables(connection, source)) == []
        connection.execute('alter table customers disable trigger "!distributary"')

        assert uncaptured(look_at_tables(connection, source)) != []
