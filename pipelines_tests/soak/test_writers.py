"""The soak's writers count what they commit; the change log must come to the same count."""

import threading
from random import Random

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from resources.capture import install_capture
from soak import verdict, writers
from soak.schedule import BAD_KEYS
from soak.writers import Writer


@pytest.fixture
def source(database: str) -> str:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(writers.TABLES)
        tables = {name: {"key": "id"} for name in writers.STREAMS}
        install_capture(connection, SourceConfig.model_validate({"tables": tables}))
    return database


def test_what_is_counted_is_what_is_captured(source: str) -> None:
    """Over commits, rollbacks and deletions of two writers in turn; a rollback takes its counts with it."""
    stop = threading.Event()
    stop.set()  # nobody waits
    with psycopg.connect(source) as one, psycopg.connect(source) as other:
        sessions = [Writer(one, Random(1), name="1", stop=stop), Writer(other, Random(2), name="2", stop=stop)]
        for number in range(300):
            sessions[number % 2].transact()
        for writer in sessions:
            writer.stay_open(5.0)

    with psycopg.connect(source) as connection:
        truth = verdict.read_truth(connection, writers.STREAMS)
        drawn = connection.execute("select last_value from distributary.change_log_change_id_seq").fetchone()
        deletions = connection.execute(
            "select count(*) from distributary.change_log where operation = 'delete'"
        ).fetchone()
    assert verdict.capture_problems(truth) == []
    committed = sum(truth.written.values())
    assert committed > 300
    assert drawn is not None
    assert drawn[0] > committed, "some transactions were rolled back"
    assert deletions is not None
    assert deletions[0] > 20
    assert any(key in truth.written for key in BAD_KEYS)
    assert {key for key, ids in truth.captured.items() if len(ids) > 5}, "some keys are hot"
