"""`source.yaml` says which tables are watched, and a mistake in it says what to write instead."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.changes.config import SourceConfig, TableName


def source(**content: Any) -> SourceConfig:
    return SourceConfig.model_validate(content)


def test_a_table_needs_a_key_and_no_more() -> None:
    table = source(tables={"orders": {"key": "id"}}).tables["orders"]

    assert table.key_columns == ("id",)
    assert table.exclude == []
    assert table.operations == ["insert", "update", "delete"]


def test_a_key_of_several_columns_keeps_their_order() -> None:
    assert source(tables={"t": {"key": ["b", "a"]}}).tables["t"].key_columns == ("b", "a")


@pytest.mark.parametrize(
    ("stream", "table", "where"),
    [
        ("orders", {}, TableName("public", "orders")),
        ("sales.orders", {}, TableName("sales", "orders")),
        ("orders", {"schema": "sales"}, TableName("sales", "orders")),
        ("sales.orders", {"schema": "odd"}, TableName("odd", "sales.orders")),
    ],
)
def test_a_stream_is_called_what_its_table_is_called(stream: str, table: dict[str, Any], where: TableName) -> None:
    assert source(tables={stream: {"key": "id", **table}}).table_name(stream) == where


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "Field required"),
        ({"tables": {"t": {}}}, "Field required"),
        ({"tables": {"t": {"key": "id", "keys": "id"}}}, "Extra inputs are not permitted"),
        ({"tables": {}, "retention": 3}, "Extra inputs are not permitted"),
        ({"tables": {"t": {"key": []}}}, "name the column, or the columns, of the table's primary key"),
        ({"tables": {"t": {"key": ""}}}, "name the column"),
        ({"tables": {"t": {"key": 1}}}, "valid string"),
        ({"tables": {"t": {"key": ["a", "a"]}}}, "'a' is named twice; remove one"),
        ({"tables": {"t": {"key": "id", "exclude": ["x", "x"]}}}, "'x' is named twice; remove one"),
        ({"tables": {"t": {"key": "id", "exclude": "x"}}}, "valid list"),
        ({"tables": {"t": {"key": ["a", "id"], "exclude": ["id"]}}}, "key column 'id' is also in 'exclude'.*remove it"),
        ({"tables": {"t": {"key": "id", "operations": []}}}, "name insert, update or delete, or remove the table"),
        ({"tables": {"t": {"key": "id", "operations": ["truncate"]}}}, "'insert', 'update' or 'delete'"),
        ({"tables": {"t": {"key": "id"}, "public.t": {"key": "id"}}}, "'t' and 'public.t' are the same table"),
        ({"tables": {".t": {"key": "id"}}}, "'.t' names no table"),
        ({"tables": {}, "retention_days": 0}, "greater than or equal to 1"),
        ({"tables": {}, "retention_days": 30, "drop_after": 0}, "greater than or equal to 1"),
        ({"tables": {}, "drop_after": 7}, "'drop_after' shortens what 'retention_days' keeps; give that too"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SourceConfig.model_validate(content)
