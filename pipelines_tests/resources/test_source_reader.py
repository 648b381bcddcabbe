"""Rows are read under the keys that triggers write, whatever the types, and matched with what a target shows."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pipelines.changes.config import SourceConfig
from pipelines.reconciliation.listing import match_key
from resources.capture import install_capture
from resources.captured_table import find_tables
from resources.source_reader import SourceReader


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def watch(connection: psycopg.Connection, columns: str, key: str | list[str], **more: Any) -> SourceReader:
    connection.execute(f"create table things ({columns})")  # type: ignore[call-overload]
    source = SourceConfig.model_validate({"tables": {"things": {"key": key, **more}}})
    install_capture(connection, source)
    (found,) = find_tables(connection, source)
    return SourceReader(connection, found)


KEYS: Any = [
    ("id integer primary key", "id", "(1), (2), (10), (-3)"),
    ("id text primary key", "id", "('b'), ('a'), ('é'), ('it''s \"quoted\"'), ('1\\2')"),
    ("id numeric primary key", "id", "(1.50), (2), (-0.10)"),
    ("id uuid primary key", "id", "(gen_random_uuid()), (gen_random_uuid())"),
    ("id timestamptz primary key", "id", "('2026-01-01T00:00:00+02'), ('2025-06-01T12:30:00.123456Z')"),
    ("id bytea primary key", "id", "('\\x00ff'), ('\\x01')"),
    ("id boolean primary key", "id", "(true), (false)"),
    ("id bpchar(5) primary key", "id", "('ab'), ('b')"),
    ("a integer, b text, primary key (b, a)", ["a", "b"], "(1, 'x'), (2, 'x'), (1, 'y, \"z\"')"),
    ("a numeric, b timestamptz, primary key (a, b)", ["a", "b"], "(1.0, '2026-01-01Z'), (1.00, '2026-01-02Z')"),
]


@pytest.mark.parametrize(("columns", "key", "rows"), KEYS)
def test_rows_are_read_under_their_keys_and_found_by_what_a_target_shows(
    connection: psycopg.Connection, columns: str, key: Any, rows: str
) -> None:
    table = watch(connection, f"{columns}, note text default 'n'", key)
    names = key if isinstance(key, list) else [key]
    connection.execute(f"insert into things ({', '.join(names)}) values {rows}")  # type: ignore[call-overload]
    captured = dict(connection.execute("select key, payload from distributary.change_log").fetchall())

    singly = [row for chunk in table.chunks(limit=1) for row in chunk]
    at_once = [row for chunk in table.chunks(limit=1000) for row in chunk]

    assert singly == at_once
    assert {row.key: json.loads(row.payload) for row in singly} == captured
    assert len(singly) == len(captured)
    for row in singly:
        shown = json.loads(row.payload)
        if "numeric" not in columns:  # Python's own reader of numbers would lose digits
            assert match_key([shown[name] for name in names]) == row.match
    matches = [row.match for row in singly]
    assert table.keys_of(matches) == {row.match: row.key for row in singly}
    assert set(table.by_keys([row.key for row in singly])) == set(matches)


def test_excluded_columns_are_not_read(connection: psycopg.Connection) -> None:
    table = watch(connection, "id int primary key, secret text", "id", exclude=["secret"])
    connection.execute("insert into things values (1, 'x')")

    ((row,),) = table.chunks(limit=10)

    assert json.loads(row.payload) == {"id": 1}


def test_what_no_row_could_be_matched_by_has_no_key(connection: psycopg.Connection) -> None:
    table = watch(connection, "id int primary key", "id")

    assert table.keys_of(["7", "007", "x", "", "99999999999", " 8"]) == {"7": "7"}


def test_of_a_key_of_several_columns_too_few_parts_are_none(connection: psycopg.Connection) -> None:
    table = watch(connection, "a int, b text, primary key (a, b)", ["a", "b"])

    assert table.keys_of(['["1", "x"]', '["1"]', '["x", "y"]']) == {'["1", "x"]': '[1, "x"]'}


def test_an_empty_table_has_no_chunk(connection: psycopg.Connection) -> None:
    assert list(watch(connection, "id int primary key", "id").chunks(limit=10)) == []
