"""Every mistake in a configuration file is one line that says where it is and what to write instead."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from unittest.mock import Mock

import pytest
import yaml

from pipelines.delivery.config import Secret, TargetConfig
from pipelines.delivery.routing import compile_routes
from resources import config_files
from resources.config_files import (
    ConfigError,
    check_routes,
    config_folder,
    load_source,
    load_targets,
    load_transforms,
    resolve_secret,
    resolve_secrets,
)

Write = Callable[[str, str], Path]

SOURCE = """
tables:
  customers: {key: id, exclude: [password_hash]}
  orders:    {key: id, operations: [insert]}
"""
CRM = """
name: crm
base_url: https://api.crm.example
routes:
  customers:
    upsert: {path: /contacts}
"""
# As in the design.
DESIGN_EXAMPLE = """
name: crm
base_url: https://api.crm.example
status: active
critical: true                       # false: its failure is a warning, the run stays green
auth: {type: bearer, token: {env: CRM_TOKEN}}     # none bearer basic api_key
timeout_seconds: 15
max_in_flight: 8
rate_limit: {requests_per_second: 50, burst: 10}
retry: {initial_backoff: 0.5, max_backoff: 30, max_elapsed: 60}
circuit_breaker: {failure_threshold: 5, error_timeout: 30}
routes:
  customers:
    mode: state
    record:                          # the JSON you want; $field is a source column, everything else is itself
      id: $id
      properties: {email: $email, firstname: $name}
    upsert: {method: POST, path: /contacts/batch/upsert, batch: {max_records: 100, body: {inputs: $records}},
             results: {items: $.results, id: id, status: status}}
    delete: {method: DELETE, path: '/contacts/${_key}'}
    read:   {path: /contacts, items: $.results, key: id, page: {style: cursor, parameter: after, next: $.paging.next.after, size: 100, size_parameter: limit}}
    reconcile: {cron: '0 * * * *', repair: off, delete_extra: false, max_repair_fraction: 0.05}
