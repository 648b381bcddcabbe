"""The jobs that a person launches, one op each."""

import dagster as dg

from pipelines.operating.ops import load_rows, preview, prune, redrive


@dg.job(executor_def=dg.in_process_executor)
def initial_load_job() -> None:
    """Give targets every row of their tables, as it is now. Interrupted, it goes on where it stopped."""
    load_rows()


@dg.job(executor_def=dg.in_process_executor)
def redrive_job() -> None:
    """Send dead letters again, or discard them. By default it only says what it would do."""
    redrive()


@dg.job(executor_def=dg.in_process_executor)
def prune_job() -> None:
    """Remove what every target has settled and `retention_days` has passed."""
    prune()


@dg.job(executor_def=dg.in_process_executor)
def preview_job() -> None:
    """Say what each target would be sent next. Sends nothing, changes nothing."""
    preview()
