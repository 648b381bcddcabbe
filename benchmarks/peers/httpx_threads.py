"""A script with httpx and threads: for each target one client and as many threads as requests may be in flight."""

import random
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing

import httpx

from benchmarks.peers.script import INITIAL_BACKOFF, MAX_BACKOFF, RETRYABLE, Batch, Mark, Work, connect, pages, run


def deliver(work: Work) -> None:
    """Deliver to all targets side by side."""
    with ThreadPoolExecutor(len(work.targets)) as pool:
        for ended in [pool.submit(deliver_to, target, work) for target in work.targets]:
            ended.result()


def deliver_to(target: str, work: Work) -> None:
    """Deliver to one target: its threads always have something to take up."""
    url, limits = work.orders_url(target), httpx.Limits(max_connections=None, max_keepalive_connections=work.in_flight)
    with (
        closing(connect(work)) as connection,
        httpx.Client(timeout=work.timeout, limits=limits) as client,
        ThreadPoolExecutor(work.in_flight) as pool,
    ):
        mark, running = Mark(connection, target), set[Future[Batch]]()

        def collect(most: int) -> None:
            nonlocal running
            while len(running) > most:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    batch = one.result()
                    if mark.end(batch.last, len(batch.records)):
                        mark.write()

        for page in pages(connection, target, work.batch):
            for batch in page:
                mark.begin(batch.last)
                running.add(pool.submit(send, client, url, batch))
                collect(4 * work.in_flight)
        collect(0)
        mark.write()


def send(client: httpx.Client, url: str, batch: Batch) -> Batch:
    """Send until it is accepted."""
    post(client, url, batch.body(), batch.key)
    return batch


def post(client: httpx.Client, url: str, body: bytes, key: str) -> None:
    """Send *body* until it is accepted."""
    headers, backoff = {"Content-Type": "application/json", "Idempotency-Key": key}, INITIAL_BACKOFF
    while True:
        try:
            response = client.post(url, content=body, headers=headers)
            if response.status_code not in RETRYABLE:
                response.raise_for_status()
                return
        except httpx.TransportError:
            pass
        time.sleep(random.uniform(0, backoff))
        backoff = min(2 * backoff, MAX_BACKOFF)


if __name__ == "__main__":
    run(deliver)
