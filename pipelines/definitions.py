"""Composition root: which resources serve which jobs. Nothing else binds a port to an adapter."""

import dagster as dg

from pipelines.delivery.assets import sync_assets
from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.sensors import change_sensor
from resources.dagster_resources import ClockResource, LedgerResource, TargetCatalogResource
from resources.target_files import FileTargetCatalog


@dg.definitions
def definitions() -> dg.Definitions:
    """Read the configuration and say what there is; raises ConfigError, in sentences for people."""
    return dg.Definitions(
        jobs=[delivery_job],
        sensors=[change_sensor],
        assets=sync_assets(FileTargetCatalog.load().configs().values()),
        resources={
            "ledger": LedgerResource(),
            "targets": TargetCatalogResource(),
            "clock": ClockResource(),
        },
    )
