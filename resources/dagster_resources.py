"""Dagster's view of the adapters: opened for a step, closed after it. Bound in `pipelines/definitions.py` only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from pydantic import Field

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.ledger import Ledger
from pipelines.delivery.loading import Loader
from pipelines.operating.backfilling import Backfiller
from pipelines.operating.dead_letters import DeadLetters
from pipelines.operating.pruning import Pruner
from pipelines.reconciliation.workspace import Workspaces
from resources.config_files import config_folder, load_source
from resources.database import connect, database_url
from resources.postgres_backfiller import PostgresBackfiller
from resources.postgres_dead_letters import PostgresDeadLetters
from resources.postgres_ledger import PostgresLedger
from resources.postgres_loader import PostgresLoader
from resources.postgres_pruner import PostgresPruner
from resources.postgres_workspace import PostgresWorkspaces
from resources.source_tables import SourceTable, look_at_tables
from resources.target_files import FileTargetCatalog


class LedgerResource(dg.ConfigurableResource[Ledger]):
    """The ledger in a Postgres database."""

    url: str | None = Field(
        default=None, description="By default that of DATABASE_URL; if that is unset, of the embedded server."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Ledger]:  # noqa: ARG002
        """Find the database when a step starts: loading definitions needs none."""
        yield PostgresLedger(self.url or database_url())


class DeadLettersResource(dg.ConfigurableResource[DeadLetters]):
    """The dead letters in a Postgres database, and the tables of a configuration folder's source.yaml."""

    url: str | None = Field(
        default=None, description="By default that of DATABASE_URL; if that is unset, of the embedded server."
    )
    folder: str | None = Field(
        default=None, description="Holds source.yaml. By default the one that DISTRIBUTARY_CONFIG names."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[DeadLetters]:  # noqa: ARG002
        """Find the database and read the file when a step starts."""
        source = load_source(Path(self.folder) if self.folder else config_folder())
        yield PostgresDeadLetters(self.url or database_url(), source)


class BackfillerResource(dg.ConfigurableResource[Backfiller]):
    """The log and the tables of a configuration folder's source.yaml, in a Postgres database."""

    url: str | None = Field(
        default=None, description="By default that of DATABASE_URL; if that is unset, of the embedded server."
    )
    folder: str | None = Field(
        default=None, description="Holds source.yaml. By default the one that DISTRIBUTARY_CONFIG names."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Backfiller]:  # noqa: ARG002
        """Find the database and read the file when a step starts."""
        source = load_source(Path(self.folder) if self.folder else config_folder())
        yield PostgresBackfiller(self.url or database_url(), source)


class LoaderResource(dg.ConfigurableResource[Loader]):
    """The tables of a configuration folder's source.yaml, in a Postgres database."""

    url: str | None = Field(
        default=None, description="By default that of DATABASE_URL; if that is unset, of the embedded server."
    )
    folder: str | None = Field(
        default=None, description="Holds source.yaml. By default the one that DISTRIBUTARY_CONFIG names."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Loader]:  # noqa: ARG002
        """Find the database and read the file when a step starts."""
        source = load_source(Path(self.folder) if self.folder else config_folder())
        yield PostgresLoader(self.url or database_url(), source)


class PrunerResource(dg.ConfigurableResource[Pruner]):
    """The log and the trail in a Postgres database."""

    url: str | None = Field(
        default=None, description="By default that of DATABASE_URL; if that is unset, of the embedded server."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Pruner]:  # noqa: ARG002
        """Find the database when a step starts."""
        yield PostgresPruner(self.url or database_url())


class WorkspacesResource(dg.ConfigurableResource[Workspaces]):
    """Lists and findings in a Postgres database, and the tables of a configuration folder's source.yaml."""

    url: str | None = Field(
        default=None, description="By default that of DATABASE_URL; if that is unset, of the embedded server."
    )
    folder: str | None = Field(
        default=None, description="Holds source.yaml. By default the one that DISTRIBUTARY_CONFIG names."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Workspaces]:  # noqa: ARG002
        """Find the database and read the file when a step starts."""
        source = load_source(Path(self.folder) if self.folder else config_folder())
        yield PostgresWorkspaces(self.url or database_url(), source)


class SourceResource(dg.ConfigurableResource[SourceConfig]):
    """What a configuration folder's source.yaml says."""

    folder: str | None = Field(
        default=None, description="Holds source.yaml. By default the one that DISTRIBUTARY_CONFIG names."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[SourceConfig]:  # noqa: ARG002
        """Read the file when a step starts."""
        yield load_source(Path(self.folder) if self.folder else config_folder())


class TargetCatalogResource(dg.ConfigurableResource[TargetCatalog]):
    """The targets of a configuration folder."""

    folder: str | None = Field(
        default=None, description="Holds source.yaml and targets/. By default the one that DISTRIBUTARY_CONFIG names."
    )

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[TargetCatalog]:  # noqa: ARG002
        """Read the files when a step starts."""
        yield FileTargetCatalog.load(Path(self.folder) if self.folder else None, _look)


def _look(source: SourceConfig) -> dict[str, SourceTable]:
    with connect(database_url(), application_name="distributary source", autocommit=True) as connection:
        return look_at_tables(connection, source)
