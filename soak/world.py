"""Set the soak's world up, source and targets and Dagster, and take it down again whatever happens."""

import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import yaml

from demo.processes import Program, ProgramFailed, Programs, free_port
from soak import deployment, writers
from soak.deployment import Deployment
from soak.schedule import BAD_KEYS, Misbehaviour

_TIMEOUT = 3.0
_WRITERS = 3

_RECORD = {"id": "$_key", "change": "$_change_id", "stream": "$_stream", "deleted": False, "row": "$_row"}
_RESULTS = {"items": "$.results", "id": "id", "status": "status"}


def _batches(size: int, *, mode: str, **more: Any) -> Mapping[str, Any]:
    operation = {"method": "POST", "path": "/rows", "batch": {"max_records": size}, **more}
    return {
        "mode": mode,
        "record": _RECORD,
        "upsert": operation,
        "delete": {**operation, "record": {**_RECORD, "deleted": True}},
    }


_SINGLY = {
    "mode": "state",
    "record": _RECORD,
    "upsert": {"path": "/rows"},
    "delete": {"path": "/rows/${_key}?change=${_change_id}"},
}

ROUTES: Mapping[str, Mapping[str, Any]] = {
    "steady": _batches(50, mode="event"),
    "flaky": _batches(20, mode="event", results=_RESULTS),
    "away": _SINGLY,
    "stuck": _batches(50, mode="state"),
    "busy": _batches(25, mode="event"),
    "locked": _batches(50, mode="state"),
    "picky": _batches(20, mode="state", results=_RESULTS),
}
"""The targets, and how each wants its records: single or in batches, every event or the latest state."""


@dataclass(slots=True, kw_only=True)
class World:
    """A source that is written to, targets, and Dagster between them."""

    deployment: Deployment
    programs: Programs
    ports: Mapping[str, int]
    controls: Mapping[str, int]
    code_port: int
    running: dict[str, Program] = field(default_factory=dict)
    """The programs that are to stay up, by name."""
    starts: int = 0

    def connect(self) -> psycopg.Connection:
        """Return a connection to the source, in autocommit."""
        return self.deployment.connect()

    def start_code_server(self) -> None:
        """Start what loads the definitions and launches runs."""
        where = ["-h", "127.0.0.1", "-p", str(self.code_port)]
        self._start("code_server", ["-m", "dagster", "code-server", "start", "-m", "pipelines.definitions", *where])

    def start_daemon(self) -> None:
        """Start what ticks the sensor and takes runs off the queue."""
        workspace = str(self.deployment.folder / "workspace.yaml")
        self._start("daemon", ["-m", "dagster._daemon", "run", "-w", workspace])

    def start_writers(self, per_second: float) -> None:
        """Start what changes the source; *per_second* transactions in all, and one writer that commits late."""
        for number in range(_WRITERS):
            pace = ["--seed", str(number), "--per-second", str(per_second / _WRITERS)]
            self._start(f"writer_{number}", ["-m", "soak.writers", *pace])
        self._start("writer_late", ["-m", "soak.writers", "--seed", "99", "--per-second", "1", "--late"])

    def stop_writers(self) -> None:
        """Let every writer end its transaction and stop; raises ProgramFailed if one broke."""
        for name in [name for name in self.running if name.startswith("writer")]:
            writer = self.running.pop(name)
            writer.stop()
            if writer.exit_code() != 0:
                raise ProgramFailed(f"{name} ended with exit code {writer.exit_code()}. {writer.last_words()}")

    def raise_if_any_ended(self) -> None:
        """Raise ProgramFailed if one that was to stay up has ended by itself."""
        for name, program in self.running.items():
            if program.exit_code() is not None:
                raise ProgramFailed(f"{name} ended with exit code {program.exit_code()}. {program.last_words()}")

    def behave(self, change: Misbehaviour) -> None:
        """Let a target behave otherwise."""
        self.ask(change.target, "/behave", chance=dict(change.chance), listens=change.listens)

    def ask(self, target: str, path: str, **question: Any) -> Any:
        """Return what *target* says to its keeper."""
        answer = httpx.post(f"http://127.0.0.1:{self.controls[target]}{path}", json=question, timeout=60)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def start_targets(self) -> None:
        """Start every target, well."""
        for number, name in enumerate(ROUTES):
            ports = ["--port", str(self.ports[name]), "--control", str(self.controls[name])]
            more = ["--bad-keys", *BAD_KEYS] if name == "picky" else []
            self._start(
                f"target_{name}",
                ["-m", "soak.target", *ports, "--seed", str(number), "--patience", str(_TIMEOUT), *more],
            )
        for name in ROUTES:
            url = f"http://127.0.0.1:{self.controls[name]}/faults"
            self.running[f"target_{name}"].wait_until_it_answers(url, seconds=60)

    def _start(self, name: str, arguments: list[str]) -> None:
        self.starts += 1
        self.running[name] = self.programs.start(f"{name}_{self.starts}", arguments, env=self.deployment.env)


@contextmanager
def set_up(folder: Path, name: str, say: Callable[[str], None]) -> Iterator[World]:
    """Make the world and yield it; everything that was started is stopped in the end.

    The databases, `distributary_<name>` and Dagster's, stay to be looked at. *say* is told each step. Raises
    ProgramFailed, and what the embedded server raises.
    """
    with ExitStack() as stack:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say("Starting Postgres, and making databases of our own")
        server_url = stack.enter_context(deployment.server())
        made = deployment.make(folder, server_url, name)
        programs = stack.enter_context(Programs(folder))
        # Entered last, so left first: nothing may cut short what follows.
        stack.callback(_ignore_signals)
        world = World(
            deployment=made,
            programs=programs,
            ports={name: free_port(0) for name in ROUTES},
            controls={name: free_port(0) for name in ROUTES},
            code_port=free_port(0),
        )
        _configure(world)
        say(f"Starting {len(ROUTES)} targets: {', '.join(ROUTES)}")
        world.start_targets()
        say("Starting Dagster: a code server and the daemon")
        world.start_code_server()
        world.start_daemon()
        yield world


def _configure(world: World) -> None:
    targets = [
        {
            "name": name,
            "base_url": f"http://127.0.0.1:{world.ports[name]}",
            "timeout_seconds": _TIMEOUT,
            "max_in_flight": 4,
            "retry": {"initial_backoff": 0.1, "max_backoff": 2.0, "max_elapsed": 10.0},
            "circuit_breaker": {"failure_threshold": 5, "error_timeout": 2.0},
            "probe_interval": 5.0,
            "routes": dict.fromkeys(writers.STREAMS, route),
        }
        for name, route in ROUTES.items()
    ]
    world.deployment.configure(source={"tables": {name: {"key": "id"} for name in writers.STREAMS}}, targets=targets)
    with world.connect() as connection:
        connection.execute(writers.TABLES)
    world.deployment.migrate(world.programs)
    code_server = {"host": "127.0.0.1", "port": world.code_port, "location_name": "distributary"}
    workspace = {"load_from": [{"grpc_server": code_server}]}
    (world.deployment.folder / "workspace.yaml").write_text(yaml.safe_dump(workspace), encoding="utf-8")


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
