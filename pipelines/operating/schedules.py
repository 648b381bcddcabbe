"""When the log is pruned."""

import dagster as dg

from pipelines.operating.jobs import prune_job

prune_schedule = dg.ScheduleDefinition(
    name="prune_schedule",
    job=prune_job,
    cron_schedule="17 3 * * *",  # not on the hour, when everybody else's does
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every night. Without retention_days in source.yaml nothing is removed.",
)
