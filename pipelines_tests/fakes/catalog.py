"""Targets without files, secrets or a network: their configurations as given, and a scripted client for each."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.delivery.catalog import Destination, TargetCatalog, TargetMisconfigured, policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.routing import compile_routes
from pipelines.delivery.target import TargetClient
from pipelines_tests.fakes.target import ScriptedTarget


def target_config(name: str, *, streams: Iterable[str] = ("people",), **more: Any) -> TargetConfig:
    """Return a target that takes the rows of *streams* in batches of 100; *more* is as in its file."""
    route = {"upsert": {"path": "/records", "batch": {"max_records": 100}}, "delete": {"path": "/records/${_key}"}}
    defaults: dict[str, Any] = {
        "base_url": f"https://{name}.example",
        "max_in_flight": 1,
        "retry": {"initial_backoff": 0.1, "max_backoff": 0.1, "max_elapsed": 1},
        "routes": dict.fromkeys(streams, route),
    }
    return TargetConfig.model_validate({"name": name, **defaults, **more})


class FakeTargetCatalog(TargetCatalog):
    """Connects each target to its client of *clients*, by default one that takes everything.

    A target named in *misconfigured* cannot be used, for the reason given there.
    """

    def __init__(
        self,
        configs: Iterable[TargetConfig],
        *,
        clients: Mapping[str, ScriptedTarget] | None = None,
        misconfigured: Mapping[str, str] | None = None,
    ) -> None:
        self._configs = {config.name: config for config in configs}
        self._clients = {name: ScriptedTarget() for name in self._configs} | dict(clients or {})
        self._misconfigured = dict(misconfigured or {})

    def client(self, target: str) -> ScriptedTarget:
        """Return the client of *target*, which knows what it was sent."""
        return self._clients[target]

    def configs(self) -> Mapping[str, TargetConfig]:
        return self._configs

    def destination(self, target: str) -> Destination:
        if target in self._misconfigured:
            raise TargetMisconfigured(self._misconfigured[target])
        config = self._configs[target]
        return Destination(
            policy=policy_of(config), routes=compile_routes(config), connect=self._clients[target].connect
        )

    def reader(self, target: str, *, max_response_bytes: int) -> TargetClient:
        if target in self._misconfigured:
            raise TargetMisconfigured(self._misconfigured[target])
        return self._clients[target].connect()
