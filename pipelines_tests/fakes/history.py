"""Judge what a target saw: is anything lost, out of order, or repeated without being recognisable as a repeat?

Every record must carry its key and a version that grows with each change of the key, by default as
`{"id": "$id", "change": "$_change_id"}`; a request without a body names them in its path: `/rows/KEY?change=VERSION`.
A deletion is a change like any other. Two targets are imagined over what took effect: one that honours idempotency
keys, so that it passes over what it has taken under a key before, and one that takes whatever comes as if it were new.

    findings = examine(api.requests, api.applied, {"ada": 7, "bob": [2, 5, 9]})    # afterwards
    api.history.findings(...)                                                      # of a `FaultyApi`, at any time
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from pipelines_tests.fakes.http_server import Request

EXAMPLES = 100
"""So many defects of a kind are kept; all are counted."""


class Version(NamedTuple):
    """One state of one key, its absence included."""

    key: str
    change: int


Expected = Mapping[str, int | Collection[int]]
"""By key: its last change (mode `state`), or all its changes (mode `event`)."""
Read = Callable[[Request], Sequence[Version]]


def versions_in(request: Request, *, key: str = "id", change: str = "change") -> list[Version]:
    """Return the versions that *request* carries, in its order, from the body's fields *key* and *change* or the path.

    Keys are compared as text; streams whose keys may be equal need a `read` of their own that tells them apart.
    """
    if request.body:
        return [Version(str(record[key]), int(record[change])) for record in request.records]
    path = urlsplit(request.path)
    return [Version(unquote(path.path.rpartition("/")[2]), int(parse_qs(path.query)[change][0]))]


class Overtaken(NamedTuple):
    """A key that went backwards: it was at *had*, and *change* was applied after it."""

    key: str
    had: int
    change: int


class Repeat(NamedTuple):
    """A change that was applied again by a request with another idempotency key, or with another body."""

    key: str
    change: int
    idempotency_key: str


class Lost(NamedTuple):
    """What of a key did not arrive: the changes that are missing, and where it stands (None: it never arrived)."""

    key: str
    missing: tuple[int, ...]
    stands_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found. The promise is kept if `broken` is empty."""

    requests: int
    """That arrived, whether they took effect or not."""
    applied: int
    """Records that took effect, repeats included."""
    lost: Sequence[Lost]
    strangers: Sequence[str]
    """Keys that took effect though nothing of theirs was expected."""
    out_of_order: Sequence[Overtaken]
    """At a target that honours idempotency keys."""
    out_of_order_if_careless: Sequence[Overtaken]
    """At a target that takes every request as new, looked at after each request."""
    repeats: int
    """Records applied again under the same key with the same request: what at-least-once allows."""
    repeats_under_another_key: Sequence[Repeat]
    keys_with_two_bodies: Sequence[str]
    """Idempotency keys that came with more than one (method, path, body)."""
    without_key: int
    """Requests that had no idempotency key."""
    counts: Mapping[str, int]
    """How many defects of each kind there are; the sequences end at `EXAMPLES`."""

    @property
    def broken(self) -> Mapping[str, int]:
        """Return the defects that there are, by kind, and how many of each."""
        return {name: count for name, count in self.counts.items() if count}

    def __str__(self) -> str:
        return f"{self.requests} requests, {self.applied} records applied, {self.repeats} repeated; " + (
            ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.broken.items()) or "nothing broken"
        )


@dataclass(slots=True)
class _Defects:
    """Counts all, keeps some."""

    count: int = 0
    kept: list[Any] = field(default_factory=list)

    def add(self, defect: Any) -> None:
        self.count += 1
        if len(self.kept) < EXAMPLES:
            self.kept.append(defect)


