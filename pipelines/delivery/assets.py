"""The sync assets `<target>/<stream>`: what each target has been given of each stream, by day of change."""

from collections.abc import Iterable

import dagster as dg

from pipelines.delivery.config import TargetConfig

# The calendar has to begin somewhere: a change of an earlier day is delivered and reported all the same.
DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_offset=1)


def sync_assets(configs: Iterable[TargetConfig]) -> list[dg.AssetSpec]:
    """Return one asset for each route. Delivery runs report them; a run never computes them."""
    return [
        dg.AssetSpec(
            key=[config.name, stream],
            description=f"What {config.name} ({config.base_url}) was given of {stream}, in mode {route.mode}.",
            group_name=config.name,
            kinds={"http"},
            partitions_def=DAYS,
            metadata={"mode": route.mode, "status": config.status, "critical": config.critical},
        )
        for config in configs
        for stream, route in config.routes.items()
    ]
