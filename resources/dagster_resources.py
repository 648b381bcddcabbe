"""Dagster's view of the adapters: opened for a step, closed after it. Bound in `pipelines/definitions.py` only."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from pipelines.delivery.catalog import TargetCatalog
from pipelines.delivery.clock import Clock
from pipelines.delivery.ledger import Ledger
from resources.database import database_url
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock
from resources.target_files import FileTargetCatalog


class LedgerResource(dg.ConfigurableResource[Ledger]):
    """The ledger in the database of `DATABASE_URL`, or in the embedded one."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Ledger]:  # noqa: ARG002
        """Find the database when a step starts: loading definitions needs none."""
        yield PostgresLedger(database_url())


class TargetCatalogResource(dg.ConfigurableResource[TargetCatalog]):
    """The targets of the configuration folder."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[TargetCatalog]:  # noqa: ARG002
        """Read the files when a step starts."""
        yield FileTargetCatalog.load()


class ClockResource(dg.ConfigurableResource[Clock]):
    """Real time."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Clock]:  # noqa: ARG002
        """Yield the machine's clock."""
        yield SystemClock()
