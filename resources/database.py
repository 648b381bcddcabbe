"""Answer "which database?": the one that the environment names, else the embedded server's; and connect to it.

In a shell, `eval "$(python -m resources.database env)"` sets what Dagster and everything here reads.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from resources import embedded_postgres

OLDEST_MAJOR_VERSION = 14

_SPELLINGS = ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+psycopg")
_EXAMPLE = "postgresql://user:password@host:5432/database"
_ESCAPED_EXAMPLE = f"{_EXAMPLE}, and inside user and password %40 for @, %3A for :, %2F for / and %25 for %"
# A connection whose other end is gone is noticed within a minute, not after the two hours of the kernel's defaults.
_MANNERS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
# What the server or the network says, and what to look at.
_ADVICE = (
    ("password", "check user and password"),
    ("no pg_hba.conf entry", "let this user and address in by the server's pg_hba.conf, or try sslmode=require"),
    ("does not exist", "create it, or check the name"),
    ("permission denied", "this account may not open the server's socket"),
    ("invalid", "correct that in the URL"),
    ("too many", "the server's max_connections is used up"),
    ("starting up", "try again in a moment"),
    ("shutting down", "try again once the server is back"),
)
_ADVICE_ON_A_SOCKET = "start the server (the embedded one: `python -m resources.embedded_postgres start`)"
_ADVICE_ON_AN_ADDRESS = "check host and port, that the server is up, and that this machine may reach it"


class DatabaseProblem(Exception):
    """The database cannot be used; the message says why and what to check, and has no password in it."""


class MalformedDatabaseUrl(DatabaseProblem):
    """A variable of the environment should hold a Postgres URL and does not."""


class DagsterDatabaseMissing(DatabaseProblem):
    """The environment names the database of the changes but not Dagster's."""


class DatabaseUnreachable(DatabaseProblem):
    """No connection could be made."""


class ServerTooOld(DatabaseProblem):
    """The server's PostgreSQL lacks what the ledger is made of."""


def database_url() -> str:
    """Return the `postgresql://` URL of the database that holds the change log and the ledger.

    It is DATABASE_URL; if that is unset, the database `distributary` of the embedded server, which is started if need
    be. Raises DatabaseProblem.
    """
    return _named_by("DATABASE_URL") or _embedded("distributary")


def dagster_postgres_url() -> str:
    """Return the `postgresql+psycopg2://` URL of the database for Dagster's own storage.

    It is DAGSTER_POSTGRES_URL; if DATABASE_URL is unset too, the database `dagster` of the embedded server. Raises
    DatabaseProblem.
    """
    url = _named_by("DAGSTER_POSTGRES_URL")
    if url is None and os.environ.get("DATABASE_URL", "").strip():
        raise DagsterDatabaseMissing(
            "DATABASE_URL is set but DAGSTER_POSTGRES_URL is not: set it to the database for Dagster's own storage,"
            " best one of its own (`create database dagster` on the same server will do);"
            " or unset both to use the embedded server."
        )
    # SQLAlchemy 2.1 takes plain postgresql:// for psycopg 3, with which dagster-postgres cannot send its notifications.
    return (url or _embedded("dagster")).replace("postgresql://", "postgresql+psycopg2://", 1)


def normalised(url: str, *, variable: str) -> str:
    """Return *url*, the value of *variable*, spelled `postgresql://…`; raises MalformedDatabaseUrl."""
    scheme, separator, rest = url.strip().partition("://")
    if not separator:
        raise MalformedDatabaseUrl(f"{variable} is not a URL: write {_EXAMPLE}.")
    if scheme not in _SPELLINGS:
        raise MalformedDatabaseUrl(f"{variable} names a '{scheme}' database, only Postgres will do: write {_EXAMPLE}.")
    plain = f"postgresql://{rest}"
    if _parts(plain) is None:
        raise MalformedDatabaseUrl(f"{variable} cannot be read as a URL: write {_ESCAPED_EXAMPLE}.")
    return plain


def connect(url: str, *, application_name: str, autocommit: bool = False) -> psycopg.Connection:
    """Connect to *url* so that a dead network is noticed; what *url* itself says of that goes first.

    Raises DatabaseUnreachable.
    """
    parts = _parts(url)
    if parts is None:
        raise DatabaseUnreachable(f"The database's URL cannot be read: write {_ESCAPED_EXAMPLE}.")
    manners = {name: value for name, value in _MANNERS.items() if name not in parts}
    try:
        return psycopg.connect(url, autocommit=autocommit, application_name=application_name, **manners)
    except psycopg.OperationalError as problem:
        raise DatabaseUnreachable(_unreachable(parts, str(problem))) from None


