"""The demo's changes, captured by the real triggers: what was done and what was captured must be the same number."""

import random
from collections.abc import Iterator

import psycopg
import pytest
import yaml
from psycopg import Connection

from demo import changes, dataset
from demo.ledger_counts import captured
from demo.processes import ROOT
from pipelines.changes.config import SourceConfig
from resources.capture import install_capture


class EnoughError(Exception):
    """Ends a trickle."""


@pytest.fixture
def source(database: str) -> Iterator[Connection]:
    watched = SourceConfig.model_validate(yaml.safe_load((ROOT / "resources" / "source.yaml").read_text()))
    with psycopg.connect(database, autocommit=True) as connection:
        dataset.create_tables(connection)
        install_capture(connection, watched)
        yield connection


def test_what_is_done_is_captured_and_nothing_else(source: Connection, database: str) -> None:
    """Also a late commit is; an update that changes nothing, one of an excluded column and a rollback are not."""
    loaded = dataset.load(source)
    assert loaded == {"airlines": 16, "airports": 1458, "planes": 3322, "flights": 20_013}
    expected = sum(loaded.values())
    assert captured(source) == expected

    with psycopg.connect(database, autocommit=True) as late:
        in_late = changes.open_late_transaction(late)
        expected += changes.a_day_passes(source)
        assert captured(source) == expected
        late.execute("commit")
    after, refused = changes.one_bad_among_good(source)
    expected += in_late + after
    assert captured(source) == expected
    assert refused.before["seats"] > 0

    rng, left = random.Random(1), iter(range(300))

    def sleep(_: float) -> None:
        if next(left, None) is None:
            raise EnoughError

    with pytest.raises(EnoughError):
        changes.trickle(source, per_second=1.0, rng=rng, sleep=sleep)
    assert captured(source) > expected


def test_what_stays_at_home_is_not_in_the_change_log(source: Connection) -> None:
    dataset.load(source)
    row = source.execute(
        "select count(*), count(*) filter (where payload ? 'internal_note') from distributary.change_log "
        "where stream = 'planes'"
    ).fetchone()
    assert row == (3322, 0)
