"""A hand-written script with asyncio and aiohttp: for each target a queue, and as many workers as may be in flight."""

import asyncio
import random
from contextlib import closing

import aiohttp

from benchmarks.peers.script import INITIAL_BACKOFF, MAX_BACKOFF, RETRYABLE, Batch, Mark, Work, connect, pages, run


def deliver(work: Work) -> None:
    """Deliver to all targets in one event loop."""
    asyncio.run(deliver_to_all(work))


async def deliver_to_all(work: Work) -> None:
    """Deliver to all targets side by side, over one session whose limits are lifted."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=work.timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        for target in work.targets:
            group.create_task(deliver_to(target, work, session))


async def deliver_to(target: str, work: Work, session: aiohttp.ClientSession) -> None:
    """Deliver to one target; the database is asked in threads, so that requests go on meanwhile."""
    queue = asyncio.Queue[Batch | None](4 * work.in_flight)
    url = work.orders_url(target)
    with closing(connect(work)) as connection, closing(connect(work)) as for_mark:
        mark = Mark(for_mark, target)

        async def take_up() -> None:
            while (batch := await queue.get()) is not None:
                await send(session, url, batch)
                if mark.end(batch.last, len(batch.records)):
                    await asyncio.to_thread(mark.write)

        async with asyncio.TaskGroup() as group:
            for _ in range(work.in_flight):
                group.create_task(take_up())
            reader = pages(connection, target, work.batch)
            while page := await asyncio.to_thread(next, reader, None):
                for batch in page:
                    mark.begin(batch.last)
                    await queue.put(batch)
            for _ in range(work.in_flight):
                await queue.put(None)
        mark.write()


async def send(session: aiohttp.ClientSession, url: str, batch: Batch) -> None:
    """Send until it is accepted."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": batch.key}
    body, backoff = batch.body(), INITIAL_BACKOFF
    while True:
        try:
            async with session.post(url, data=body, headers=headers) as response:
                await response.read()
                if response.status not in RETRYABLE:
                    response.raise_for_status()
                    return
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError):
            pass
        await asyncio.sleep(random.uniform(0, backoff))
        backoff = min(2 * backoff, MAX_BACKOFF)


if __name__ == "__main__":
    run(deliver)