def _parts(url: str) -> dict[str, Any] | None:
    """Return what *url* says by libpq's names, None if it cannot be read (libpq's reason may quote the password)."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        return None
    ports = str(parts.get("port", "")).split(",")
    # An unescaped @ or / in a password makes it a part of the host, of the port or of the database's name.
    misread = "@" in f"{parts.get('host')}{parts.get('dbname')}" or not all(port.isdecimal() for port in ports if port)
    return None if misread else dict(parts)


def check_server(connection: psycopg.Connection) -> None:
    """Raise ServerTooOld if the server is older than PostgreSQL 14."""
    refuse_old_server(connection.info.server_version)


def refuse_old_server(version: int) -> None:
    """Raise ServerTooOld if *version*, as a server numbers it (130012 is 13.12), is older than PostgreSQL 14."""
    if version < OLDEST_MAJOR_VERSION * 10_000:
        raise ServerTooOld(
            f"The database server is PostgreSQL {version // 10_000}, but the ledger is kept in multiranges, which need"
            f" {OLDEST_MAJOR_VERSION} or newer: upgrade the server, or set DATABASE_URL to a newer one."
        )


# --- the embedded server ----------------------------------------------------------------------------------------------


def _named_by(variable: str) -> str | None:
    """Return the URL in *variable*, None if it is unset."""
    value = os.environ.get(variable, "").strip()
    if not value:
        return None
    url = normalised(value, variable=variable)
    if conninfo_to_dict(url).get("host") == str(embedded_postgres.socket_folder()):
        _start_embedded()  # a shell still has what `env` printed, and the server was stopped or killed since
    return url


def _embedded(database: str) -> str:
    """Return the URL of *database* on the embedded server, making what is missing."""
    server = _start_embedded()
    with connect(server, application_name="distributary setup", autocommit=True) as connection:
        found = connection.execute("select from pg_database where datname = %s", [database]).fetchone()
        if found is None:
            # Not from template1: whoever is connected to that would be in the way.
            statement = sql.SQL("create database {} template template0").format(sql.Identifier(database))
            # Another process may be doing the same.
            with suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(statement)
    return urlsplit(server)._replace(path=f"/{database}").geturl()


def _start_embedded() -> str:
    try:
        return embedded_postgres.start()
    except embedded_postgres.EmbeddedPostgresFailed as problem:
        raise DatabaseUnreachable(str(problem)) from problem


# --- words ------------------------------------------------------------------------------------------------------------


def _unreachable(parts: dict[str, Any], problem: str) -> str:
    host = str(parts.get("host") or parts.get("hostaddr") or os.environ.get("PGHOST") or "/")
    by_socket = host.startswith("/")
    where = host if by_socket or "," in host else f"{host}:{parts.get('port', 5432)}"
    user = parts.get("user")
    as_user = f" as user '{user}'" if user else ""
    lines = [line.strip() for line in problem.splitlines() if line.strip()] or ["no reason was given"]
    telling = next((line for line in lines if "failed:" in line), lines[0])
    reason = telling.rpartition("failed:")[2].replace("FATAL:", "").strip().rstrip(".")  # before it, the address again
    advice = _ADVICE_ON_A_SOCKET if by_socket else _ADVICE_ON_AN_ADDRESS
    advice = next((better for mark, better in _ADVICE if mark in reason.lower()), advice)
    return f"Cannot reach the database '{parts.get('dbname') or user}' at {where}{as_user}: {reason}; {advice}."


# --- the command line -------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the variables by which Dagster and everything here find their databases, making what is missing."""
    return {
        "DATABASE_URL": database_url(),
        "DAGSTER_POSTGRES_URL": dagster_postgres_url(),
        "DAGSTER_HOME": str(_dagster_home()),
    }


def _dagster_home() -> Path:
    """Return DAGSTER_HOME, else `.data/dagster`, with the project's dagster.yaml linked to where Dagster reads it."""
    if named := os.environ.get("DAGSTER_HOME"):
        return Path(named)
    root = embedded_postgres.project_root()
    home = root / ".data" / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    settings, link = root / "dagster.yaml", home / "dagster.yaml"
    if settings.exists() and (link.is_symlink() or not link.exists()) and link.resolve() != settings.resolve():
        fresh = home / f"dagster.yaml.{os.getpid()}"
        fresh.symlink_to(settings)
        fresh.replace(link)  # in one step, whoever else does the same
    return home


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m resources.database", description=__doc__.splitlines()[0])
    parser.add_argument(
        "action", choices=["env"], help="print shell lines that set DATABASE_URL and what else is needed"
    )
    parser.parse_args(arguments)
    try:
        found = environment()
    except (DatabaseProblem, OSError) as problem:
        print(problem, file=sys.stderr)
        print("false")  # so that `eval "$(… env)" && …` stops here
        return 1
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
