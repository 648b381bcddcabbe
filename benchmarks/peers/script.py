"""What every peer begins with: what is to be delivered, the pages of it, and the mark up to which it is done.

A peer is run as `python -m benchmarks.peers.<peer> WORK_AS_JSON`, in the peers' environment: nothing here imports
anything else of this project. It says `ready`, waits for a line, delivers, says `{"end": "caught_up"}`, and ends with
its standard input; if that comes early, at once, with all that it started. Started again, it goes on from its mark, as
a script that is run every minute would.
"""

import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import msgspec
import psycopg
from psycopg.types.json import set_json_loads

PAGE = 5_000
"""Changes that are read at once; the mark is written as often."""
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 30.0
"""Seconds between the attempts of a request: doubled from the first to the last, with jitter."""
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one process is to deliver."""

    database_url: str
    url: str
    """The receiver's, without the target."""
    targets: Sequence[str]
    batch: int
    in_flight: int
    """Requests at once, to each target."""
    timeout: float
    """Seconds that an answer may take."""
    folder: str
    """The peer's own, kept until the work is done."""
    broker_url: str | None = None

    def orders_url(self, target: str) -> str:
        """Return where *target* takes its records."""
        return f"{self.url}/{target}/orders"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The changes of one request."""

    first: int
    last: int
    records: Sequence[dict[str, Any]]

    @property
    def key(self) -> str:
        """The Idempotency-Key: the same whenever the same changes are sent together."""
        return f"{self.first}-{self.last}"

    def body(self) -> bytes:
        """Return the records as JSON."""
        return msgspec.json.encode(self.records)


def run(
    deliver: Callable[[Work], None], around: Callable[[Work], AbstractContextManager[None]] = lambda _: nullcontext()
) -> None:
    """Be told what to do on the command line and when on standard input; do it and say so.

    *around* makes what must be up before, and is left in the end.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries that print are not to be taken for us
    work, done = Work(**json.loads(sys.argv[1])), threading.Event()
    with around(work):
        print("ready", file=answers)
        if not sys.stdin.readline():
            return
        owner = threading.Thread(target=_end_with_owner, args=[done], daemon=True)
        owner.start()
        deliver(work)
        done.set()
        print(json.dumps({"end": "caught_up"}), file=answers)
        owner.join()  # whoever measures has a look at this process first


def _end_with_owner(done: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    if not done.is_set():
        os.killpg(0, signal.SIGKILL)


def connect(work: Work) -> psycopg.Connection:
    """Return a connection whose JSON is read by the fastest decoder."""
    connection = psycopg.connect(work.database_url, autocommit=True)
    set_json_loads(msgspec.json.decode, connection)
    return connection


def pages(connection: psycopg.Connection, target: str, size: int) -> Iterator[list[Batch]]:
    """Yield all changes after the target's mark, in order, in batches of *size*, a page of batches at a time."""
    after = Mark.read(connection, target)
    limit = max(1, PAGE // size) * size
    while rows := connection.execute(
        "select change_id, payload from distributary.change_log where change_id > %s order by change_id limit %s",
        [after, limit],
        prepare=True,
    ).fetchall():
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        yield [Batch(first=part[0][0], last=part[-1][0], records=[row[1] for row in part]) for part in parts]
        after = rows[-1][0]


class Mark:
    """Up to which change all is delivered, though requests end in any order; written down once a page."""

    def __init__(self, connection: psycopg.Connection, target: str) -> None:
        self._connection = connection
        self._target = target
        self._sent: deque[int] = deque()
        self._ended: set[int] = set()
        self._since = 0
        self._reached = 0

    @staticmethod
    def read(connection: psycopg.Connection, target: str) -> int:
        """Return the mark that was written last; 0 if there is none."""
        row = connection.execute("select change_id from peer_mark where target = %s", [target]).fetchone()
        return row[0] if row else 0

    def begin(self, last: int) -> None:
        """Note that a batch is to be sent; to be called in order."""
        self._sent.append(last)

    def end(self, last: int, records: int) -> bool:
        """Note that a batch was accepted; return whether the mark should be written by now."""
        self._ended.add(last)
        while self._sent and self._sent[0] in self._ended:
            self._reached = self._sent.popleft()
            self._ended.remove(self._reached)
        self._since += records
        return self._since >= PAGE

    def write(self) -> None:
        """Write the mark down."""
        self._since = 0
        if self._reached:
            self._connection.execute(
                "insert into peer_mark values (%s, %s) "
                "on conflict (target) do update set change_id = excluded.change_id",
                [self._target, self._reached],
                prepare=True,
            )
