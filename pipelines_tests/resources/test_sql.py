"""Named statements are found by name, and every one of them fits the schema that the migrations make."""

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

import resources.sql
from resources.sql import MalformedSqlFile, parse, statements

FILES = sorted(path.stem for path in Path(resources.sql.__file__).parent.glob("*.sql"))
NAMED = [(file, name) for file in FILES for name in statements(file)]
PARAMETER = re.compile(r"%\((\w+)\)[sbt]")
# What Postgres can prepare; the rest (LISTEN, SET, LOCK …) names nothing of the schema that could be wrong.
PREPARABLE = re.compile(r"(?i)\s*(select|with|insert|update|delete|merge|values)\b")
COMMENT = re.compile(r"--[^\n]*")


@pytest.fixture(scope="module")
def migrated(postgres_url: str, template_database: str) -> Iterator[psycopg.Connection]:
    """Return a connection to the migrated database itself: preparing changes nothing, if the transaction is undone."""
    name = f"statements_{template_database}"
    with psycopg.connect(postgres_url, autocommit=True) as server:
        parts = sql.Identifier(name), sql.Identifier(template_database)
        server.execute(sql.SQL("create database {} template {}").format(*parts))
        with psycopg.connect(postgres_url, dbname=name, autocommit=True) as connection:
            yield connection
        server.execute(sql.SQL("drop database {} with (force)").format(parts[0]))


def as_prepared(statement: str) -> str:
    """Return *statement* with $1, $2 … for its parameters."""
    names = list(dict.fromkeys(PARAMETER.findall(statement)))
    numbered = PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", statement)
    return numbered.replace("%%", "%")


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_every_statement_fits_the_schema(migrated: psycopg.Connection, file: str, name: str) -> None:
    # What several statements of a file share stands there once, under a name of its own.
    shared = statements(file).get("selected", "")
    statement = COMMENT.sub("", statements(file)[name].replace("{selected}", shared))
    if not PREPARABLE.match(statement):
        pytest.skip("not a statement that can be prepared")
    for command in filter(str.strip, statement.split(";")):
        with migrated.transaction(force_rollback=True):
            # The migrator makes its own table, so the template may be without.
            migrated.execute(
                "create table if not exists distributary.migration (name text, checksum text, applied_at timestamptz)"
            )
            migrated.execute(sql.SQL("prepare it as {}").format(sql.SQL(as_prepared(command))))
            migrated.execute("deallocate it")


def test_files_of_statements_were_found() -> None:
    assert {"ledger", "capture", "migrate"} <= set(FILES)


def test_statements_are_told_apart_by_their_names() -> None:
    text = "-- What this is for.\n\n-- name: first\nselect 1;\n\n-- a comment\n-- name: second\nselect 2\n"

    assert parse(text, file="f") == {"first": "select 1;\n\n-- a comment", "second": "select 2"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("select 1\n-- name: a\nselect 2", r"f\.sql: there is SQL above the first"),
        ("-- name: a\nselect 1\n-- name: a\nselect 2", r"f\.sql: the name 'a' is used twice"),
    ],
)
def test_a_file_that_says_nothing_clear_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(MalformedSqlFile, match=sentence):
        parse(text, file="f")
