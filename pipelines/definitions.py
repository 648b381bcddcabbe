"""Composition root: which resources serve which jobs. Nothing else binds a port to an adapter."""

import pipelines.ahead  # noqa: F401,I001 - before all that takes long to import

import click
import dagster as dg

from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.sensors import change_sensor
from pipelines.operating.assets import dead_letters_asset, sync_assets
from pipelines.operating.jobs import initial_load_job, preview_job, prune_job, redrive_job
from pipelines.operating.schedules import prune_schedule
from pipelines.reconciliation.assets import reconciliation_assets
from pipelines.reconciliation.jobs import reconciliation_job
from pipelines.reconciliation.schedules import reconciliation_schedules
from resources.config_files import ConfigError
from resources.dagster_resources import (
    BackfillerResource,
    DeadLettersResource,
    LedgerResource,
    LoaderResource,
    PrunerResource,
    SourceResource,
    TargetCatalogResource,
    WorkspacesResource,
)
from resources.system_clock import SystemClock
from resources.target_files import FileTargetCatalog

_kept: list[dg.Definitions] = []


def keep() -> None:
    """Make the definitions, for good: for a process that only forks others, whose files are those of now."""
    made = _read()
    made.get_repository_def().get_job(delivery_job.name)  # resolves what it shares with all jobs
    _kept[:] = [made]


@dg.definitions
def definitions() -> dg.Definitions:
    """Read the configuration and say what there is; raises ClickException with ConfigError's sentences."""
    return _kept[0] if _kept else _read()


def _read() -> dg.Definitions:
    try:
        targets = FileTargetCatalog.load()
    except ConfigError as error:
        # Dagster's command line prints this kind as it is, and others with a traceback.
        raise click.ClickException(str(error)) from None
    configs = targets.configs().values()
    reconciliations = reconciliation_assets(configs)
    reconciliation = reconciliation_job(reconciliations)
    return dg.Definitions(
        jobs=[delivery_job, initial_load_job, preview_job, prune_job, reconciliation, redrive_job],
        sensors=[change_sensor],
        schedules=[prune_schedule, *reconciliation_schedules(configs, reconciliation)],
        assets=[*sync_assets(configs), *reconciliations, dead_letters_asset],
        resources={
            "ledger": LedgerResource(),
            "targets": TargetCatalogResource(),
            "clock": SystemClock(),
            "dead_letters": DeadLettersResource(),
            "loader": LoaderResource(),
            "backfiller": BackfillerResource(),
            "pruner": PrunerResource(),
            "source": SourceResource(),
            "workspaces": WorkspacesResource(),
        },
    )
