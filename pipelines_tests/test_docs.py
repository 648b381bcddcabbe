"""The documentation says what there is: every option is described, and every example loads."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipelines.changes.config import SourceConfig, TableConfig
from pipelines.delivery import config, reading
from resources.config_files import load_source, load_targets

ROOT = Path(__file__).parent.parent
SECTIONS: list[type[BaseModel]] = [
    TableConfig,
    config.TargetConfig,
    config.Retry,
    config.CircuitBreaker,
    config.RateLimit,
    config.RouteConfig,
    config.OperationConfig,
    config.BatchConfig,
    config.ResultsConfig,
    reading.ReadConfig,
    reading.CursorPaging,
    reading.OffsetPaging,
    reading.NumberedPaging,
    reading.LinkPaging,
    reading.NextUrlPaging,
    reading.ReconcileConfig,
]


def options() -> Iterator[str]:
    for section in SECTIONS:
        for name, field in section.model_fields.items():
            yield field.alias or name


def yaml_blocks(file: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_file_that_a_page_points_at_is_there(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`((?:pipelines|pipelines_tests|resources|benchmarks|docs|demo|soak)/[\w./]*)`", text))
    linked = {f"docs/{link}" for link in re.findall(r"\]\(([\w./-]+\.md)", text) if not link.startswith("..")}

    assert {path for path in named | linked if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("option", sorted(set(options())))
def test_every_option_is_described(option: str) -> None:
    assert re.search(rf"`[^`]*\b{option}\b[^`]*`", (ROOT / "docs/configuration.md").read_text())


@pytest.mark.parametrize("file", ["README.md", "docs/configuration.md"])
def test_the_examples_load(file: str, tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    kinds = set()
    for number, block in enumerate(yaml_blocks(file)):
        if block.startswith("tables:"):
            (tmp_path / "source.yaml").write_text(block)
            assert isinstance(load_source(tmp_path), SourceConfig)
            kinds.add("source")
        elif block.startswith("name:"):
            (tmp_path / "targets" / f"{number}.yaml").write_text(block)
            assert set(load_targets(tmp_path)) == {"crm"}
            kinds.add("target")
    assert kinds == {"source", "target"}


def test_what_the_pages_point_to_is_there() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} points to {link}"
