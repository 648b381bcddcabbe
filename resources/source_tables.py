"""Look whether the watched tables are captured, and whether they have the columns that the targets' templates name."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import psycopg

from pipelines.changes.config import SourceConfig
from pipelines.delivery.config import TargetConfig
from resources.sql import statements


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTable:
    """A watched table as it is in the database now."""

    captured: bool
    columns: frozenset[str]


def look_at_tables(connection: psycopg.Connection, source: SourceConfig) -> dict[str, SourceTable]:
    """Return the tables of *source* that are in the database, by stream; one query for all."""
    names = [source.table_name(stream) for stream in source.tables]
    rows = connection.execute(
        statements("capture")["look_at_tables"],
        {
            "streams": list(source.tables),
            "schemas": [name.schema for name in names],
            "tables": [name.table for name in names],
        },
    ).fetchall()
    return {stream: SourceTable(captured=captured, columns=frozenset(columns)) for stream, captured, columns in rows}


def uncaptured(tables: Mapping[str, SourceTable]) -> list[str]:
    """Return a sentence for each table whose changes are written down by nobody."""
    return [
        f"source.yaml: tables.{stream}: its changes are not captured; run `python -m resources.migrate`"
        for stream, table in tables.items()
        if not table.captured
    ]


def missing_columns(config: TargetConfig, tables: Mapping[str, SourceTable]) -> list[str]:
    """Return a sentence for each column that a template of *config* names and its table lacks."""
    problems: list[str] = []
    for stream, route in config.routes.items():
        table = tables.get(stream)
        for column in sorted(route.columns() - table.columns) if table else []:
            near = get_close_matches(column, table.columns, n=1) if table else []
            fix = f"did you mean '{near[0]}'?" if near else "name one that it has"
            where = f"{config.origin or config.name}: routes.{stream}"
            problems.append(f"{where}: its templates name the column '{column}', which the table lacks; {fix}")
    return problems
