"""Give integration tests what a deployment has: a source database, Dagster's own, a home, files, a command line."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
import yaml
from psycopg import sql

ROOT = Path(__file__).parents[2]

_PIN = 4711


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One source with its targets' files, and Dagster beside it; processes are started in the project's folder."""

    database: str
    folder: Path
    env: dict[str, str] = field(repr=False)

    def write_target(self, name: str, base_url: str, **more: Any) -> None:
        """Write a target's file: rows of `people`, in batches of 50; *more* adds to it."""
        document = {
            "name": name,
            "base_url": base_url,
            "retry": {"initial_backoff": 0.05, "max_backoff": 0.1, "max_elapsed": 0.3},
            "routes": {"people": {"upsert": {"path": "/people", "batch": {"max_records": 50}}}},
            **more,
        }
        (self.folder / "config" / "targets" / f"{name}.yaml").write_text(yaml.safe_dump(document))

    def insert(self, count: int, *, name: str = "Ada Lovelace") -> None:
        """Commit *count* changes of new people."""
        with psycopg.connect(self.database) as connection:
            connection.execute(
                "insert into distributary.change_log (stream, key, operation, payload)"
                " select 'people', id, 'insert', jsonb_build_object('id', id, 'name', %s::text)"
                " from (select gen_random_uuid()::text as id from generate_series(1, %s)) as new",
                [name, count],
            )

    def query(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of *query* to the source database."""
        with psycopg.connect(self.database) as connection:
            return connection.execute(query).fetchall()

    def accepted(self) -> dict[str, int]:
        """Return how many changes each target has accepted."""
        return dict(self.query("select target, accepted from distributary.target_state"))

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `dagster` with *arguments* and return how it ended; *env* is added to the environment."""
        return subprocess.run(
            self._command("dagster", arguments),
            cwd=ROOT,
            env=self.env | env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @contextmanager
    def started(self, program: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """Yield a program of Dagster's that runs, and the file with its output; it and all it started end with this."""
        log = self.folder / f"{program}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(program, arguments),
                cwd=ROOT,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process, log
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            # Whatever it started is in its group, which is ours alone.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @contextmanager
    def pinned(self, key: str) -> Iterator[Callable[[], bool]]:
        """Have the append of a record of *key*, addressed to a target, wait until the context ends.

        Yields what says whether one is waiting.
        """
        waiting = "select exists (select from pg_locks where locktype = 'advisory' and objid = %s and not granted)"
        with psycopg.connect(self.database, autocommit=True) as pin:
            pin.execute("select pg_advisory_lock(%s)", [_PIN])
            pin.execute(
                "create function pin() returns trigger language plpgsql as"
                f" 'begin perform pg_advisory_xact_lock({_PIN}); return new; end'"
            )
            pin.execute(
                "create trigger pin before insert on distributary.change_log for each row"
                f" when (new.target is not null and new.key = '{key}') execute function pin()"
            )
            try:
                yield lambda: pin.execute(waiting, [_PIN]).fetchone() == (True,)
            finally:
                pin.execute("select pg_advisory_unlock(%s)", [_PIN])
                pin.execute("drop function pin cascade")

    def _command(self, program: str, arguments: tuple[str, ...]) -> list[str]:
        return [str(Path(sys.executable).with_name(program)), *arguments]


@pytest.fixture
def deployment(database: str, postgres_url: str, tmp_path: Path) -> Iterator[Deployment]:
    """Return a deployment without targets, on databases of its own."""
    name = f"dagster_{uuid4().hex[:12]}"
    (tmp_path / "config" / "targets").mkdir(parents=True)
    (tmp_path / "config" / "source.yaml").write_text("tables: {people: {key: id}}\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").symlink_to(ROOT / "dagster.yaml")
    with ExitStack() as stack:
        server = stack.enter_context(psycopg.connect(postgres_url, autocommit=True))
        server.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
        stack.callback(server.execute, sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
        settings: Mapping[str, str] = {
            "DATABASE_URL": database,
            "DAGSTER_POSTGRES_URL": urlsplit(postgres_url)
            ._replace(path=f"/{name}")
            .geturl()
            .replace("postgresql://", "postgresql+psycopg2://", 1),
            "DAGSTER_HOME": str(tmp_path / "home"),
            "DISTRIBUTARY_CONFIG": str(tmp_path / "config"),
        }
        yield Deployment(database=database, folder=tmp_path, env=os.environ | settings)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
