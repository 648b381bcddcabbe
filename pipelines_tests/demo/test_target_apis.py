"""The configuration that the demo gives to the pipeline."""

import shutil
from pathlib import Path

import pytest

from demo.processes import ROOT
from demo.target_apis import PREFERRED_PORTS, ConfigurationChanged, write_configuration

URLS = {name: f"http://127.0.0.1:{port + 100}" for name, port in PREFERRED_PORTS.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "resources"
    shutil.copytree(ROOT / "resources" / "targets", folder / "targets")
    shutil.copy(ROOT / "resources" / "source.yaml", folder)
    return folder


def test_only_the_addresses_are_changed(source: Path, tmp_path: Path) -> None:
    write_configuration(source, tmp_path / "config", URLS)

    for name, url in URLS.items():
        before = (source / "targets" / f"{name}.yaml").read_text()
        after = (tmp_path / "config" / "targets" / f"{name}.yaml").read_text()
        assert after == before.replace(f"http://127.0.0.1:{PREFERRED_PORTS[name]}", url)
        assert url in after
    assert (tmp_path / "config" / "source.yaml").read_text() == (source / "source.yaml").read_text()


def test_a_target_of_the_user_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "targets" / "crm.yaml").write_text("name: crm\n")

    write_configuration(source, tmp_path / "config", URLS)

    assert sorted(path.stem for path in (tmp_path / "config" / "targets").iterdir()) == sorted(URLS)


def test_a_file_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    (source / "targets" / "registry.yaml").unlink()

    with pytest.raises(
        ConfigurationChanged, match=r"registry\.yaml, which is not there: run the demo in a fresh clone"
    ):
        write_configuration(source, tmp_path / "config", URLS)


def test_tables_of_the_user_are_not_loaded_over(source: Path, tmp_path: Path) -> None:
    (source / "source.yaml").write_text("tables:\n  customers: {key: id}\n")

    with pytest.raises(ConfigurationChanged, match="watches customers"):
        write_configuration(source, tmp_path / "config", URLS)
