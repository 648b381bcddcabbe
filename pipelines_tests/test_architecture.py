"""The rules of the tree, read from its source: who may import whom, where Dagster is, what a pure module may do."""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# How a run's steps get their processes: imported for what importing them does.
PROCESS_FILES = {"pipelines.ahead", "pipelines.forked"}
DAGSTER_FILES = {"ops", "jobs", "sensors", "assets", "checks", "schedules", "definitions"}
# Time, randomness and the outside world come as arguments; tenacity waits only by the sleep that it is given.
IMPURE_MODULES = {
    "asyncio",
    "http",
    "httpx",
    "multiprocessing",
    "os",
    "psycopg",
    "psycopg2",
    "requests",
    "secrets",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "time",
    "urllib",
    "yaml",
}
IMPURE_NAMES = {
    "datetime.now",
    "datetime.today",
    "datetime.utcnow",
    "date.today",
    "uuid1",
    "uuid4",
    "uuid.uuid1",
    "uuid.uuid4",
    "open",
    "input",
    "print",
}
# Of these packages parts are pure.
PURE_PARTS = {"urllib.parse"}
SQL = re.compile(
    r"\b(?:select\s.+\sfrom|insert\s+into|update\s+\w+\s+set|delete\s+from|create\s+(?:table|schema))\b", re.I | re.S
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One source file."""

    name: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str, source: str) -> "Module":
        return cls(name=name, tree=ast.parse(source))

    @property
    def is_dagsters(self) -> bool:
        return self.name.rpartition(".")[2] in DAGSTER_FILES

    @property
    def is_pure(self) -> bool:
        return self.name.startswith("pipelines") and not self.is_dagsters and self.name not in PROCESS_FILES

    def imports(self) -> Iterator[str]:
        """Yield what is imported, wherever in the file, with the names taken from it."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: a relative import hides who imports whom"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def calls(self) -> Iterator[ast.Call]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))

    def texts(self) -> Iterator[str]:
        """Yield the string literals, docstrings left out."""
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.value


