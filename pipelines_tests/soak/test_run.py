"""A soak of a few seconds without Dagster, whose start alone takes longer: the real thing is `make soak`."""

import json
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from resources import embedded_postgres
from soak import deployment
from soak.run import Options, soak
from soak.world import ROUTES, World

pytestmark = pytest.mark.integration


@pytest.fixture
def without_dagster(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_drains(world: World) -> None:
        world._start("daemon", ["-m", "pipelines_tests.soak.drains"])

    monkeypatch.setattr(World, "start_code_server", lambda world: None)
    monkeypatch.setattr(World, "start_daemon", start_drains)
    # Dagster's own database has no tables then.
    monkeypatch.setattr("soak.report._runs", lambda world: {})


@pytest.mark.usefixtures("without_dagster")
def test_a_few_seconds_end_with_every_target_in_agreement_and_nothing_left_running(
    postgres_url: str, tmp_path: Path
) -> None:
    name, said = f"soak_{uuid4().hex[:8]}", list[str]()
    try:
        code = soak(Options(seconds=5, patience=60, folder=tmp_path, name=name), said.append)
    finally:
        deployment.drop(postgres_url, name)

    assert code == 0, "\n".join(said)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["written"] > 50
    assert report["problems"] == []
    assert set(report["targets"]) == set(ROUTES)
    assert all(one["counts"]["accepted"] > 20 for one in report["targets"].values())
    assert (tmp_path / "samples.csv").read_text().startswith("at,daemon_resident")
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert [command for command in commands if str(tmp_path) in command] == []
    assert embedded_postgres.running_url() is not None, "it was up before, and others may use it"
