"""What a deployment has, made anew on the embedded Postgres: databases, a configuration folder, an environment."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import yaml
from psycopg import sql

from demo.processes import ROOT, ProgramFailed, Programs
from resources import embedded_postgres

WORKSPACE = ("-w", str(ROOT / "workspace.yaml"))
EXECUTE = ("-m", "dagster", "job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One source with its targets' files, and Dagster's own database beside it."""

    folder: Path
    database_url: str
    env: Mapping[str, str] = field(repr=False)
    """What the pipeline's commands need in their environment."""

    def configure(self, *, source: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> None:
        """Write the configuration, in place of what was there."""
        config = self.folder / "config"
        shutil.rmtree(config, ignore_errors=True)
        (config / "targets").mkdir(parents=True)
        (config / "source.yaml").write_text(yaml.safe_dump(source), encoding="utf-8")
        for target in targets:
            (config / "targets" / f"{target['name']}.yaml").write_text(yaml.safe_dump(target), encoding="utf-8")

    def migrate(self, programs: Programs) -> None:
        """Set up the schema and the source's triggers, as a user would; raises ProgramFailed."""
        migration = programs.start("migrate", ["-m", "resources.migrate"], env=self.env)
        with suppress(subprocess.TimeoutExpired):
            migration.guard.wait(120)
        if migration.exit_code() != 0:
            raise ProgramFailed(f"python -m resources.migrate failed. {migration.last_words()}")

    def connect(self) -> psycopg.Connection:
        """Return a connection to the source, in autocommit."""
        return psycopg.connect(self.database_url, autocommit=True)


@contextmanager
def server() -> Iterator[str]:
    """Yield the URL of the embedded server; stop it afterwards if it was not up before and nobody else uses it."""
    was_up = embedded_postgres.running_url() is not None
    url = embedded_postgres.start()
    try:
        yield url
    finally:
        if not was_up and not _is_used(url):
            embedded_postgres.stop()


def make(folder: Path, server_url: str, name: str) -> Deployment:
    """Make the databases `distributary_<name>` and `…_dagster` and an empty Dagster home below *folder*."""
    source = make_database(server_url, f"distributary_{name}")
    dagster = make_database(server_url, f"distributary_{name}_dagster")
    home = folder / "dagster"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / "dagster.yaml").symlink_to(ROOT / "dagster.yaml")
    return Deployment(
        folder=folder,
        database_url=source,
        env={
            "DATABASE_URL": source,
            "DAGSTER_POSTGRES_URL": dagster.replace("postgresql://", "postgresql+psycopg2://", 1),
            "DAGSTER_HOME": str(home),
            "DISTRIBUTARY_CONFIG": str(folder / "config"),
        },
    )


def drop(server_url: str, name: str) -> None:
    """Drop the databases that `make` made."""
    for database in (f"distributary_{name}", f"distributary_{name}_dagster"):
        drop_database(server_url, database)


def make_database(server_url: str, name: str) -> str:
    """Make an empty database, in place of any of that name, and return its URL."""
    drop_database(server_url, name)
    with psycopg.connect(server_url, autocommit=True) as connection:
        # Not from template1: whoever is connected to that would be in the way.
        connection.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def drop_database(server_url: str, name: str) -> None:
    """Drop the database *name* if there is one, whoever is connected to it."""
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def _is_used(server_url: str) -> bool:
    """Return whether others have sessions on the server; whoever has just left is still listed for a moment."""
    with psycopg.connect(server_url, autocommit=True) as connection:
        for _ in range(20):
            row = connection.execute(
                "select count(*) from pg_stat_activity "
                "where backend_type = 'client backend' and pid <> pg_backend_pid()"
            ).fetchone()
            if row == (0,):
                return False
            time.sleep(0.1)
    return True
