"""The benchmark of delays and starts, over next to nothing: does what it times arrive, and does the report say so?"""

import urllib.request

import pytest

from benchmarks import latency
from benchmarks.latency import Delays, Wide


def test_the_receiver_tells_how_long_each_change_took() -> None:
    with latency.receiver() as (url, arrived):
        request = urllib.request.Request(f"{url}/orders", b'[{"id": 7, "written_at": 0}]')
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200

    assert list(arrived) == [7]
    assert arrived[7] > 1_700_000_000


@pytest.mark.integration
def test_a_wide_run_is_delivered_and_measured(postgres_url: str) -> None:
    wide = latency.measure_wide(postgres_url, 2, changes=3, name="bench_wide_test")

    assert (wide.targets, wide.seconds > 0, wide.cpu_seconds > 0) == (2, True, True)


def test_the_report_tells_the_median_and_the_tail() -> None:
    lines = latency.report_delays([Delays(kind="warm", seconds=[0.1] * 98 + [0.5, 0.9])]).splitlines()

    assert lines[-1].split() == ["warm", "100", "0.100", "0.900", "0.900"]


def test_the_report_tells_what_a_target_more_costs() -> None:
    first, last = Wide(targets=1, seconds=5.0, cpu_seconds=4.0), Wide(targets=51, seconds=20.0, cpu_seconds=14.0)

    assert latency.report_wide([first, last]).splitlines()[-1].split() == ["51", "20.0", "14.0", "0.30"]
