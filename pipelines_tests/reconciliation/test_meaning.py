"""What a route does not promise is not judged."""

from typing import Any

import pytest

from pipelines.changes.config import TableConfig
from pipelines.delivery.config import TargetConfig
from pipelines.reconciliation.meaning import meaning_of

X = {"path": "/x"}
ID = {"path": "/x/${_key}"}


def judged(
    operations: dict[str, Any], *, start: str = "beginning", loaded: bool = False, captured: Any = None
) -> set[str]:
    """Return which of the three are judged."""
    route = operations | {"read": {"path": "/x", "key": "id"}}
    config = TargetConfig.model_validate(
        {"name": "api", "base_url": "https://api.test", "start": start, "routes": {"people": route}}
    )
    table = TableConfig.model_validate({"key": "id"} | ({"operations": captured} if captured else {}))
    found = meaning_of(config, "people", table, loaded=loaded)
    return {name for name in ("missing", "stale", "extra") if getattr(found, name) is None}


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ({"upsert": X, "delete": ID}, {"missing", "stale", "extra"}),
        ({"upsert": X}, {"missing", "stale"}),
        ({"insert": X, "update": ID, "delete": ID}, {"missing", "stale", "extra"}),
        ({"insert": X}, {"missing"}),
        ({"insert": X, "delete": ID}, {"missing", "extra"}),
        ({"update": ID}, {"stale"}),
        ({"update": ID, "delete": ID}, {"stale", "extra"}),
    ],
)
def test_what_the_route_does_is_judged(operations: dict[str, Any], expected: set[str]) -> None:
    assert judged(operations) == expected


ALL = {"upsert": X, "delete": ID}


@pytest.mark.parametrize(
    ("captured", "expected"),
    [
        (["insert"], {"missing"}),
        (["insert", "update"], {"missing", "stale"}),
        (["update", "delete"], {"stale", "extra"}),
        (["insert", "delete"], {"missing", "extra"}),
    ],
)
def test_what_the_source_does_not_capture_is_not_judged(captured: list[str], expected: set[str]) -> None:
    assert judged(ALL, captured=captured) == expected


def test_rows_from_before_a_target_are_owed_to_it_once_they_were_loaded() -> None:
    assert judged(ALL, start="now") == {"stale", "extra"}
    assert judged(ALL, start="now", loaded=True) == {"missing", "stale", "extra"}
    assert judged(ALL, start="snapshot") == {"missing", "stale", "extra"}
