"""Start the demo's target APIs: Datasette as the flight board, Kinto as the registry, a receiver as the event hook."""

import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from demo import dataset
from demo.processes import ROOT, ProgramFailed, Programs, free_port

PREFERRED_PORTS: Mapping[str, int] = {"flight_board": 8801, "registry": 8802, "event_hook": 8803}
"""The ports that the files in `resources/targets` name; another is used where one of them is taken."""

REGISTRY_USER = "distributary"

_HERE = Path(__file__).parent

_BOARD = """
create table airlines (
    carrier text primary key,
    name    text not null
);
create table airports (
    faa   text primary key,
    name  text not null,
    lat   real not null,
    lon   real not null,
    alt   integer not null,
    tz    integer not null,
    dst   text not null,
    tzone text
);
create table planes (
    tailnum      text primary key,
    year         integer,
    type         text not null,
    manufacturer text not null,
    model        text not null,
    engines      integer not null,
    seats        integer not null check (seats >= 0),
    speed        integer,
    engine       text not null
);
create table flights (
    year           integer not null,
    month          integer not null,
    day            integer not null,
    dep_time       integer,
    sched_dep_time integer not null,
    dep_delay      integer,
    arr_time       integer,
    sched_arr_time integer not null,
    arr_delay      integer,
    carrier        text not null,
    flight         integer not null,
    tailnum        text,
    origin         text not null,
    dest           text not null,
    air_time       integer,
    distance       integer not null,
    hour           integer not null,
    minute         integer not null,
    time_hour      text not null,
    primary key (year, month, day, carrier, flight, origin)
);
-- Writes that changed nothing: what a target that is sent something twice would see.
create table rewrites (id integer primary key, of_table text not null, row_id integer not null);
"""

_PLANE_SCHEMA = {
    "type": "object",
    "properties": {"seats": {"type": "integer", "minimum": 0}, "model": {"type": "string"}},
    "required": ["seats", "model"],
}


_RUN_KINTO = "from kinto.__main__ import main; main()"  # the command `kinto`, by the interpreter that runs the demo


_ADVICE = "run the demo in a fresh clone, or put the files of `resources` that came with it back"


class ConfigurationChanged(Exception):
    """The configuration is not the demo's any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetApis:
    """Where the target APIs are, and what a client needs to be let in."""

    base_urls: Mapping[str, str]
    board_token: str = field(repr=False)
    registry_password: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """Return the variables that the files in `resources/targets` name."""
        return {"FLIGHT_BOARD_TOKEN": self.board_token, "REGISTRY_PASSWORD": self.registry_password}


def start(folder: Path, programs: Programs) -> TargetApis:
    """Start all three, empty, with their data below *folder*; returns once each of them answers."""
    ports = {name: free_port(port) for name, port in PREFERRED_PORTS.items()}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    secret, password = secrets.token_hex(16), secrets.token_hex(16)

    inbox, board_file = str(folder / "inbox.db"), str(folder / "board.db")
    receiver = programs.start(
        "event_hook", ["-m", "demo.receiver", "--port", str(ports["event_hook"]), "--store", inbox], env={}
    )
    registry = programs.start(
        "registry",
        [
            "-W",
            "ignore",
            "-c",
            _RUN_KINTO,
            "start",
            "--port",
            str(ports["registry"]),
            "--ini",
            str(_HERE / "kinto.ini"),
        ],
        env={"KINTO_USERID_HMAC_SECRET": secrets.token_hex(16)},
    )
    _make_board(Path(board_file))
    board_options = ["-h", "127.0.0.1", "-p", str(ports["flight_board"]), "-c", str(_HERE / "datasette.yaml")]
    board = programs.start(
        "flight_board", ["-m", "datasette", "serve", board_file, *board_options], env={"DATASETTE_SECRET": secret}
    )
    token = _board_token(secret)

    receiver.wait_until_it_answers(f"{urls['event_hook']}/summary", seconds=30)
    board.wait_until_it_answers(f"{urls['flight_board']}/board.json", seconds=60)
    registry.wait_until_it_answers(f"{urls['registry']}/v1/__lbheartbeat__", seconds=60)
    _make_registry(urls["registry"], password)
    return TargetApis(base_urls=urls, board_token=token, registry_password=password)


def write_configuration(source: Path, destination: Path, base_urls: Mapping[str, str]) -> None:
    """Copy the demo's configuration from *source* to *destination*, with the targets' real addresses.

    Raises ConfigurationChanged when the files in *source* are not the demo's any more.
    """
    shutil.rmtree(destination, ignore_errors=True)
    (destination / "targets").mkdir(parents=True)
    paths = [Path("source.yaml"), *(Path("targets") / f"{name}.yaml" for name in base_urls)]
    for path in paths:
        try:
            text = (source / path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigurationChanged(f"The demo needs {source / path}, which is not there: {_ADVICE}.") from None
        if path.stem in base_urls:
            text, found = re.subn(r"(?m)^base_url: .*$", f"base_url: {base_urls[path.stem]}", text)
            if found != 1:
                raise ConfigurationChanged(
                    f"The demo fills the address in at the line of {source / path} that begins with 'base_url: ', "
                    f"and found {found} of them: {_ADVICE}."
                )
        (destination / path).write_text(text, encoding="utf-8")
    watched = yaml.safe_load((destination / "source.yaml").read_text(encoding="utf-8"))["tables"].keys()
    if watched != dataset.TABLES.keys():
        raise ConfigurationChanged(
            f"The demo is about the tables {', '.join(dataset.TABLES)}, but {source / 'source.yaml'} watches "
            f"{', '.join(watched)}: {_ADVICE}."
        )


def registry_client(apis: TargetApis) -> httpx.Client:
    """Return a client that may read and write the registry."""
    return httpx.Client(
        base_url=f"{apis.base_urls['registry']}/v1", auth=(REGISTRY_USER, apis.registry_password), timeout=60
    )


def _make_board(path: Path) -> None:
    store = sqlite3.connect(path)
    store.executescript(_BOARD)
    for table in ("airlines", "airports", "planes", "flights"):
        columns = [row[1] for row in store.execute(f"pragma table_info({table})")]
        before, after = (", ".join(f"{row}.{column}" for column in columns) for row in ("old", "new"))
        store.execute(
            f"create trigger {table}_rewritten after update on {table} when ({before}) is ({after}) "  # noqa: S608
            f"begin insert into rewrites (of_table, row_id) values ('{table}', new.rowid); end"
        )
    store.commit()
    store.close()


def _board_token(secret: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "datasette", "create-token", "writer"],
        env={"DATASETTE_SECRET": secret},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise ProgramFailed(f"datasette create-token failed: {answer.stderr.strip()}")
    return answer.stdout.strip()


def _make_registry(base_url: str, password: str) -> None:
    account = {"data": {"password": password}}
    httpx.put(f"{base_url}/v1/accounts/{REGISTRY_USER}", json=account, timeout=60).raise_for_status()
    apis = TargetApis(base_urls={"registry": base_url}, board_token="", registry_password=password)
    with registry_client(apis) as client:
        client.put("/buckets/fleet").raise_for_status()
        for name in ("airlines", "airports", "planes"):
            data = {"schema": _PLANE_SCHEMA} if name == "planes" else {}
            client.put(f"/buckets/fleet/collections/{name}", json={"data": data}).raise_for_status()
