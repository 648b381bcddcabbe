"""What "should be there" means for a route: it may not insert, not update, not delete, or begin with `start: now`."""

from dataclasses import dataclass

from pipelines.changes.config import TableConfig
from pipelines.delivery.config import RouteConfig, TargetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """Of each finding: None if it is drift, or why it is none."""

    missing: str | None = None
    stale: str | None = None
    extra: str | None = None


def meaning_of(config: TargetConfig, stream: str, table: TableConfig, *, loaded: bool) -> Meaning:
    """Say what is owed to the target's *stream*; *loaded* if an initial load has brought it every row."""
    route = config.routes[stream]
    return Meaning(
        missing=_why_not_missing(config, route, table, loaded=loaded),
        stale=_why_not_stale(route, table),
        extra=_why_not_extra(route, table),
    )


def _why_not_missing(config: TargetConfig, route: RouteConfig, table: TableConfig, *, loaded: bool) -> str | None:
    if not (route.upsert or route.insert):
        return "the route makes no records, it has no upsert or insert"
    if "insert" not in table.operations and not loaded:
        return "source.yaml does not capture inserts of this table"
    if config.start == "now" and not loaded:
        return (
            "with 'start: now' rows that have not changed since are not owed; launch initial_load_job for this target "
            "to have them all, and judged"
        )
    return None


def _why_not_stale(route: RouteConfig, table: TableConfig) -> str | None:
    if not (route.upsert or route.update):
        return "the route sends each record once, it has no upsert or update"
    if "update" not in table.operations:
        return "source.yaml does not capture updates of this table"
    return None


def _why_not_extra(route: RouteConfig, table: TableConfig) -> str | None:
    if route.delete is None:
        return "the route has no delete, so records of deleted rows stay at the target"
    if "delete" not in table.operations:
        return "source.yaml does not capture deletes of this table"
    return None
