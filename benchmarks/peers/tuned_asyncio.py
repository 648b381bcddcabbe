"""The barest script that still delivers: Postgres makes the bodies, and an asyncio protocol of our own sends them.

No HTTP library, no JSON in Python, no object for a record. It knows of HTTP/1.1 only what the receiver answers with.
"""

import asyncio
import random
import re
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import psycopg

from benchmarks.peers.script import INITIAL_BACKOFF, MAX_BACKOFF, PAGE, RETRYABLE, Mark, Work, connect, run

try:
    import uvloop
except ImportError:  # where it does not install
    uvloop = None  # type: ignore[assignment]

_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)
_BODIES = """
select min(change_id), max(change_id), count(*),
       convert_to('[' || string_agg(payload::text, ',' order by change_id) || ']', 'UTF8')
from (
    select change_id, payload, (row_number() over (order by change_id) - 1) / %s as part
    from (
        select change_id, payload from distributary.change_log where change_id > %s order by change_id limit %s
    ) as page
) as numbered
group by part
order by part
"""


def deliver(work: Work) -> None:
    """Deliver to all targets in one event loop."""
    (uvloop or asyncio).run(deliver_to_all(work))


async def deliver_to_all(work: Work) -> None:
    """Deliver to all targets side by side."""
    async with asyncio.TaskGroup() as group:
        for target in work.targets:
            group.create_task(deliver_to(target, work))


@dataclass(slots=True, kw_only=True)
class Request:
    """The bytes of one request."""

    last: int
    records: int
    content: bytes
    backoff: float = INITIAL_BACKOFF


def requests(connection: psycopg.Connection, target: str, work: Work) -> Iterator[list[Request]]:
    """Yield all after the target's mark, a page of requests at a time."""
    split = urlsplit(work.orders_url(target))
    head = (
        f"POST {split.path} HTTP/1.1\r\nHost: {split.netloc}\r\nContent-Type: application/json\r\n"
        "Idempotency-Key: %d-%d\r\nContent-Length: %d\r\n\r\n"
    ).encode()
    after = Mark.read(connection, target)
    limit = max(1, PAGE // work.batch) * work.batch
    with connection.cursor(binary=True) as cursor:
        while rows := cursor.execute(_BODIES, [work.batch, after, limit], prepare=True).fetchall():
            yield [
                Request(last=last, records=records, content=head % (first, last, len(body)) + body)
                for first, last, records, body in rows
            ]
            after = rows[-1][1]


async def deliver_to(target: str, work: Work) -> None:
    """Deliver to one target."""
    with closing(connect(work)) as connection, closing(connect(work)) as for_mark:
        lanes = Lanes(work, Mark(for_mark, target))
        reader = requests(connection, target, work)
        while page := await asyncio.to_thread(next, reader, None):
            await lanes.take(page)
        await lanes.finish()


class Lanes:
    """All connections to one target, and the requests that they have before them."""

    def __init__(self, work: Work, mark: Mark) -> None:
        self.work = work
        self._mark = mark
        self._waiting: deque[Request] = deque()
        self._idle = [Lane(self) for _ in range(work.in_flight)]
        self._open = 0  # requests that are sent or waiting
        self._room = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None

    async def take(self, page: list[Request]) -> None:
        """Have *page* sent; return once so much is done that the next should be read."""
        for request in page:
            self._mark.begin(request.last)
            self._waiting.append(request)
        self._open += len(page)
        while self._idle and self._waiting:
            self.go_on(self._idle.pop())
        await self._until(len(page))

    async def finish(self) -> None:
        """Return once all is accepted and the mark is written."""
        await self._until(0)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._mark.write()
        for lane in self._idle:
            lane.close()

    def go_on(self, lane: "Lane") -> None:
        """Give *lane* its next request, or none for now."""
        if self._waiting:
            lane.send(self._waiting.popleft())
        else:
            self._idle.append(lane)

    def accepted(self, request: Request) -> None:
        """Note it; the mark is written in a thread."""
        self._open -= 1
        if self._mark.end(request.last, request.records):
            self.spawn(asyncio.to_thread(self._mark.write))
        self._room.set()

    def fail(self, error: BaseException) -> None:
        """End the delivery with *error*."""
        self._failed = error
        self._room.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run *work* beside all else."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if error := task.exception():
            self.fail(error)

    async def _until(self, most: int) -> None:
        while self._open > most:
            self._room.clear()
            await self._room.wait()
            if self._failed:
                raise self._failed


class Lane(asyncio.Protocol):
    """One connection, opened when it is needed: a request, its answer, the next request."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._transport: asyncio.Transport | None = None
        self._request: Request | None = None
        self._answer = b""
        self._sent_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None

    def send(self, request: Request) -> None:
        """Send *request*, again and again until it is accepted."""
        self._request = request
        self._sent_at = self._loop.time()
        if self._transport is None:
            self._lanes.spawn(self._connect())
            return
        self._transport.write(request.content)

    def close(self) -> None:
        """Close the connection."""
        if self._watch:
            self._watch.cancel()
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what waited for the connection."""
        assert self._request is not None
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is none by inheritance
        self._transport.write(self._request.content)
        self._look_at_the_clock()

    def data_received(self, data: bytes) -> None:
        """Take the answer, and go on."""
        answer = self._answer = self._answer + data if self._answer else data
        head, end, body = answer.partition(b"\r\n\r\n")
        if not end or self._request is None:
            return
        length = _LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return
        request, status = self._request, int(answer[9:12])
        self._answer, self._request = b"", None
        if status in RETRYABLE:
            self._send_later(request)
        elif status >= 300:
            self._lanes.fail(RuntimeError(f"answered {status}"))
        else:
            self._lanes.accepted(request)
            self._lanes.go_on(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Send what was unanswered again, over another connection."""
        self._transport, self._answer = None, b""
        if self._watch:
            self._watch.cancel()
        if self._request:
            self._send_later(self._request)

    async def _connect(self) -> None:
        url = urlsplit(self._lanes.work.url)
        assert url.hostname is not None
        assert url.port is not None
        try:
            await self._loop.create_connection(lambda: self, url.hostname, url.port)
        except OSError:
            assert self._request is not None
            self._send_later(self._request)

    def _send_later(self, request: Request) -> None:
        self._request = None
        self._loop.call_later(random.uniform(0, request.backoff), self.send, request)
        request.backoff = min(2 * request.backoff, MAX_BACKOFF)

    def _look_at_the_clock(self) -> None:
        """Give up a connection whose answer takes too long; one timer for all requests of the connection."""
        assert self._transport is not None
        late = self._request is not None and self._loop.time() - self._sent_at > self._lanes.work.timeout
        if late:
            self._transport.abort()
        else:
            self._watch = self._loop.call_later(self._lanes.work.timeout / 10, self._look_at_the_clock)


if __name__ == "__main__":
    run(deliver)
