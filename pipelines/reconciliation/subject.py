"""From a target's file to what is reconciled, and how it is asked."""

import hashlib
from collections.abc import Callable, Mapping

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.catalog import policy_of
from pipelines.delivery.clock import Clock
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.rate_limit import TokenBucket
from pipelines.delivery.reading import ReconcileConfig
from pipelines.delivery.routing import Route
from pipelines.delivery.target import TargetClient
from pipelines.delivery.template import compile_json, compile_path
from pipelines.reconciliation.listing import Reader
from pipelines.reconciliation.reconcile import Subject


def subject_of(config: TargetConfig, stream: str, routes: Mapping[str, Route]) -> Subject:
    """Return what is reconciled of *stream*, whose route has a `read`."""
    route = config.routes[stream]
    read, compared = route.read, route.compared()
    assert read is not None
    assert compared is not None
    render: Callable[[ChangeRecord], bytes | None] = (
        compile_json(read.record).render
        if read.record is not None
        else routes[stream].operations[compared[0]].render_record
    )
    how = f"{config.base_url}\n{read.model_dump_json()}"
    return Subject(
        target=config.name,
        stream=stream,
        base_url=config.base_url,
        read=read,
        settings=route.reconcile or ReconcileConfig(),
        shape=route.shape(),
        render=render,
        path_of=None if read.one is None else compile_path(read.one).render,
        fingerprint=hashlib.sha256(how.encode()).hexdigest()[:16],
    )


def reader_of(config: TargetConfig, client: TargetClient, clock: Clock, bucket: TokenBucket | None) -> Reader:
    """Return what asks *config*'s target for pages; *bucket* is shared by all that ask it in this run."""
    policy = policy_of(config)
    return Reader(client=client, clock=clock, retry=policy.retry, rules=policy.rules, bucket=bucket)


def bucket_of(config: TargetConfig, clock: Clock) -> TokenBucket | None:
    """Return the target's rate limit, or None if it has none."""
    limit = config.rate_limit
    if limit is None:
        return None
    return TokenBucket.full(requests_per_second=limit.requests_per_second, burst=limit.burst, now=clock.monotonic())