def modules(*packages: str) -> list[Module]:
    found = [
        Module.of(".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text("utf-8"))
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    assert found
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# Rules: each yields what breaks it in one module ---------------------------------------------------------------------


def features_imported_upstream(module: Module) -> Iterator[str]:
    order = ["pipelines.changes", "pipelines.delivery", "pipelines.reconciliation"]
    for position, feature in enumerate(order):
        if within(module.name, feature):
            yield from (name for name in module.imports() if within(name, *order[position + 1 :]))


def adapters_imported_by_pipelines(module: Module) -> Iterator[str]:
    if within(module.name, "pipelines") and module.name != "pipelines.definitions":
        yield from (name for name in module.imports() if within(name, "resources"))


def composition_root_imported(module: Module) -> Iterator[str]:
    """But for the module that a run's steps are forked behind, which nobody imports."""
    for name in module.imports():
        if within(name, "pipelines.forked") or (
            within(name, "pipelines.definitions") and module.name != "pipelines.forked"
        ):
            yield name


def dagster_outside_of_its_files(module: Module) -> Iterator[str]:
    if module.name != "resources.dagster_resources" and not (within(module.name, "pipelines") and module.is_dagsters):
        yield from (name for name in module.imports() if re.match(r"dagster(?:_\w+)?(?:\.|$)", name))


def imports_of_tests(module: Module) -> Iterator[str]:
    yield from (name for name in module.imports() if within(name, "pipelines_tests", "demo", "pytest"))


def outside_world_in_pure_modules(module: Module) -> Iterator[str]:
    if not module.is_pure:
        return
    for name in module.imports():
        if within(name, *IMPURE_MODULES) and not within(name, *PURE_PARTS):
            yield name
    for call in module.calls():
        if (name := ast.unparse(call.func)) in IMPURE_NAMES:
            yield name
        if name in ("Random", "random.Random") and not (call.args or call.keywords):
            yield f"{name}() without a seed"
        elif name.startswith("random.") and name != "random.Random":
            yield name


def work_at_import(module: Module) -> Iterator[str]:
    """Top-level statements that do something: a call that is neither assigned nor a decorator."""
    for node in module.tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield ast.unparse(node)
        if isinstance(node, ast.For | ast.While | ast.With | ast.If) and not imports_only(node.body):
            yield ast.unparse(node).splitlines()[0]


def imports_only(body: Sequence[ast.stmt]) -> bool:
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def sql_in_pipelines(module: Module) -> Iterator[str]:
    if within(module.name, "pipelines"):
        yield from (text for text in module.texts() if SQL.search(text))


Rule = Callable[[Module], Iterator[str]]


@pytest.mark.parametrize(
    "rule",
    [
        features_imported_upstream,
        adapters_imported_by_pipelines,
        composition_root_imported,
        dagster_outside_of_its_files,
        imports_of_tests,
        outside_world_in_pure_modules,
        sql_in_pipelines,
    ],
)
def test_the_tree_keeps_the_rule(rule: Rule):
    broken = {
        module.name: found for module in modules("pipelines", "resources") if (found := sorted(set(rule(module))))
    }

    assert broken == {}


def test_no_module_of_the_pipelines_works_at_import():
    """But for those that are imported for that: a process forks steps only once it has imported all that it shall.

    And a run's own process starts that one before it imports all the same.
    """
    broken = {module.name: found for module in modules("pipelines") if (found := list(work_at_import(module)))}

    assert set(broken) == PROCESS_FILES


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (features_imported_upstream, "pipelines.changes.record", "from pipelines.delivery.config import TargetConfig"),
        (features_imported_upstream, "pipelines.delivery.drain", "import pipelines.reconciliation.compare"),
        (adapters_imported_by_pipelines, "pipelines.delivery.drain", "from resources.sql import statements"),
        (adapters_imported_by_pipelines, "pipelines.delivery.ops", "def f():\n    import resources.database"),
        (composition_root_imported, "resources.database", "from pipelines.definitions import definitions"),
        (composition_root_imported, "resources.database", "from pipelines import definitions"),
        (composition_root_imported, "pipelines.delivery.ops", "import pipelines.forked"),
        (dagster_outside_of_its_files, "pipelines.delivery.drain", "import dagster as dg"),
        (dagster_outside_of_its_files, "resources.postgres_ledger", "from dagster_postgres import run_storage"),
        (dagster_outside_of_its_files, "resources.assets", "import dagster"),
        (imports_of_tests, "pipelines.delivery.drain", "from pipelines_tests.fakes.clock import FakeClock"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "import time"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "from os import environ"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "import urllib.request"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "now = datetime.now(UTC)"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "def f():\n    return open('x')"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "number = random.random()"),
        (outside_world_in_pure_modules, "pipelines.delivery.drain", "dice = Random()"),
        (work_at_import, "pipelines.delivery.drain", "register('x')"),
        (work_at_import, "pipelines.delivery.drain", "for x in range(3):\n    y = x"),
        (sql_in_pipelines, "pipelines.delivery.ops", "QUERY = 'select 1 from distributary.batch'"),
        (sql_in_pipelines, "pipelines.delivery.ops", "QUERY = f'insert into {table} values (1)'"),
        (sql_in_pipelines, "pipelines.delivery.ops", "QUERY = 'UPDATE batch\\nSET state = 1'"),
    ],
)
def test_the_rule_is_seen_to_be_broken(rule: Rule, name: str, source: str):
    """A rule that never fires keeps nothing."""
    assert list(rule(Module.of(name, source)))


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (features_imported_upstream, "pipelines.delivery.drain", "from pipelines.changes.record import ChangeRecord"),
        (dagster_outside_of_its_files, "pipelines.delivery.ops", "import dagster as dg"),
        (outside_world_in_pure_modules, "pipelines.delivery.ops", "import signal, time"),
        (outside_world_in_pure_modules, "resources.http_target", "import time"),
        (outside_world_in_pure_modules, "pipelines.delivery.template", "from urllib.parse import quote"),
        (outside_world_in_pure_modules, "pipelines.delivery.report", "dice = Random(1)"),
        (sql_in_pipelines, "pipelines.delivery.ops", '"""Say what to select from a window, or insert into it."""'),
        (work_at_import, "pipelines.delivery.drain", "_WORDS = tuple(range(3))"),
    ],
)
def test_what_is_allowed_is_let_pass(rule: Rule, name: str, source: str):
    assert list(rule(Module.of(name, source))) == []
