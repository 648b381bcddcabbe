"""The port to the configured targets: how each is to be treated, and how to reach it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainPolicy, RateLimit
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.ledger import Ledger, Owed
from pipelines.delivery.routing import Route
from pipelines.delivery.sending import RetryPolicy
from pipelines.delivery.target import TargetClient


class TargetMisconfigured(Exception):
    """One target cannot be used as it is configured: one sentence that names file, field and fix. Others can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A target made ready for a drain."""

    policy: DrainPolicy
    routes: Mapping[str, Route]
    connect: Callable[[], TargetClient]


class TargetCatalog(ABC):
    """All targets, by name, as their files say."""

    @abstractmethod
    def configs(self) -> Mapping[str, TargetConfig]:
        """Return every target's configuration."""

    @abstractmethod
    def destination(self, target: str) -> Destination:
        """Resolve *target*'s secrets and compile its routes; raises TargetMisconfigured."""

    @abstractmethod
    def reader(self, target: str, *, max_response_bytes: int) -> TargetClient:
        """Return a client that reads the target back, with answers of that size; raises TargetMisconfigured."""

    def columns(self) -> frozenset[str]:
        """Return the names of all watched tables' columns, as far as they are known."""
        return frozenset()

    def problems(self) -> Sequence[str]:
        """Return what is wrong with the source and so concerns every target: sentences that fail a run."""
        return ()

    def owed(self, ledger: Ledger) -> Sequence[Owed]:
        """Ask *ledger* what each active target is owed, and make it known there if it is new."""
        active = {name: config for name, config in self.configs().items() if config.status == "active"}
        streams = {name: list(config.routes) for name, config in active.items()}
        owed = ledger.owed(streams)
        known = {state.target for state in owed}
        newcomers = {name: config.start for name, config in active.items() if name not in known}
        if newcomers:
            ledger.register(newcomers, streams=streams)
            owed = ledger.owed(streams)
        return owed


def policy_of(config: TargetConfig) -> DrainPolicy:
    """Translate a target's file into what a drain goes by."""
    return DrainPolicy(
        target=config.name,
        max_in_flight=config.max_in_flight,
        rate_limit=None
        if config.rate_limit is None
        else RateLimit(requests_per_second=config.rate_limit.requests_per_second, burst=config.rate_limit.burst),
        retry=RetryPolicy(
            initial_backoff=config.retry.initial_backoff,
            max_backoff=config.retry.max_backoff,
            max_elapsed=config.retry.max_elapsed,
        ),
        failure_threshold=config.circuit_breaker.failure_threshold,
        error_timeout=config.circuit_breaker.error_timeout,
        dead_letter_guard=config.dead_letter_guard,
        probe_interval=config.probe_interval,
        rules=JudgingRules(
            success_on=frozenset(config.success_on),
            retryable_status_codes=frozenset(config.retryable_status_codes),
            drop_on=frozenset(config.drop_on),
            max_retry_after=config.retry.max_retry_after,
        ),
    )
