"""The targets of the configuration folder, behind the port of `pipelines.delivery.catalog`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from pipelines.changes.config import SourceConfig
from pipelines.delivery.catalog import Destination, TargetCatalog, TargetMisconfigured, policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.routing import compile_routes
from pipelines.delivery.target import TargetClient
from resources.config_files import (
    ConfigError,
    check_routes,
    config_folder,
    load_source,
    load_targets,
    load_transforms,
    resolve_secrets,
)
from resources.http_target import HttpTargetClient, endpoint
from resources.source_tables import SourceTable, missing_columns, uncaptured


class FileTargetCatalog(TargetCatalog):
    """`targets/*.yaml`, read and checked against `source.yaml` once."""

    def __init__(
        self, configs: Mapping[str, TargetConfig], tables: Callable[[], Mapping[str, SourceTable]] = dict
    ) -> None:
        self._configs = configs
        self._tables = cache(tables)

    @classmethod
    def load(
        cls, folder: Path | None = None, look: Callable[[SourceConfig], Mapping[str, SourceTable]] | None = None
    ) -> "FileTargetCatalog":
        """Read *folder*, by default the configured one; raises ConfigError. *look* finds the source's tables."""
        folder = config_folder() if folder is None else folder
        configs = load_targets(folder)
        source = load_source(folder)
        check_routes(source, configs)
        return cls(configs, (lambda: look(source)) if look else dict)

    def problems(self) -> Sequence[str]:
        return uncaptured(self._tables())

    def columns(self) -> frozenset[str]:
        return frozenset[str]().union(*(table.columns for table in self._tables().values()))

    def configs(self) -> Mapping[str, TargetConfig]:
        return self._configs

    def destination(self, target: str) -> Destination:
        config = self._configs[target]
        try:
            # A missing secret is found here, not at load: it must stop this target and no other.
            where = endpoint(config, resolve_secrets(config).__getitem__)
            routes = compile_routes(config, load_transforms(config))
        except ConfigError as error:
            raise TargetMisconfigured(str(error)) from None
        if problems := missing_columns(config, self._tables()):
            # The mapping's fault, not the records': none may be buried for it.
            raise TargetMisconfigured("; ".join(problems))
        return Destination(policy=policy_of(config), routes=routes, connect=lambda: HttpTargetClient(where))

    def reader(self, target: str, *, max_response_bytes: int) -> TargetClient:
        config = self._configs[target]
        try:
            where = endpoint(config, resolve_secrets(config).__getitem__)
        except ConfigError as error:
            raise TargetMisconfigured(str(error)) from None
        return HttpTargetClient(replace(where, max_response_bytes=max_response_bytes))
