"""`reconciliation_job`: compare every target with the source, or with a selection some of them."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from pipelines.delivery.jobs import STEPS_SIDE_BY_SIDE


def reconciliation_job(assets: Sequence[dg.AssetsDefinition]) -> Any:
    """Return the job of *assets*, with all of their checks; one step for each target, side by side."""
    return dg.define_asset_job(
        "reconciliation_job",
        selection=dg.AssetSelection.assets(*assets),
        executor_def=STEPS_SIDE_BY_SIDE,
        description="Read the targets back and compare them with the source; repair what the routes say.",
    )
