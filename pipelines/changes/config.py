"""Say which tables are watched, as `source.yaml` does."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CapturedOperation = Literal["insert", "update", "delete"]
_ALL_OPERATIONS: tuple[CapturedOperation, ...] = ("insert", "update", "delete")


class TableName(NamedTuple):
    """Where a watched table is."""

    schema: str
    table: str


class TableConfig(BaseModel):
    """One watched table: what tells its rows apart, and what of it enters the change log."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)

    key: str | list[str]
    """The column, or columns, of a unique index. The order given here is the order in the key's text."""
    exclude: list[str] = Field(default_factory=list)
    """Columns that never enter the log."""
    operations: list[CapturedOperation] = Field(default_factory=lambda: list(_ALL_OPERATIONS))
    """The change records to write. A changed key counts as a `delete` of the old and an `insert` of the new."""
    schema_name: str | None = Field(default=None, alias="schema", min_length=1)
    """The table's schema, for a table whose own name has a dot in it."""

    @property
    def key_columns(self) -> tuple[str, ...]:
        """The key's columns, in order."""
        return (self.key,) if isinstance(self.key, str) else tuple(self.key)

    @field_validator("key")
    @classmethod
    def _key_names_columns(cls, key: str | list[str]) -> str | list[str]:
        columns = [key] if isinstance(key, str) else key
        if not columns or not all(columns):
            raise ValueError("name the column, or the columns, of the table's primary key or of another unique index")
        _refuse_repeats(columns)
        return key

    @field_validator("exclude")
    @classmethod
    def _exclude_names_columns(cls, exclude: list[str]) -> list[str]:
        if not all(exclude):
            raise ValueError("a column's name is empty; remove it")
        _refuse_repeats(exclude)
        return exclude

    @field_validator("operations")
    @classmethod
    def _operations_are_some(cls, operations: list[CapturedOperation]) -> list[CapturedOperation]:
        if not operations:
            raise ValueError("nothing of it would be captured; name insert, update or delete, or remove the table")
        _refuse_repeats(operations)
        return operations

    @model_validator(mode="after")
    def _key_is_not_excluded(self) -> Self:
        hidden = [column for column in self.key_columns if column in self.exclude]
        if hidden:
            raise ValueError(
                f"the key column '{hidden[0]}' is also in 'exclude', but a target must be told which record changed; "
                "remove it from 'exclude', or choose another unique key"
            )
        return self


class SourceConfig(BaseModel):
    """The watched tables. A stream is called what its table is called here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tables: dict[str, TableConfig]
    retention_days: int | None = Field(default=None, ge=1)
    """For how many days a change is kept once every target has settled it; none: for ever."""
    drop_after: int | None = Field(default=None, ge=1)
    """After how many days a target that is disabled, or has no file any more, no longer keeps changes in the log;
    none: never."""

    @model_validator(mode="after")
    def _tables_are_told_apart(self) -> Self:
        if self.drop_after is not None and self.retention_days is None:
            raise ValueError("'drop_after' shortens what 'retention_days' keeps; give that too, or remove it")
        streams: dict[TableName, str] = {}
        for stream in self.tables:
            name = self.table_name(stream)
            if not all(name):
                raise ValueError(f"'{stream}' names no table; write the table's name, or schema.name")
            if name in streams:
                raise ValueError(f"'{streams[name]}' and '{stream}' are the same table; remove one of them")
            streams[name] = stream
        return self

    def table_name(self, stream: str) -> TableName:
        """Return where the table of *stream* is: `name` is in the schema public, `schema.name` says its schema."""
        schema = self.tables[stream].schema_name
        if schema is not None:
            return TableName(schema, stream)
        first, dot, rest = stream.partition(".")
        return TableName(first, rest) if dot else TableName("public", stream)


def _refuse_repeats(names: Sequence[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"'{repeated}' is named twice; remove one")