class History:
    """Gathers what a target saw while it runs: constant cost for each record, no bodies kept. Thread-safe.

    Changes are told apart by their number alone, as in one change log; one history is for one target.
    """

    def __init__(self, read: Read = versions_in) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._requests = self._applied = self._repeats = self._without_key = 0
        self._said: dict[str, int] = {}  # by idempotency key: what came with it
        self._taken: dict[str, int] = {}  # by idempotency key: a bit for each position that took effect
        self._by: dict[int, int] = {}  # by change: the request by which it first took effect, key and all
        self._changes: dict[str, list[int]] = {}  # by key, as they first took effect
        self._careful: dict[str, int] = {}
        self._careless: dict[str, int] = {}
        self._out_of_order, self._out_of_order_if_careless = _Defects(), _Defects()
        self._under_another_key, self._two_bodies = _Defects(), _Defects()

    def arrive(self, request: Request) -> None:
        """Take note of a request, whatever is to become of it."""
        said = _hash(request.method, request.path, request.body)
        with self._lock:
            self._requests += 1
            if request.key is None:
                self._without_key += 1
            elif self._said.setdefault(request.key, said) != said:
                self._two_bodies.add(request.key)

    def apply(self, request: Request, positions: Collection[int] | None = None) -> None:
        """Take note that a request took effect, by default with all its records; *positions* count from 0."""
        versions = self._read(request)
        name = request.key or f"none:{request.number}"
        identity = _hash(name, request.method, request.path, request.body)
        places = range(len(versions)) if positions is None else sorted(positions)
        with self._lock:
            taken = self._taken.get(name, 0)
            after: dict[str, int] = {}
            for place in places:
                version = versions[place]
                self._note(version, identity, name)
                if not taken >> place & 1:
                    self._advance(self._careful, version, self._out_of_order)
                taken |= 1 << place
                # Within one request a key may go on from state to state; what counts is where it leaves it.
                if after.get(version.key, version.change) > version.change:
                    self._out_of_order_if_careless.add(Overtaken(version.key, after[version.key], version.change))
                after[version.key] = version.change
            self._taken[name] = taken
            for key, change in after.items():
                self._advance(self._careless, Version(key, change), self._out_of_order_if_careless)

    def taken(self, idempotency_key: str | None) -> frozenset[int]:
        """Return the positions of the records that took effect under *idempotency_key*."""
        with self._lock:
            bits = self._taken.get(idempotency_key or "", 0)
        return frozenset(position for position in range(bits.bit_length()) if bits >> position & 1)

    def findings(self, expected: Expected) -> Findings:
        """Hold what has come so far against what was *expected* to; the cost grows with the keys and changes."""
        with self._lock:
            lost = _Defects()
            for key, wanted in expected.items():
                stands_at = self._careful.get(key)
                if isinstance(wanted, int):
                    missing: Collection[int] = [wanted] if stands_at != wanted else ()
                else:
                    missing = set(wanted).difference(self._changes.get(key, ()))
                if missing:
                    lost.add(Lost(key, tuple(sorted(missing)), stands_at))
            defects = {
                "lost": lost,
                "out_of_order": self._out_of_order,
                "out_of_order_if_careless": self._out_of_order_if_careless,
                "repeats_under_another_key": self._under_another_key,
                "keys_with_two_bodies": self._two_bodies,
            }
            return Findings(
                requests=self._requests,
                applied=self._applied,
                strangers=sorted(self._changes.keys() - expected.keys()),
                repeats=self._repeats,
                without_key=self._without_key,
                lost=lost.kept,
                out_of_order=tuple(self._out_of_order.kept),
                out_of_order_if_careless=tuple(self._out_of_order_if_careless.kept),
                repeats_under_another_key=tuple(self._under_another_key.kept),
                keys_with_two_bodies=tuple(self._two_bodies.kept),
                counts={name: found.count for name, found in defects.items()} | {"without_key": self._without_key},
            )

    def _note(self, version: Version, identity: int, name: str) -> None:
        self._applied += 1
        first = self._by.get(version.change)
        if first is None:
            self._by[version.change] = identity
            self._changes.setdefault(version.key, []).append(version.change)
        elif first == identity:
            self._repeats += 1
        else:
            self._under_another_key.add(Repeat(version.key, version.change, name))

    @staticmethod
    def _advance(state: dict[str, int], version: Version, defects: _Defects) -> None:
        had = state.get(version.key, version.change)
        if had > version.change:
            defects.add(Overtaken(version.key, had, version.change))
        state[version.key] = version.change


def examine(
    requests: Iterable[Request], applied: Iterable[Request], expected: Expected, *, read: Read = versions_in
) -> Findings:
    """Judge a history that is over: what arrived, what of it took effect (in that order, whole), and what was to."""
    history = History(read)
    for request in requests:
        history.arrive(request)
    for request in applied:
        history.apply(request)
    return history.findings(expected)


def _hash(*parts: str | bytes) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:
        text = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(text) + text)
    return int.from_bytes(digest.digest())
