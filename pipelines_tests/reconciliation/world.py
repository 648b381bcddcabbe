"""A source in Postgres, and an API in memory that lists what it holds; what is delivered is applied by hand."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg

from pipelines.changes.config import SourceConfig
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.routing import Transform, compile_routes
from pipelines.delivery.target import Answer
from pipelines.reconciliation.guard import Limits
from pipelines.reconciliation.meaning import meaning_of
from pipelines.reconciliation.reconcile import Outcome, Reconciliation
from pipelines.reconciliation.subject import bucket_of, reader_of, subject_of
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest, Step, answer
from resources.capture import install_capture
from resources.postgres_ledger import PostgresLedger
from resources.postgres_workspace import PostgresWorkspaces

CURSOR = {"style": "cursor", "parameter": "after", "next": "$.next", "size": 3, "size_parameter": "limit"}
OFFSET = {"style": "offset", "parameter": "skip", "size": 3, "size_parameter": "limit"}


class ListApi:
    """Holds records by key, and lists them in the order of their keys, by cursor, offset or page."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.before: Callable[[int, str], Step | None] = lambda number, path: None
        """Called with each request's number and path; what it returns is the answer in place of the list."""
        self.hidden: set[str] = set()
        """Keys of records that it has and does not list."""
        self.total: int | None = None
        """What it says there are; default: as many as there are."""
        self.target = ScriptedTarget(self._answer)

    @property
    def paths(self) -> list[str]:
        return [one.path for one in self.target.sent]

    def _answer(self, sent: SentRequest) -> Step:
        instead = self.before(sent.number, sent.path)
        if instead is not None:
            return instead
        one = urlsplit(sent.path).path.removeprefix("/people/")
        if one in self.records or one in self.hidden:
            return answer(200, b"{}")
        if "/people/" in sent.path:
            return answer(404)
        query = {name: values[0] for name, values in parse_qs(urlsplit(sent.path).query).items()}
        size = int(query.get("limit", "3"))
        keys = sorted(self.records)
        if "skip" in query:
            keys = keys[int(query["skip"]) :]
        elif "page" in query:
            keys = keys[(int(query["page"]) - 1) * size :]
        elif "after" in query:
            keys = [key for key in keys if key > query["after"]]
        shown = keys[:size]
        document = {
            "items": [self.records[key] for key in shown],
            "next": shown[-1] if len(keys) > size else None,
            "total": len(self.records) if self.total is None else self.total,
        }
        return answer(200, json.dumps(document).encode())


@dataclass(slots=True, kw_only=True)
class World:
    """The table `people` and the target `api`."""

    url: str
    connection: psycopg.Connection
    source: SourceConfig
    columns: str
    api: ListApi = field(default_factory=ListApi)
    clock: FakeClock = field(default_factory=FakeClock)
    route: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    key: tuple[str, ...] = ("id",)

    @classmethod
    def made(
        cls,
        url: str,
        connection: psycopg.Connection,
        *,
        columns: str = "id text primary key, name text",
        key: str | list[str] = "id",
        **more: Any,
    ) -> "World":
        """Make the table, capture it, and make the target known."""
        connection.execute(f"create table people ({columns})")  # type: ignore[call-overload]
        source = SourceConfig.model_validate({"tables": {"people": {"key": key}}})
        install_capture(connection, source)
        PostgresLedger(url).register({"api": "beginning"})
        columns_of_key = (key,) if isinstance(key, str) else tuple(key)
        return cls(url=url, connection=connection, source=source, columns=columns, key=columns_of_key, **more)

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(statement, parameters)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []

    def fill(self, count: int) -> None:
        """Insert so many people, p00, p01 …, and deliver them."""
        self.execute(
            "insert into people select 'p' || lpad(i::text, 2, '0'), 'n' from generate_series(0, %s) i", count - 1
        )
        self.deliver()

    def deliver(self) -> None:
        """Do to the API what is pending for it, and settle it."""
        pending = self.execute(
            "select c.change_id, c.key, c.operation, c.payload"
            " from distributary.change_log c, distributary.target_state s"
            " where s.target = 'api' and not s.settled @> c.change_id and (c.target is null or c.target = 'api')"
            " order by c.change_id"
        )
        for change_id, key, operation, payload in pending:
            if operation == "delete":
                self.api.records.pop(key, None)
            else:
                self.api.records[key] = dict(payload)
            self.execute(
                "update distributary.target_state set accepted = accepted + 1,"
                " settled = settled + int8multirange(int8range(%s, %s, '[]')) where target = 'api'",
                change_id,
                change_id,
            )

    def config(self) -> TargetConfig:
        read = {
            "path": "/people",
            "items": "$.items",
            "key": self.key[0] if len(self.key) == 1 else list(self.key),
            "page": CURSOR,
        }
        route = {
            "upsert": {"path": "/people"},
            "delete": {"path": "/people/${_key}"},
            "read": read | self.route.get("read", {}),
        }
        more = {name: value for name, value in self.route.items() if name != "read"}
        if "insert" in more or "update" in more:
            del route["upsert"]
        return TargetConfig.model_validate(
            {
                "name": "api",
                "base_url": "https://api.test",
                "retry": {"initial_backoff": 0.1, "max_backoff": 0.1, "max_elapsed": 1},
                "routes": {"people": route | more | ({"reconcile": self.settings} if self.settings else {})},
            }
        )

    def reconcile(self, *, say: Callable[[str], None] = lambda _: None, run_id: str = "run", **run: Any) -> Outcome:
        """Reconcile people at the API; *run* is what a launch sets."""
        config = self.config()
        subject = subject_of(config, "people", compile_routes(config, self.transforms))
        with PostgresWorkspaces(self.url, self.source).open("api", "people", run_id=run_id) as workspace:
            return Reconciliation(
                subject=subject,
                workspace=workspace,
                reader=reader_of(config, self.api.target.connect(), self.clock, bucket_of(config, self.clock)),
                meaning=meaning_of(config, "people", self.source.tables["people"], loaded=workspace.loaded()),
                limits=Limits.of(subject.settings, cannot=config.routes["people"].cannot_repair(), **run),
                now=self.clock.now(),
                say=say,
            ).run()

    def addressed(self) -> list[tuple[str, str, Any]]:
        """Return what was appended for the API alone: operation, key, payload."""
        return self.execute(
            "select operation, key, payload from distributary.change_log where target = 'api' order by change_id"
        )


def drift(outcome: Outcome) -> tuple[int, int, int]:
    """Return how many are missing, stale and extra."""
    return outcome.count("missing"), outcome.count("stale"), outcome.count("extra")


def failing(status: int = 500) -> Answer:
    """Return an answer that tells of a target's fault."""
    return answer(status)
