"""The asyncio script with httpx's interface, over aiohttp's connections (httpx-aiohttp)."""

import asyncio
import random
from contextlib import closing

import httpx
from httpx_aiohttp import HttpxAiohttpClient

from benchmarks.peers.script import INITIAL_BACKOFF, MAX_BACKOFF, RETRYABLE, Batch, Mark, Work, connect, pages, run


def deliver(work: Work) -> None:
    """Deliver to all targets in one event loop."""
    asyncio.run(deliver_to_all(work))


async def deliver_to_all(work: Work) -> None:
    """Deliver to all targets side by side."""
    async with asyncio.TaskGroup() as group:
        for target in work.targets:
            group.create_task(deliver_to(target, work))


async def deliver_to(target: str, work: Work) -> None:
    """Deliver to one target; the database is asked in threads, so that requests go on meanwhile."""
    queue = asyncio.Queue[Batch | None](4 * work.in_flight)
    url, limits = work.orders_url(target), httpx.Limits(max_connections=None, max_keepalive_connections=work.in_flight)
    with closing(connect(work)) as connection, closing(connect(work)) as for_mark:
        mark = Mark(for_mark, target)
        async with HttpxAiohttpClient(timeout=work.timeout, limits=limits) as client:

            async def take_up() -> None:
                while (batch := await queue.get()) is not None:
                    await send(client, url, batch)
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


async def send(client: httpx.AsyncClient, url: str, batch: Batch) -> None:
    """Send until it is accepted."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": batch.key}
    body, backoff = batch.body(), INITIAL_BACKOFF
    while True:
        try:
            response = await client.post(url, content=body, headers=headers)
            if response.status_code not in RETRYABLE:
                response.raise_for_status()
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(random.uniform(0, backoff))
        backoff = min(2 * backoff, MAX_BACKOFF)


if __name__ == "__main__":
    run(deliver)
