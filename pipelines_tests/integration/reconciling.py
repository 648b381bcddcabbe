"""A source, Datasette and Kinto as they are, and what a person does with them: deliver, reconcile, meddle."""

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import psycopg
import yaml

from demo import dataset, target_apis
from demo.processes import Programs
from pipelines.definitions import definitions
from resources.capture import install_capture
from resources.config_files import load_source

ROOT = Path(__file__).parents[2]
PLANES = "/buckets/fleet/collections/planes/records"
"""Where the registry has them."""
ROWS = {"airlines": 16, "airports": 150, "planes": 400, "flights": 300}


@contextmanager
def apis_started(folder: Path) -> Iterator[target_apis.TargetApis]:
    """Start the demo's target APIs for as long as the context lasts."""
    with Programs(folder) as programs:
        yield target_apis.start(folder, programs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one reconciliation of one stream said."""

    numbers: Mapping[str, Any]
    checks: Mapping[str, bool]
    """Whether each passed."""
    said: Mapping[str, str]
    """What each check says to do."""
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def drift(self) -> tuple[int, int, int]:
        """Return how many are missing, stale and extra."""
        return self.numbers["missing"], self.numbers["stale"], self.numbers["extra"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One source database, delivered to the APIs by the demo's configuration."""

    database: str
    folder: Path
    """Of the APIs' data."""
    config: Path
    apis: target_apis.TargetApis

    def source(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Execute *statement* in the source, as an application does."""
        with psycopg.connect(self.database, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def board(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Execute *statement* in the flight board's file, behind everybody's back."""
        with sqlite3.connect(self.folder / "board.db", timeout=30) as board:
            rows = board.execute(statement, parameters).fetchall()
        board.close()
        return rows

    def registry(self) -> httpx.Client:
        """Return a client that may do anything at the registry."""
        return target_apis.registry_client(self.apis)

    def empty_targets(self) -> None:
        """Take everything away that earlier tests left."""
        for table in (*ROWS, "rewrites"):
            self.board(f"delete from {table}")
        with self.registry() as client:
            for name in ("airlines", "airports", "planes"):
                _empty(client, f"/buckets/fleet/collections/{name}/records")

    def delete_planes(self, target: str, *keys: str) -> None:
        """Delete planes at a target, behind everybody's back; all if none is named."""
        if target == "flight_board":
            chosen = f" where tailnum in ({', '.join('?' * len(keys))})" if keys else ""
            self.board(f"delete from planes{chosen}", *keys)
            return
        with self.registry() as client:
            for key in keys:
                client.delete(f"{PLANES}/{key}").raise_for_status()
            if not keys:
                _empty(client, PLANES)

    def alter_plane(self, target: str, key: str) -> None:
        """Give a plane at a target another model."""
        if target == "flight_board":
            self.board("update planes set model = 'x' where tailnum = ?", key)
            return
        with self.registry() as client:
            client.patch(f"{PLANES}/{key}", json={"data": {"model": "x"}}).raise_for_status()

    def add_plane(self, target: str, key: str) -> None:
        """Make a plane at a target that the source has not got."""
        if target == "flight_board":
            columns = "(tailnum, type, manufacturer, model, engines, seats, engine)"
            self.board(f"insert into planes {columns} values (?, 't', 'm', 'm', 1, 1, 'e')", key)
            return
        with self.registry() as client:
            client.put(f"{PLANES}/{key}", json={"data": {"seats": 1, "model": "m"}}).raise_for_status()

    def settings(self, target: str, stream: str, **reconcile: Any) -> None:
        """Write a route's `reconcile`."""
        self.edit(target, lambda document: document["routes"][stream].update(reconcile=reconcile))

    def edit(self, target: str, change: Callable[[Any], object]) -> None:
        """Change a target's file."""
        path = self.config / "targets" / f"{target}.yaml"
        document = yaml.safe_load(path.read_text())
        change(document)
        path.write_text(yaml.safe_dump(document, sort_keys=False))

    def deliver(self) -> None:
        """Deliver what is owed; what the targets refuse is no error here."""
        definitions().get_job_def("delivery_job").execute_in_process(raise_on_error=False)

    def reconcile(self, target: str, *streams: str, raises: bool = True, **config: Any) -> dict[str, Found]:
        """Reconcile some streams of a target, by default all, and return what was found of each."""
        result = self.run(target, *streams, raises=raises, **config)
        return {stream: found for stream, found in found_in(result, target).items() if stream}

    def run(self, target: str, *streams: str, raises: bool = True, **config: Any) -> dg.ExecuteInProcessResult:
        """Run the job for some streams of a target, by default all."""
        prefix = ["reconciliation", target]
        job = definitions().resolve_job_def("reconciliation_job")
        every = [key for key in job.asset_layer.selected_asset_keys if list(key.path[:2]) == prefix]
        keys = [dg.AssetKey([*prefix, stream]) for stream in streams] or every
        return job.execute_in_process(
            asset_selection=keys,
            run_config={"ops": {f"reconcile_{target}": {"config": config}}} if config else None,
            raise_on_error=raises,
        )


def _empty(client: httpx.Client, records: str) -> None:
    while client.delete(records).raise_for_status().json()["data"]:
        pass  # one request deletes no more than a page


def found_in(result: dg.ExecuteInProcessResult, target: str) -> dict[str, Found]:
    """Return what a run found, by stream; that of the target's own asset under the empty name."""
    materialized = {
        tuple(event.materialization.asset_key.path): event.materialization.metadata
        for event in result.get_asset_materialization_events()
    }
    found: dict[str, Found] = {}
    for path, metadata in materialized.items():
        checks = [one for one in result.get_asset_check_evaluations() if tuple(one.asset_key.path) == path]
        found["".join(path[2:])] = Found(
            numbers={name: value.value for name, value in metadata.items() if isinstance(value.value, int | float)},
            checks={one.check_name: one.passed for one in checks},
            said={one.check_name: str(one.metadata["what to do"].value) for one in checks},
            metadata=metadata,
        )
    return found


def fill(database: str, rows: Mapping[str, int] = ROWS) -> None:
    """Make the demo's tables, capture them, and fill them with the first rows of the data set."""
    with psycopg.connect(database, autocommit=True) as connection:
        dataset.create_tables(connection)
        install_capture(connection, load_source(ROOT / "resources"))
        for table, count in rows.items():
            chosen = (row for row, _ in zip(dataset.read(table), range(count), strict=False))
            dataset.copy(connection, table, chosen)


def environment(database: str, config: Path, apis: target_apis.TargetApis) -> dict[str, str]:
    """Return what the pipeline needs to know."""
    return {"DATABASE_URL": database, "DISTRIBUTARY_CONFIG": str(config), **apis.environment()}
