"""The backlog's benchmark, over two backlogs of next to nothing: does it measure, and does everything arrive?"""

from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks import backlog
from benchmarks.backlog import Drained


@pytest.mark.integration
@pytest.mark.usefixtures("postgres_url")
def test_a_backlog_is_drained_and_measured(tmp_path: Path) -> None:
    (small,) = backlog.measure([150], folder=tmp_path, database=f"backlog_{uuid4().hex[:8]}")

    assert (small.changes, small.delivered) == (150, 150)
    assert small.peak_bytes >= small.idle_bytes > 1_000_000
    assert small.curve_bytes
    assert small.seconds > 0


def test_the_report_compares_with_the_smallest() -> None:
    small = Drained(
        changes=10, delivered=10, seconds=1.0, idle_bytes=50_000_000, peak_bytes=60_000_000, curve_bytes=[50_000_000]
    )
    large = replace(small, changes=1000, delivered=1000, seconds=2.0, peak_bytes=66_000_000)

    lines = backlog.report([small, large]).splitlines()

    assert lines[1].split() == ["10", "1.0", "10", "50.0", "60.0", "1.00"]
    assert lines[2].split() == ["1,000", "2.0", "500", "50.0", "66.0", "1.10"]
