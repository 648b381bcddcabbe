"""Bring a database up to date: the schema `distributary`, and the capture triggers of the tables in `source.yaml`.

`python -m resources.migrate` may be run at any time and as often as one likes; what is as it should be is left alone.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from resources import config_files, database
from resources.capture import CaptureBusy, exclusively, install_capture, patiently
from resources.captured_table import CaptureRefused
from resources.source_tables import look_at_tables, missing_columns
from resources.sql import statements

MIGRATIONS = Path(__file__).parent / "sql" / "migrations"


class MigrationRefused(Exception):
    """The schema cannot be brought up to date; the message says why and what to do."""


class CachedSequence(MigrationRefused):
    """Change ids are handed out in advance: one could be used long after its gap was closed, and be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One numbered file of SQL."""

    name: str
    text: str

    @property
    def checksum(self) -> str:
        """What the file is recognised by."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_migrations(folder: Path = MIGRATIONS) -> tuple[Migration, ...]:
    """Return the migrations in *folder*, in order."""
    # Read as text, so that a checkout with other line ends is the same migration.
    return tuple(Migration(name=path.stem, text=path.read_text("utf-8")) for path in sorted(folder.glob("[0-9]*.sql")))


def apply_migrations(
    connection: psycopg.Connection, folder: Path = MIGRATIONS, *, sleep: Callable[[float], None] = time.sleep
) -> list[str]:
    """Apply the migrations in *folder* that *connection*'s database lacks, all or none, and return their names.

    *connection* must be outside of any transaction. Whoever appends to the log waits behind it for two seconds at most;
    then it gives way, and tries again. Raises MigrationRefused, and CaptureBusy if there was never a moment for it.
    """
    migrations, done = read_migrations(folder), list[str]()

    def apply() -> None:
        _make_room(connection)
        applied: dict[str, str] = dict(connection.execute(statements("migrate")["applied"]).fetchall())
        _refuse_other_history(applied, migrations)
        missing = [migration for migration in migrations if migration.name not in applied]
        for migration in missing:
            connection.execute(sql.SQL(migration.text))
            connection.execute(
                statements("migrate")["record"], {"name": migration.name, "checksum": migration.checksum}
            )
        done[:] = [migration.name for migration in missing]

    with exclusively(connection):
        with connection.transaction():
            tables = [oid for (oid,) in connection.execute(statements("migrate")["tables"]).fetchall()]
        patiently(connection, "The schema 'distributary'", tables, apply, unchanged="it is as it was", sleep=sleep)
    return done


def check_sequence(connection: psycopg.Connection) -> None:
    """Raise CachedSequence if sessions draw change ids in advance."""
    row = connection.execute(statements("migrate")["sequence_cache"]).fetchone()
    if row is not None and row[0] > 1:
        raise CachedSequence(
            f"The sequence of distributary.change_log.change_id has CACHE {row[0]}, so that a change could take an"
            " old id and be lost: run ALTER TABLE distributary.change_log ALTER COLUMN change_id SET CACHE 1."
        )


def _make_room(connection: psycopg.Connection) -> None:
    """Make the schema and the migrator's own table, if they are not there."""
    if connection.execute(statements("migrate")["record_exists"]).fetchone() == (True,):
        return
    try:
        # Asked first: CREATE SCHEMA IF NOT EXISTS wants the right to create one even if there is one.
        if connection.execute(statements("migrate")["schema_exists"]).fetchone() == (False,):
            connection.execute("create schema distributary")
        connection.execute(
            "create table distributary.migration ("
            "name text primary key, checksum text not null, applied_at timestamptz not null default now())"
        )
    except psycopg.errors.InsufficientPrivilege:
        user, name = connection.info.user, connection.info.dbname
        raise MigrationRefused(
            f"The role '{user}' may not create the schema 'distributary' in the database '{name}': as its owner run"
            f' GRANT CREATE ON DATABASE "{name}" TO "{user}", or run this as the owner.'
        ) from None


def _refuse_other_history(applied: dict[str, str], migrations: Sequence[Migration]) -> None:
    here = {migration.name: migration for migration in migrations}
    for name, checksum in applied.items():
        if name not in here:
            raise MigrationRefused(
                f"The database has had the migration '{name}', which this version does not know: it was migrated by a"
                " newer one; use that one."
            )
        if here[name].checksum != checksum:
            raise MigrationRefused(
                f"The migration '{name}' was changed after this database had it: restore the file, and put the change"
                " into a new migration with the next number."
            )
    missing = [migration.name for migration in migrations if migration.name not in applied]
    if missing and applied and missing[0] < max(applied):
        raise MigrationRefused(
            f"The migration '{missing[0]}' comes before '{max(applied)}', which this database has had already: give it"
            " the next number."
        )


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; return its exit status: 2 if the configuration is at fault, 1 for all else."""
    argparse.ArgumentParser(prog="python -m resources.migrate", description=__doc__).parse_args(arguments)
    try:
        folder = config_files.config_folder()
        source, targets = config_files.load_source(folder), config_files.load_targets(folder)
        config_files.check_routes(source, targets)
        with database.connect(
            database.database_url(), application_name="distributary migrate", autocommit=True
        ) as connection:
            database.check_server(connection)
            for name in apply_migrations(connection):
                print(f"{name}: applied", flush=True)
            check_sequence(connection)
            install_capture(connection, source, report=lambda action: print(action, flush=True))
            tables = look_at_tables(connection, source)
        problems = [problem for target in targets.values() for problem in missing_columns(target, tables)]
        if problems:
            raise config_files.ConfigError("\n".join(problems))
    except (config_files.ConfigError, CaptureRefused) as problem:
        print(problem, file=sys.stderr)
        return 2
    except (database.DatabaseProblem, MigrationRefused, CaptureBusy) as problem:
        print(problem, file=sys.stderr)
        return 1
    except psycopg.Error as problem:
        what = problem.diag.message_primary or str(problem).strip() or type(problem).__name__
        print(f"{_advice(problem)}; Postgres says: {what}.", file=sys.stderr)
        return 1
    return 0


def _advice(problem: psycopg.Error) -> str:
    if isinstance(problem, psycopg.errors.InsufficientPrivilege):
        return "This role lacks a right: run the migration as the role that ran it first, or as a superuser"
    if isinstance(problem, psycopg.errors.ReadOnlySqlTransaction):
        return "The database takes no writes: point DATABASE_URL at the primary"
    if isinstance(problem, psycopg.OperationalError):
        return "The connection was lost, and the migration is not complete: run it again"
    return "The migration failed, and what was not reported is not done"


if __name__ == "__main__":
    sys.exit(main())
