"""A target API for throughput: it answers at once or after a fixed time, keeps what came, and examines it afterwards.

`python -m benchmarks.receiver --port 8901 --latency 0.05`. Several targets in one process, told apart by the first
segment of the path. While requests come, it does no more than HTTP needs; only when asked does it read the bodies.

    GET  /seen            per target: requests and bytes, when the first came, the last was answered; CPU time
    GET  /verdict?ids=…&versions=…  per target: what is missing, repeated, out of order
    POST /reset           forget everything

Every other POST is taken as records: a JSON array of objects, each with `id` and `version`, the versions of an id
beginning with 1. It applies them as an API with idempotency keys does: a known key is answered and not applied again.
"""

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from urllib.parse import parse_qs, urlsplit

import msgspec

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
_END_OF_HEAD = b"\r\n\r\n"


class _Record(msgspec.Struct, gc=False):
    id: int
    version: int


_records_of = msgspec.json.Decoder(list[_Record]).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one target holds after all that it was sent."""

    records: int
    """Applied, repeats included."""
    missing: int
    """Of the changes there are, those that never came."""
    repeats: int
    """Applied once more: a change that was there already, under another key or none."""
    known_repeats: int
    """Records of requests with a key that had been taken before: not applied again."""
    stale: int
    """Applied after a later version of the same id."""
    wrong_at_the_end: int
    """Ids whose last applied version is not the latest there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Every so many requests something goes wrong; 0 is never. Counted over all targets."""

    refuse: int = 0
    """Answer 503 and apply nothing."""
    lose_answer: int = 0
    """Apply it and close the connection without an answer."""
    hang: int = 0
    """Apply it and say nothing, on a connection that stays open."""


@dataclass(slots=True, kw_only=True)
class Target:
    """One target's requests, as they came."""

    bodies: list[tuple[bytes | None, bytes]] = field(default_factory=list)
    """Idempotency key and body of each request that was applied."""
    size: int = 0
    refused: int = 0
    first_at: float | None = None
    last_at: float | None = None

    def verdict(self, *, ids: int, versions: int) -> Verdict:
        """Examine what came against *ids* records, each in *versions* versions."""
        keys: set[bytes] = set()
        seen: set[tuple[int, int]] = set()
        latest: dict[int, int] = {}
        holds: dict[int, int] = {}
        records = repeats = known_repeats = stale = 0
        for key, body in self.bodies:
            came = _records_of(body)
            if key is not None and key in keys:
                known_repeats += len(came)
                continue
            if key is not None:
                keys.add(key)
            for record in came:
                records += 1
                repeats += (record.id, record.version) in seen
                seen.add((record.id, record.version))
                stale += record.version < latest.get(record.id, 0)
                latest[record.id] = max(record.version, latest.get(record.id, 0))
                holds[record.id] = record.version
        return Verdict(
            records=records,
            missing=ids * versions - len(seen),
            repeats=repeats,
            known_repeats=known_repeats,
            stale=stale,
            wrong_at_the_end=sum(holds.get(number) != versions for number in range(1, ids + 1)),
        )


class Receiver:
    """All targets of one process."""

    def __init__(self, *, latency: float, faults: Faults) -> None:
        self.latency = latency
        self._faults = faults
        self._targets: dict[bytes, Target] = {}
        self._requests = 0

    def take(self, path: bytes, key: bytes | None, body: bytes) -> tuple[Target, bytes | None]:
        """Keep one request; return its target, and what to answer: None, to close the connection in its stead."""
        target = self._targets.get(path)
        if target is None:
            name = path.split(b"/", 2)[1]
            target = self._targets.setdefault(name, Target())
            self._targets[path] = target
        if target.first_at is None:
            target.first_at = time.monotonic()
        self._requests += 1
        if self._faults.refuse and self._requests % self._faults.refuse == 0:
            target.refused += 1
            return target, _REFUSAL
        target.bodies.append((key, body))
        target.size += len(body)
        if self._faults.lose_answer and self._requests % self._faults.lose_answer == 0:
            return target, None
        if self._faults.hang and self._requests % self._faults.hang == 0:
            return target, b""
        return target, _ANSWER

    def about(self, method: bytes, path: str) -> bytes | None:
        """Answer a question about what came; None if it is none."""
        asked = urlsplit(path)
        named = {name.decode(): one for name, one in self._targets.items() if b"/" not in name}
        match method, asked.path:
            case b"GET", "/seen":
                used = resource.getrusage(resource.RUSAGE_SELF)
                targets = {
                    name: {
                        "requests": len(one.bodies),
                        "refused": one.refused,
                        "bytes": one.size,
                        "first_at": one.first_at,
                        "last_at": one.last_at,
                    }
                    for name, one in named.items()
                }
                return json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "targets": targets}).encode()
            case b"GET", "/verdict":
                numbers = {name: int(values[0]) for name, values in parse_qs(asked.query).items()}
                verdicts = {name: asdict(one.verdict(**numbers)) for name, one in named.items()}
                return json.dumps(verdicts).encode()
            case b"POST", "/reset":
                self._targets.clear()
                self._requests = 0
                return b"{}"
        return None


class Connection(asyncio.Protocol):
    """One connection: requests are taken as they are complete, and answered in turn."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._chunks: list[bytes] = []
        self._have = 0
        self._need = 0  # bytes of the request that is coming in, once its head is read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what answers are written to."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Gather bytes until a request is whole."""
        self._chunks.append(data)
        self._have += len(data)
        while self._have and self._have >= self._need:
            whole = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._chunks = [whole]
            end = whole.find(_END_OF_HEAD)
            if end < 0:
                return
            head = whole[:end]
            self._need = end + len(_END_OF_HEAD) + _length(head)
            if self._have < self._need:
                return
            body = whole[end + len(_END_OF_HEAD) : self._need]
            rest = whole[self._need :]
            self._chunks, self._have, self._need = ([rest] if rest else []), len(rest), 0
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if path in _OUR_OWN or path.startswith(b"/verdict"):
            said = self._receiver.about(method, path.decode())
            if said is not None:
                self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))
                return
        target, answer = self._receiver.take(path, _header(head, b"idempotency-key"), body)
        if self._receiver.latency:
            asyncio.get_running_loop().call_later(self._receiver.latency, partial(self._write, target, answer))
        else:
            self._write(target, answer)

    def _write(self, target: Target, answer: bytes | None) -> None:
        if answer is None:
            self._transport.abort()
            return
        self._transport.write(answer)
        target.last_at = time.monotonic()


_OUR_OWN = frozenset({b"/seen", b"/reset"})


def _header(head: bytes, name: bytes) -> bytes | None:
    start = head.lower().find(b"\r\n" + name + b":")
    if start < 0:
        return None
    return head[start + len(name) + 3 :].split(b"\r\n", 1)[0].strip()


def _length(head: bytes) -> int:
    found = _header(head, b"content-length")
    return int(found) if found else 0


async def _serve(receiver: Receiver, port: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(receiver), "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.receiver", description="Take records, examine them.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before an answer")
    parser.add_argument("--refuse", type=int, default=0, help="answer 503 to every so many-th request")
    parser.add_argument("--lose-answer", type=int, default=0, help="close instead of answering every so many-th")
    parser.add_argument("--hang", type=int, default=0, help="never answer every so many-th")
    chosen = parser.parse_args(arguments)
    faults = Faults(refuse=chosen.refuse, lose_answer=chosen.lose_answer, hang=chosen.hang)
    asyncio.run(_serve(Receiver(latency=chosen.latency, faults=faults), chosen.port))


if __name__ == "__main__":
    main()
