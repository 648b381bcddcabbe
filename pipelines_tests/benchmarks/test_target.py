"""The benchmarks' target counts what it takes, and is as unwell as it is told to be."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo.processes import Programs, free_port


@pytest.fixture
def api(tmp_path: Path) -> Iterator[httpx.Client]:
    port = free_port(0)
    with Programs(tmp_path) as programs, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
        target = programs.start("target", ["-m", "benchmarks.target", "--port", str(port)], env={})
        target.wait_until_it_answers(f"http://127.0.0.1:{port}/summary", seconds=20)
        yield client


def test_it_counts_requests_records_and_records_once(api: httpx.Client) -> None:
    api.post("/orders", json=[{"id": 1, "more": "x"}, {"id": 2}])
    api.post("/orders", json=[{"id": 2}])

    summary = api.get("/summary").json()

    assert {name: summary[name] for name in ("requests", "records", "distinct")} == {
        "requests": 2,
        "records": 3,
        "distinct": 2,
    }
    assert summary["first_at"] <= summary["last_at"]


def test_it_refuses_or_hangs_until_it_is_well(api: httpx.Client) -> None:
    api.post("/behaviour/refuses")
    assert api.post("/orders", json=[{"id": 1}]).status_code == 503
    api.post("/behaviour/hangs")
    with pytest.raises(httpx.ReadTimeout):
        api.post("/orders", json=[{"id": 1}], timeout=0.2)
    api.post("/behaviour/well")
    assert api.post("/orders", json=[{"id": 1}]).status_code == 200
    assert api.get("/summary").json()["distinct"] == 1
