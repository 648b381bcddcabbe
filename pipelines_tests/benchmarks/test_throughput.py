"""The throughput benchmark with next to no work: does everything arrive, and is it an error if it does not?"""

from dataclasses import replace
from pathlib import Path
from typing import get_args
from uuid import uuid4

import pytest

from benchmarks import ceiling, throughput
from benchmarks.throughput import Measured, NotDelivered
from benchmarks.workload import Variant, Workload


@pytest.mark.integration
@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_change_arrives_and_is_measured(postgres_url: str, tmp_path: Path, variant: Variant) -> None:
    work = Workload(changes=400, targets=2, batch=10, latency=0.001, variant=variant)

    found = throughput.measure(postgres_url, work, folder=tmp_path, database=f"throughput_{uuid4().hex[:8]}")

    assert (work.deliveries, found.count("records"), found.count("missing")) == (800, 800, 0)
    assert found.seconds >= found.sending_seconds > 0
    assert 0 < found.of_most < 1
    assert found.sender_cpu > 0
    assert found.peak_bytes > 1_000_000
    assert found.peak_bytes < 2_000_000_000


@pytest.mark.integration
@pytest.mark.parametrize("variant", get_args(Variant))
def test_the_job_delivers_the_same(postgres_url: str, tmp_path: Path, variant: Variant) -> None:
    name = f"throughput_{uuid4().hex[:8]}"
    work = Workload(changes=80, targets=2, variant=variant)

    found = throughput.measure_job(postgres_url, work, folder=tmp_path, name=name)

    assert found.count("records") == 160
    assert found.seconds > found.sending_seconds


def test_the_ceiling_is_of_the_same_receiver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with throughput.receiver(tmp_path) as url:
        ceiling.main([f"{url}/one", f"{url}/two", "--requests", "30", "--in-flight", "4", "--batch", "5"])
        targets = throughput.seen(url)["targets"]

    assert {name: one["requests"] for name, one in targets.items()} == {"one": 30, "two": 30}
    assert '"records_per_second"' in capsys.readouterr().out


FLAWLESS = {"records": 400, "missing": 0, "repeats": 0, "stale": 0}
MEASURED = Measured(
    sender="one",
    workload=Workload(changes=400, targets=1),
    seconds=2.0,
    sending_seconds=1.0,
    sender_cpu=1.0,
    database_cpu=0.5,
    receiver_cpu=0.1,
    peak_bytes=1,
    verdicts={"target_1": FLAWLESS},
)


@pytest.mark.parametrize("flaw", ["missing", "repeats", "stale"])
def test_what_did_not_arrive_once_and_in_order_is_no_number(flaw: str) -> None:
    throughput.refuse_unless_delivered(MEASURED)
    with pytest.raises(NotDelivered, match=flaw):
        throughput.refuse_unless_delivered(replace(MEASURED, verdicts={"target_1": FLAWLESS | {flaw: 1}}))
    with pytest.raises(NotDelivered, match="only"):
        throughput.refuse_unless_delivered(replace(MEASURED, verdicts={}))


def test_the_derived_numbers_are_per_record() -> None:
    assert MEASURED.per_second == 200
    assert MEASURED.cpu_per_100k == 250
    assert replace(MEASURED, workload=Workload(changes=400, targets=1, latency=1.0)).of_most == 0.25
