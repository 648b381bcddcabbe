"""One target of the soak, in a process of its own: it misbehaves as told, and keeps account of all that it took.

`python -m soak.target --port 8901 --control 8902 --seed 1`. On the second port it is told and asked

    POST /behave    {"chance": {fault: probability}, "listens": true}
    POST /findings  {"expected": {key: its last change, or all its changes}}: what was lost, repeated, out of order
    GET  /held      the records that it holds now, by key, having passed over what came again under the same key
    GET  /faults    how often each fault was met
"""

import argparse
import signal
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines_tests.fakes.faulty_api import FaultyApi
from pipelines_tests.fakes.history import versions_in
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request


class Store(FaultyApi):
    """Holds what a target that honours idempotency keys would hold."""

    def __init__(self, *, successor_of: "Store | None" = None, **more: Any) -> None:
        self.held: dict[str, Any] = {}
        self._holding = threading.Lock()
        if successor_of is None:
            super().__init__(keep=False, **more)
            return
        # It listens from the first moment on: nothing may take effect before it knows what took effect before.
        super().__init__(keep=False, **more | {"chance": {"drop_before": 1.0}})
        self.history, self.held, self.faults = successor_of.history, successor_of.held, successor_of.faults

    def _apply(self, request: Request, reply: Reply) -> None:
        with self._holding:
            taken = self.history.taken(request.key)
            super()._apply(request, reply)
            for position, version in enumerate(versions_in(request)):
                if position in taken or (reply.applies_to is not None and position not in reply.applies_to):
                    continue
                record = request.records[position] if request.body else {"deleted": True}
                if record["deleted"]:
                    self.held.pop(version.key, None)
                else:
                    self.held[version.key] = record["row"]


class Controlled:
    """A store that comes and goes, and the door by which it is told to."""

    def __init__(self, *, port: int, control: int, **more: Any) -> None:
        self._how = {"port": port, **more}
        self._lock = threading.Lock()
        self._store = Store(**self._how)
        self._listens = True
        self._control = HttpApi(self._answer, port=control, keep=False)

    def close(self) -> None:
        """Stop listening on both ports."""
        self._control.close()
        with self._lock:
            if self._listens:
                self._store.close()

    def _answer(self, request: Request) -> Reply:
        with self._lock:
            match request.path:
                case "/behave":
                    self._behave(**request.json)
                    return Reply()
                case "/findings":
                    return Reply.json(_told(self._store, request.json["expected"]))
                case "/held":
                    return Reply.json(self._store.held)
                case "/faults":
                    return Reply.json(Counter(self._store.faults))
        return Reply(status=404)

    def _behave(self, chance: Mapping[str, float], *, listens: bool) -> None:
        if self._listens and not listens:
            self._store.close()
        elif listens and not self._listens:
            self._store = Store(successor_of=self._store, **self._how)
        self._listens = listens
        self._store.misbehave(chance)


def _told(store: Store, expected: Mapping[str, int | Collection[int]]) -> dict[str, Any]:
    findings = store.history.findings(expected)
    return asdict(findings) | {"broken": dict(findings.broken)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until asked to stop."""
    parser = argparse.ArgumentParser(prog="python -m soak.target", description="Take records, and misbehave.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--patience", type=float, required=True, help="the client's time-out")
    parser.add_argument("--bad-keys", nargs="*", default=[], help="records that are always refused")
    chosen = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    target = Controlled(
        port=chosen.port,
        control=chosen.control,
        seed=chosen.seed,
        patience=chosen.patience,
        bad_keys=chosen.bad_keys,
    )
    while not stop.wait(0.2):
        pass
    target.close()


if __name__ == "__main__":
    main()
