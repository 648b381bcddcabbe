"""Who keeps changes in the log."""

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.operating.pruning import Holder, who_holds
from pipelines_tests.fakes.catalog import target_config

NOW = datetime(2026, 2, 1, tzinfo=UTC)
CONFIGS = {
    "crm": target_config("crm"),
    "paused": target_config("paused", status="paused"),
    "off": target_config("off", status="disabled"),
}


def holder(target: str, *, status: str = "active", days: int = 100) -> Holder:
    return Holder(target=target, status=status, last_active=NOW - timedelta(days=days))  # type: ignore[arg-type]


def test_who_is_served_keeps_what_it_has_not_settled_however_long_it_is_quiet() -> None:
    """A paused target too: it is to get everything once it is well."""
    holders = [holder("crm"), holder("paused"), holder("crm", status="paused")]

    found = who_holds(holders, CONFIGS, now=NOW, drop_after=timedelta(days=1))

    assert (found.holding, found.dropped, found.remarks) == (["crm", "paused", "crm"], [], [])


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (holder("off", days=9), "it is disabled in its file"),
        (holder("crm", status="disabled", days=9), "it is disabled"),
        (holder("gone", days=9), "it has no file any more"),
    ],
)
def test_who_is_not_served_keeps_it_for_drop_after_and_is_named(one: Holder, why: str) -> None:
    kept = who_holds([one], CONFIGS, now=NOW, drop_after=timedelta(days=10))
    dropped = who_holds([one], CONFIGS, now=NOW, drop_after=timedelta(days=9))
    for_ever = who_holds([one], CONFIGS, now=NOW, drop_after=None)

    assert kept.holding == [one.target]
    assert kept.remarks == [f"{one.target}: {why}, and keeps what it has not settled in the log for 10 days"]
    assert (dropped.holding, dropped.dropped) == ([], [one.target])
    assert for_ever.remarks == [
        f"{one.target}: {why}, and keeps what it has not settled in the log for ever: set drop_after in source.yaml"
    ]
