"""A log of changes on its way to a `FaultyApi` through the real drain, and what must be so when all is well again.

Each stream is of one mode (`event`: each change, or `state`: the last of each key) and goes one of several `WAYS`.
"""

import json
import random
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from uuid import UUID

import psycopg

from pipelines.delivery.catalog import policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import HttpRequest, compile_routes
from pipelines.delivery.target import Answer, NoAnswer, TargetClient
from pipelines_tests.fakes.faulty_api import FaultyApi
from resources.http_target import HttpTargetClient, endpoint
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock

RECORD = {"id": "$id", "change": "$_change_id"}
GONE = RECORD | {"deleted": True}
RESULTS = {"items": "$.results", "id": "id", "status": "status"}
BATCH: Mapping[str, Any] = {"method": "POST", "path": "/rows", "batch": {"max_records": 5}}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "batches": {"upsert": {**BATCH, "results": RESULTS}, "delete": {**BATCH, "results": RESULTS, "record": GONE}},
    "blind_batches": {"upsert": BATCH, "delete": {**BATCH, "record": GONE}},
    "singles": {"upsert": {"path": "/rows"}, "delete": {"path": "/rows/${_key}", "record": GONE}},
}


class Witness(TargetClient):
    """A client of the target's that keeps what it was told under each idempotency key."""

    def __init__(self, client: TargetClient, heard: dict[UUID, list[Answer | NoAnswer]], lock: threading.Lock) -> None:
        self._client, self._heard, self._lock = client, heard, lock

    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        answer = self._client.send(request, key=key)
        with self._lock:
            self._heard[key].append(answer)
        return answer

    def close(self) -> None:
        self._client.close()


@dataclass(slots=True, kw_only=True)
class Delivery:
    """A log of changes on its way to one target."""

    database: str
    api: FaultyApi
    ways: Collection[str] = ("batches", "singles")
    timeout: float = 5.0
    """Long, but where the fault is a lack of answers: a busy machine is none."""
    max_elapsed: float = 3.0
    more: Mapping[str, Any] = field(default_factory=dict)
    expected: dict[str, int | list[int]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    """Keys of which nothing is expected but dead letters."""
    heard: dict[UUID, list[Answer | NoAnswer]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def config(self) -> TargetConfig:
        routes = {
            f"{mode}_{way}": {"mode": mode, "record": RECORD, **WAYS[way]}
            for mode in ("event", "state")
            for way in self.ways
        }
        return TargetConfig.model_validate(
            {
                "name": "api",
                "base_url": self.api.url,
                "timeout_seconds": self.timeout,
                "retry": {
                    "initial_backoff": 0.005,
                    "max_backoff": 0.01,
                    "max_elapsed": self.max_elapsed,
                    "max_retry_after": 0.02,
                },
                "circuit_breaker": {"failure_threshold": 4, "error_timeout": 0.01},
                "routes": routes,
                **self.more,
            }
        )

    def append(self, changes: int, *, keys: int = 6, refused: Collection[str] = (), seed: int = 1) -> None:
        """Commit *changes* to *keys* of each stream; of the keys that are *refused* nothing is expected."""
        dice = random.Random(seed)
        streams = list(self.config().routes)
        chosen = []
        for _ in range(changes):
            stream = dice.choice(streams)
            key = f"{stream}-{dice.randrange(keys)}"
            chosen.append((stream, key, dice.choice(["insert", "update", "update", "delete"])))
        self.commit(chosen, refused=refused)

    def commit(self, changes: Iterable[tuple[str, str, str]], *, refused: Collection[str] = ()) -> None:
        """Commit *changes*, each a stream, a key and an operation, in one transaction."""
        with psycopg.connect(self.database) as connection:
            for stream, key, operation in changes:
                row = connection.execute(
                    "insert into distributary.change_log (stream, key, operation, payload)"
                    " values (%s, %s, %s, jsonb_build_object('id', %s::text)) returning change_id",
                    (stream, key, operation, key),
                ).fetchone()
                assert row is not None
                if key in refused:
                    self.refused.add(key)
                elif stream.startswith("state"):
                    self.expected[key] = row[0]
                else:
                    self.expected[key] = [*self.expected.get(key, []), row[0]]  # type: ignore[misc]

    def drain(self) -> DrainReport:
        config = self.config()
        at = endpoint(config, lambda name: name)
        ledger = PostgresLedger(self.database)
        ledger.register({"api": "beginning"})
        with ledger.open_target("api", run_id="run") as opened:
            assert opened is not None
            return drain(
                policy=policy_of(config),
                routes=compile_routes(config),
                ledger=opened,
                connect=lambda: Witness(HttpTargetClient(at), self.heard, self.lock),
                clock=SystemClock(),
                limits=DrainLimits(window_records=60),
            )

    def finish(self, *, chance: Mapping[str, float] = MappingProxyType({})) -> None:
        """Drain the target, which is well again but for *chance*, to the end."""
        self.api.misbehave(chance)
        self.timeout = 5.0
        report = self.drain()
        assert report.end == "caught_up", report

    def assert_kept(self, *, tolerated: Collection[str] = ()) -> None:
        """All is there, in order, no record is buried for the target's sake, and repeats were made in doubt alone."""
        letters = self.letters()
        assert {key for key, _ in letters} == self.refused, letters
        findings = self.api.history.findings(self.expected)
        assert findings.broken.keys() <= set(tolerated), findings
        assert not findings.strangers
        found = PostgresLedger(self.database).conservation("api")
        assert found.holds
        assert (found.pending, found.claimed, found.dead) == (0, 0, len(letters))
        assert found.accepted + found.superseded == found.captured - len(letters)
        with psycopg.connect(self.database) as connection:
            state = connection.execute("select status, failed_runs from distributary.target_state").fetchone()
        assert state == ("active", 0)
        for key, answers in self.heard.items():
            for answer in answers[:-1]:
                assert not takes_some(answer), f"{key} was sent again after {answer}"

    def letters(self) -> list[Any]:
        with psycopg.connect(self.database) as connection:
            return connection.execute("select key, reason from distributary.dead_letter").fetchall()


def takes_some(answer: Answer | NoAnswer) -> bool:
    """Whether a target said that it took records of a request, which must not go out again as it was then."""
    if isinstance(answer, NoAnswer) or answer.truncated or not 200 <= answer.status < 300:
        return False
    try:
        return any(item["status"] == 200 for item in json.loads(answer.body)["results"])
    except (ValueError, LookupError, TypeError):
        return False
