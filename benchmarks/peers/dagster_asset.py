"""A plain Dagster asset for each target: in it the script with httpx and threads, one run for all.

Dagster runs an asset's step in a process of its own. Its default is as many at once as there are cores: here as many as
there are targets. The instance is the one that is there without any setting, with SQLite.
"""

import json
import os
import sys
from pathlib import Path

import dagster as dg

from benchmarks.peers.httpx_threads import deliver_to
from benchmarks.peers.script import Work, run

_WORK = "PEER_WORK"


def orders_asset(target: str, work: Work) -> dg.AssetsDefinition:
    """Return the asset that stands for what *target* has."""

    @dg.asset(name=f"{target}_orders")
    def orders() -> None:
        deliver_to(target, work)

    return orders


def orders_job() -> dg.JobDefinition:
    """Return the job that brings all targets up to date."""
    work = Work(**json.loads(os.environ[_WORK]))
    executor = dg.multiprocess_executor.configured(
        {"max_concurrent": len(work.targets), "start_method": {"forkserver": {}}}
    )
    definitions = dg.Definitions(
        assets=[orders_asset(target, work) for target in work.targets],
        jobs=[dg.define_asset_job("orders_job", executor_def=executor)],
    )
    return definitions.resolve_job_def("orders_job")


def deliver(work: Work) -> None:
    """Run the job once."""
    from benchmarks.peers import dagster_asset  # by this name its steps find it, not as __main__

    home = Path(work.folder) / "dagster"
    home.mkdir(exist_ok=True)
    os.environ |= {_WORK: sys.argv[1], "DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "1"}
    with dg.DagsterInstance.get() as instance:
        dg.execute_job(dg.reconstructable(dagster_asset.orders_job), instance=instance, raise_on_error=True)


if __name__ == "__main__":
    run(deliver)