"""  # noqa: E501


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file of the configuration folder `conf`, seen from the folder around it; return `conf`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf"

    def write(name: str, text: str) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text).lstrip("\n"), encoding="utf-8")
        return folder

    return write


def refused(folder: Path, load: Callable[[Path], object] = load_targets) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder)
    return str(caught.value)


# What is right -------------------------------------------------------------------------------------------------------


def test_the_designs_example_is_loaded(write: Write):
    config = load_targets(write("targets/crm.yaml", DESIGN_EXAMPLE))["crm"]
    assert config.rate_limit is not None
    assert (config.max_in_flight, config.rate_limit.burst, config.origin) == (8, 10, "conf/targets/crm.yaml")
    operations = compile_routes(config)["customers"].operations
    assert set(operations) == {"upsert", "delete"}
    assert operations["upsert"].max_records == 100
    reconcile = config.routes["customers"].reconcile
    assert reconcile is not None
    assert (reconcile.repair, reconcile.cron) == ("off", "0 * * * *")


def test_targets_are_sorted_by_name_and_other_files_are_left_alone(write: Write):
    write("targets/2.yaml", CRM.replace("crm", "b"))
    write("targets/1.yaml", CRM.replace("crm", "c"))
    write("targets/.hidden.yaml", "nonsense")
    write("targets/README.md", "nonsense")
    assert list(load_targets(write("targets/3.yaml", CRM.replace("crm", "a")))) == ["a", "b", "c"]


def test_a_file_is_understood_once_and_again_when_it_says_something_else(write: Write, monkeypatch: pytest.MonkeyPatch):
    """Every step and every tick of the sensor reads all files: that must not be all targets times all files."""
    loads = Mock(wraps=yaml.SafeLoader.__init__)
    monkeypatch.setattr(config_files._Loader, "__init__", lambda self, text: loads(self, text))
    conf = write("targets/crm.yaml", CRM)

    first, second = load_targets(conf), load_targets(conf)
    write("targets/crm.yaml", CRM.replace("/contacts", "/people"))
    third = load_targets(conf)

    assert loads.call_count == 2
    assert first == second
    assert third["crm"].routes["customers"].upsert != first["crm"].routes["customers"].upsert


def test_no_folder_of_targets_is_no_targets(write: Write):
    assert load_targets(write("source.yaml", SOURCE)) == {}


def test_anchors_and_merges_can_be_used(write: Write):
    text = """
    name: hook
    base_url: https://hooks.example
    routes:
      customers:
        mode: event
        insert: &event {method: POST, path: /events, record: {id: $_change_id, what: $_operation}}
        update: *event
        delete: {<<: *event, path: /gone}
    """
    operations = dict(load_targets(write("targets/hook.yaml", text))["hook"].routes["customers"].operations())
    assert [operation.path for operation in operations.values()] == ["/events", "/events", "/gone"]


def test_the_watched_tables_are_read(write: Write):
    source = load_source(write("source.yaml", SOURCE))
    assert list(source.tables) == ["customers", "orders"]


# What is wrong in YAML -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": is empty"),
        ("# only this\n", ": is empty"),
        ("- name: crm\n", ":1: is not a mapping"),
        ("just words\n", ":1: is not a mapping"),
        ("name: crm\nbase_url: [\n", ":3: is not YAML: "),
        ("name: crm\n\tbase_url: x\n", ":2: is not YAML: "),
        ("name: crm\n---\nname: erp\n", ":2: is not YAML: "),
        ("name: !!python/name:os.system x\n", ":1: is not YAML: "),
        ("delete: {path: /contacts/${_key}}\n", ":1: is not YAML: .* put a text that holds \\$\\{…\\} in quotes"),
        ("name: crm\nstatus: active\nname: erp\n", ":3: name: is there twice, first in line 1; remove one"),
        ("a:\n  b: 1\n  b: 2\n", ":3: a.b: is there twice"),
        ("a: [{x: on}]\n", ":1: a\\[0\\].x: on can be read as text or as a switch; write 'on' or true"),
        ("critical: no\n", ":1: critical: no can be read as text or as a switch; write 'no' or false"),
        ("record:\n  no: $number\n", ":2: record.no: YAML does not read no as text; write the key as 'no'"),
        ("record: {1: a}\n", ":1: record.1: YAML does not read 1 as text"),
        ("record: {true: a}\n", ":1: record.true: YAML does not read true as text"),
        ("record: {[a]: b}\n", ":1: record: a key is a word"),
        ("since: 2024-02-29\n", ":1: since: YAML reads 2024-02-29 as a date; write '2024-02-29'"),
        ("zip: 01234\n", ":1: zip: YAML reads 01234 as the number 668; write '01234' or 668"),
        ("at: 12:30\n", ":1: at: YAML reads 12:30 as the number 750"),
        ("a: &a {b: *a}\n", ":1: a.b: contains itself"),
    ],
)
def test_what_yaml_takes_silently_is_refused(write: Write, text: str, said: str):
    assert re.fullmatch(f"conf/targets/crm.yaml{said}.*", refused(write("targets/crm.yaml", text)))


def test_quoted_words_are_text(write: Write):
    text = CRM.replace(
        "upsert: {path: /contacts}", "upsert: {path: /c, record: {'no': 'on', zip: '01234', big: 1_000}}"
    )
    config = load_targets(write("targets/crm.yaml", text))["crm"]
    assert config.routes["customers"].upsert is not None
    assert config.routes["customers"].upsert.record == {"no": "on", "zip": "01234", "big": 1000}


def test_a_file_that_is_not_utf8_is_refused_with_its_line(write: Write):
    folder = write("targets/crm.yaml", CRM)
    (folder / "targets/crm.yaml").write_bytes(b"name: crm\n# M\xfcller\n")
    assert refused(folder) == "conf/targets/crm.yaml:2: is not UTF-8; save the file in that encoding"


def test_a_byte_order_mark_is_no_mistake(write: Write):
    folder = write("targets/crm.yaml", CRM)
    (folder / "targets/crm.yaml").write_bytes(b"\xef\xbb\xbf" + CRM.encode())
    assert list(load_targets(folder)) == ["crm"]


# What is wrong in a file ---------------------------------------------------------------------------------------------


UPSERT = "routes.customers.upsert"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("retrys: 3", "retrys: unknown key; did you mean 'retry'?"),
        ("frobnicate: 3", "frobnicate: unknown key; known are name, base_url, "),
        ("auth: {type: bearer, token: {env: T}, tokn: 1}", "auth.tokn: unknown key; did you mean 'token'?"),
        ("headers: {X-A: {evn: T, env: T}}", "headers.X-A.evn: unknown key; did you mean 'env'?"),
        ("max_in_flight: eight", "max_in_flight: 'eight' should be a whole number"),
        ("max_in_flight: 100", "max_in_flight: 100 should be less than or equal to 64"),
        ("critical: 'no'", "critical: 'no' should be true or false"),
        ("status: activ", "status: 'activ' is not one of active, paused, disabled; did you mean 'active'?"),
        ("start: today", "start: 'today' is not one of snapshot, now, beginning"),
        ("retry:", "retry: is empty; it should be a mapping of keys to values"),
        ("retry: {max_backoff: [1]}", "retry.max_backoff: the list should be a number"),
        ("success_on: [404, 40]", "success_on[1]: 40 should be greater than or equal to 100"),
        ("headers: {X-A: 5}", "headers.X-A: the value should be text"),
        ("auth: {type: bearer, token: s3cret}", "auth.token: a secret is never written into the file"),
        ("auth: {type: bearer, token: [s3cret]}", "auth.token: the value should be a mapping"),
    ],
)
def test_a_wrong_line_is_said_with_file_line_field_value_and_fix(write: Write, line: str, said: str):
    message = refused(write("targets/crm.yaml", CRM.replace("name: crm", f"name: crm\n{line}")))
    assert message.startswith(f"conf/targets/crm.yaml:2: {said}")
    assert "\n" not in message
    assert "s3cret" not in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: crm\n", "", "1: name: is missing; add it"),
        (
            "name: crm",
            "name: crm-eu",
            "1: name: 'crm-eu' cannot name a target: Dagster's mapping keys allow only a-z, 0-9 and _, "
            "beginning with a letter; write 'crm_eu'",
        ),
        ("https://api", "https://ada:s3cret@api", "2: base_url: holds a user's name or password"),
        ("{path: /contacts}", "{}", f"5: {UPSERT}.path: is missing; add it"),
        ("{path: /contacts}", "{path: '/c/{id}'}", f"5: {UPSERT}.path: '/c/{{id}}': '{{' cannot stand in a path"),
        (
            "{path: /contacts}",
            "{path: /c, batch: {max_recods: 5, max_records: 5}}",
            f"5: {UPSERT}.batch.max_recods: unknown key; did you mean 'max_records'?",
        ),
        (
            "{path: /contacts}",
            "\n      path: /c\n      record:\n        to:\n        - $ok\n        - $first name",
            f"10: {UPSERT}.record.to[1]: '$first name': inside a longer string write ${{first}}",
        ),
    ],
)
def test_a_mistake_is_said_with_file_line_field_value_and_fix(write: Write, old: str, new: str, said: str):
    message = refused(write("targets/crm.yaml", CRM.replace(old, new)))
    assert message.startswith(f"conf/targets/crm.yaml:{said}")
    assert "\n" not in message
    assert "s3cret" not in message


def test_each_mistake_of_each_file_has_its_line(write: Write):
    write("targets/crm.yaml", CRM.replace("name: crm", "name: CRM\ncriticl: true"))
    message = refused(write("targets/erp.yaml", CRM.replace("https://", "")))
    assert [line.partition(" ")[0] for line in message.splitlines()] == [
        "conf/targets/crm.yaml:1:",
        "conf/targets/crm.yaml:2:",
        "conf/targets/erp.yaml:2:",
    ]


def test_two_targets_of_one_name_are_refused(write: Write):
    write("targets/a.yaml", CRM)
    message = refused(write("targets/b.yaml", CRM))
    assert message == "conf/targets/b.yaml:1: name: 'crm' is also the name in conf/targets/a.yaml; rename one of them"


def test_a_yml_file_is_not_silently_ignored(write: Write):
    message = refused(write("targets/crm.yml", CRM))
    assert message == "conf/targets/crm.yml: would not be read; rename it to crm.yaml, or move it away"


def test_what_cannot_be_read_is_said(write: Write):
    folder = write("targets/crm.yaml/inside", "")
    assert refused(folder) == "conf/targets/crm.yaml: cannot be read: Is a directory"
    assert "conf/source.yaml: there is no such file" in refused(folder, load_source)
    other = write("../other/targets", "a file").with_name("other")
    assert "other/targets: cannot be read as a folder" in refused(other)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("{key: id, exlude: [a]}", "customers.exlude: unknown key; did you mean 'exclude'?"),
        ("{key: 5}", "customers.key: 5 should be text, or 5 should be a list"),
        ("{}", "customers.key: is missing; add it"),
        ("{key: id, operations: [drop]}", "customers.operations[0]: 'drop' is not one of insert, update, delete"),
        ("{key: id, exclude: [id]}", "customers: the key column 'id' is also in 'exclude'"),
    ],
)
def test_a_mistake_in_the_source_is_said_the_same_way(write: Write, table: str, said: str):
    message = refused(write("source.yaml", f"tables:\n  customers: {table}\n"), load_source)
    assert message.startswith(f"conf/source.yaml:2: tables.{said}")


# Routes and the source -----------------------------------------------------------------------------------------------


def test_a_route_for_an_unknown_stream_is_refused(write: Write):
    write("source.yaml", SOURCE)
    folder = write("targets/crm.yaml", CRM.replace("customers:", "custmers:"))
    with pytest.raises(ConfigError) as caught:
        check_routes(load_source(folder), load_targets(folder))
    assert str(caught.value) == (
        "conf/targets/crm.yaml: routes.custmers: the stream 'custmers' is not in source.yaml; did you mean 'customers'?"
    )


def test_a_template_cannot_name_what_the_source_excludes(write: Write):
    """The column is never in a payload, so every record would be a dead letter."""
    write("source.yaml", SOURCE)
    folder = write("targets/crm.yaml", CRM.replace("/contacts}", "/contacts, record: {p: $password_hash, e: $email}}"))
    with pytest.raises(ConfigError, match=r"routes\.customers: its templates name the column 'password_hash'"):
        check_routes(load_source(folder), load_targets(folder))


def test_routes_of_watched_tables_are_fine(write: Write):
    write("source.yaml", SOURCE)
    folder = write("targets/crm.yaml", DESIGN_EXAMPLE)
    check_routes(load_source(folder), load_targets(folder))


# The folder ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_the_one_that_the_environment_names(tmp_path: Path):
    assert config_folder({"DISTRIBUTARY_CONFIG": str(tmp_path)}) == tmp_path
    own = config_folder({})
    assert (own.name, (own / "config_files.py").is_file()) == ("resources", True)
    assert config_folder({"DISTRIBUTARY_CONFIG": ""}) == own


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"DISTRIBUTARY_CONFIG is '.*/nowhere', but there is no such folder"):
        config_folder({"DISTRIBUTARY_CONFIG": str(tmp_path / "nowhere")})


# Secrets -------------------------------------------------------------------------------------------------------------


def secretive(write: Write) -> TargetConfig:
    text = (
        CRM
        + "auth: {type: basic, username: {env: CRM_USER}, password: {env: CRM_PASSWORD}}\nheaders: {X-K: {env: KEY}}\n"
    )
    return load_targets(write("targets/crm.yaml", text))["crm"]


def test_secrets_come_from_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch):
    environ = {"CRM_USER": "ada", "CRM_PASSWORD": "pässword", "KEY": "k", "OTHER": "o"}
    assert resolve_secrets(secretive(write), environ) == {"CRM_USER": "ada", "CRM_PASSWORD": "pässword", "KEY": "k"}
    monkeypatch.setenv("KEY", "from outside")
    assert resolve_secret(Secret(env="KEY"), file="f", field="headers.X") == "from outside"


def test_a_missing_variable_is_named_with_file_and_field(write: Write):
    with pytest.raises(ConfigError) as caught:
        resolve_secrets(secretive(write), {"CRM_USER": "ada", "CRM_PASSWORD": " "})
    empty, unset = str(caught.value).splitlines()
    assert empty.startswith("conf/targets/crm.yaml: auth.password: the environment variable CRM_PASSWORD is empty; ")
    assert unset.startswith("conf/targets/crm.yaml: headers.X-K: the environment variable KEY is not set; export it")


@pytest.mark.parametrize(
    ("value", "problem"),
    [("s3cret\n", "line break"), ("s3cret ", "blank"), ("s3crét", "plain ASCII"), ("a\x00b", "control")],
)
def test_a_secret_that_no_header_can_carry_is_refused_unseen(value: str, problem: str):
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve_secret(Secret(env="T"), file="f.yaml", field="auth.token", environ={"T": value})
    assert value.strip() not in str(caught.value)


# Transforms ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the module `our_mapping` importable."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "our_mapping", raising=False)
    file = tmp_path / "our_mapping.py"
    file.write_text("def contact(change):\n    return {'id': change['key']}\n\nnot_callable = 5\n")
    return file


def with_transform(name: str) -> str:
    return CRM + f"    transform: {name}\n"


def test_a_transform_is_imported_and_known_by_its_source(write: Write, module: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_targets(write("targets/crm.yaml", with_transform("our_mapping:contact")))["crm"]
    before = load_transforms(config)["our_mapping:contact"]
    assert before.function({"key": "7"}) == {"id": "7"}
    first = compile_routes(config, {before.name: before})["customers"].operations["upsert"].fingerprint
    module.write_text(module.read_text() + "# changed\n")
    after = load_transforms(config)["our_mapping:contact"]
    assert compile_routes(config, {after.name: after})["customers"].operations["upsert"].fingerprint != first


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("our_maping:contact", "'our_maping' cannot be imported: ModuleNotFoundError"),
        ("our_mapping:contat", "'our_mapping' has no function 'contat'; did you mean 'contact'?"),
        ("our_mapping:not_callable", "'our_mapping' has no function 'not_callable'"),
    ],
)
def test_a_transform_that_cannot_be_had_is_refused_at_load(write: Write, module: Path, name: str, problem: str):
    message = refused(write("targets/crm.yaml", with_transform(name)))
    assert message.startswith(f"conf/targets/crm.yaml: routes.customers.transform: {problem}")


def test_a_module_that_fails_is_the_users_mistake(write: Write, module: Path):
    module.write_text("1 / 0\n")
    message = refused(write("targets/crm.yaml", with_transform("our_mapping:contact")))
    assert "cannot be imported: ZeroDivisionError" in message


READING = """
name: crm
base_url: https://api.crm.example
routes:
  customers:
    upsert: {path: /contacts}
    delete: {path: '/contacts/${%s}'}
    read: {path: /contacts, key: %s}
    reconcile: {repair: all, delete_extra: true}
"""


@pytest.mark.parametrize(
    ("key", "deletes", "reads", "problem"),
    [
        ("id", "id", "id", None),
        ("[region, id]", "id", "[region, id]", None),
        ("[region, id]", "id", "id", "read.key: names 1 places, but the key in source.yaml has 2 columns (region, id)"),
        ("id", "id", "[a, b]", "read.key: names 2 places, but the key in source.yaml has 1 columns (id)"),
        ("id", "email", "id", "reconcile.delete_extra: the 'delete' names the column 'email', but of a record"),
    ],
)
def test_what_is_read_fits_the_key(write: Write, key: str, deletes: str, reads: str, problem: str | None):
    write("source.yaml", f"tables:\n  customers: {{key: {key}}}\n")
    folder = write("targets/crm.yaml", READING % (deletes, reads))

    def check(_: Path) -> None:
        check_routes(load_source(folder), load_targets(folder))

    if problem is None:
        check(folder)
    else:
        assert refused(folder, check).startswith(f"conf/targets/crm.yaml: routes.customers.{problem}")
