"""Give tests a real Postgres: one embedded server for all of them, a fresh migrated database for each that asks."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from resources import embedded_postgres


@pytest.fixture(scope="session", autouse=True)
def tests_own_server() -> Iterator[Path]:
    """Turn whatever a test may start to a server of the tests' own; return its folder, gone with the last session.

    So neither the databases of `make dev` nor those that the environment names are ever touched, and nothing is left
    running. Sessions at the same time share the server and a lock, which the kernel frees however a session ends.
    """
    beside = embedded_postgres.default_folder()
    folder = beside.with_name(f"{beside.name}-of-tests")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600)
    with pytest.MonkeyPatch.context() as environment:
        for variable in ("DATABASE_URL", "DAGSTER_POSTGRES_URL", "DAGSTER_HOME"):
            environment.delenv(variable, raising=False)
        environment.setenv(embedded_postgres.FOLDER_VARIABLE, str(folder))
        if _alone(lock):
            embedded_postgres.remove(folder)  # left by a session that was killed
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder
        if _alone(lock):
            embedded_postgres.remove(folder)
    os.close(lock)


@pytest.fixture(scope="session")
def postgres_url(tests_own_server: Path) -> str:
    """Return the URL of the tests' server's database `postgres`, with the right to make databases."""
    return embedded_postgres.start(tests_own_server, durable=False)


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> str:
    """Return the name of this session's migrated database, from which each test's is cloned."""
    from resources.migrate import apply_migrations  # here, so that tests of pure modules start without it

    name = f"template_{uuid4().hex[:12]}"
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    with psycopg.connect(_sibling(postgres_url, name), autocommit=True) as connection:
        apply_migrations(connection)
    return name


@pytest.fixture
def database(postgres_url: str, template_database: str) -> Iterator[str]:
    """Return the URL of a fresh database with our schema; it is dropped after the test, whoever is still connected."""
    name = f"test_{uuid4().hex[:12]}"
    clone = sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template_database))
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(clone)
        yield _sibling(postgres_url, name)
        server.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def _alone(lock: int) -> bool:
    """Return whether no other session uses the server, and keep others from it if so; gives up the shared lock."""
    fcntl.flock(lock, fcntl.LOCK_UN)  # first, or two sessions ending at once would each see the other
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sibling(url: str, database: str) -> str:
    """Return *url* with another database of the same server."""
    return urlsplit(url)._replace(path=f"/{database}").geturl()
