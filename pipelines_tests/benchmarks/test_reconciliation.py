"""The benchmark of reconciliation, over next to nothing: does it measure, and does it find what is there?"""

from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks import reconciliation
from benchmarks.listing import Listed, record
from benchmarks.reconciliation import Measured


@pytest.mark.integration
@pytest.mark.usefixtures("postgres_url")
def test_what_differs_is_found_and_measured(tmp_path: Path) -> None:
    (found,) = reconciliation.measure([3000], folder=tmp_path, database=f"reconciliation_{uuid4().hex[:8]}")

    assert (found.found, found.repaired, found.right) == ((3, 3, 3), 9, True)
    assert found.peak_bytes >= found.idle_bytes > 1_000_000
    assert found.seconds > 0


def test_the_target_lacks_has_wrong_and_has_too_many_of_a_thousand_each_one() -> None:
    listed = Listed(records=2000)
    items, after = [], 0
    while True:
        page = listed.page(after, 300)
        items += page["items"]
        if page["next"] is None:
            break
        after = int(page["next"])
    ids = [item["id"] for item in items]

    assert len(items) == listed.total == len(set(ids))
    assert set(range(1, 2001)) - set(ids) == {1, 1001}
    assert set(ids) - set(range(1, 2001)) == {2001, 2002}
    assert [item["id"] for item in items if item != record(item["id"])] == [2, 1002]


def test_a_benchmark_that_finds_something_else_is_not_right() -> None:
    good = Measured(
        records=1000,
        listing_seconds=1.0,
        comparing_seconds=2.0,
        repairing_seconds=1.0,
        idle_bytes=50_000_000,
        peak_bytes=60_000_000,
        found=(1, 1, 1),
        repaired=3,
    )

    assert good.right
    assert not replace(good, found=(0, 1, 1)).right
    assert not replace(good, repaired=2).right
    line = reconciliation.report([good]).splitlines()[1]
    assert line.split() == ["1,000", "1.0", "2.0", "1.0", "250", "50.0", "60.0", "all"]
