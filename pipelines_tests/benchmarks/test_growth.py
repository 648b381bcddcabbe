"""The benchmark of long pasts and watched tables, over next to nothing: does it ask what it says, and measure it?"""

import json
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.growth import Past, Watched


@pytest.mark.integration
@pytest.mark.usefixtures("postgres_url")
def test_what_a_past_and_a_trigger_cost_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "growth.json"

    code = growth.main(
        ["--settled", "50", "100", "--targets", "4", "--seconds", "1", "--rounds", "1", "--json", str(numbers)]
    )

    assert code == 0
    found = json.loads(numbers.read_text())
    assert [one["settled"] for one in found["past"]] == [50, 100]
    assert all(one[name] > 0 for one in found["past"] for name in ("window_ms", "nothing_ms", "sensor_ms"))
    assert [(one["writers"], one["durable"]) for one in found["watched"]] == [
        (1, True),
        (16, True),
        (1, False),
        (16, False),
    ]
    assert all(one["without"] > 0 and one["with_trigger"] > 0 for one in found["watched"])
    assert "4 targets (ms)" in capsys.readouterr().out


def test_the_report_tells_multiples_of_the_shortest_past() -> None:
    short = Past(settled=10, window_ms=2.0, nothing_ms=1.0, sensor_ms=8.0)
    long = Past(settled=1000, window_ms=3.0, nothing_ms=1.0, sensor_ms=10.0)

    lines = growth.report_past([short, long], targets=200).splitlines()

    assert lines[-1].split() == ["1,000", "3.00", "1.50x", "1.00", "1.00x", "10.00", "1.25x"]


def test_what_a_trigger_adds_is_a_part_of_the_time_that_an_update_takes() -> None:
    watched = Watched(writers=1, durable=True, without=1500.0, with_trigger=1000.0, with_least=1200.0)

    assert watched.added == 0.5
    assert watched.added_at_least == 0.25
