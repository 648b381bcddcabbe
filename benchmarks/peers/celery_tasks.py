"""Celery over Redis: a task for each request, a queue and a worker with so many threads for each target.

A message names the changes; the task reads and posts them, as Celery's documentation advises. Messages are acknowledged
late, so that a killed worker's are given to another once the visibility time-out is over; it has to be longer than the
longest wait before a retry, and is an hour by default.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import httpx
import psycopg
import redis
from celery import Celery, Task
from celery.signals import worker_ready

from benchmarks.peers.script import MAX_BACKOFF, PAGE, RETRYABLE, Mark, Work, connect, run

_WORK, _READY = "PEER_WORK", "PEER_READY"
_BODY = """
select '[' || string_agg(payload::text, ',' order by change_id) || ']'
from distributary.change_log where change_id between %s and %s
"""
_RANGES = """
select min(change_id), max(change_id)
from (
    select change_id, (row_number() over (order by change_id) - 1) / %s as part
    from (select change_id from distributary.change_log where change_id > %s order by change_id limit %s) as page
) as numbered
group by part
order by part
"""

app = Celery("peer")
app.conf.update(
    broker_url=json.loads(os.environ[_WORK])["broker_url"] if _WORK in os.environ else None,
    broker_transport_options={"visibility_timeout": int(2 * MAX_BACKOFF)},
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
)
_mine = threading.local()


class Refused(Exception):
    """The target asks for another try."""


@app.task(
    bind=True,
    autoretry_for=(Refused, httpx.TransportError),
    retry_backoff=True,
    retry_backoff_max=int(MAX_BACKOFF),
    max_retries=None,
)
def post(_task: Task, target: str, first: int, last: int) -> None:
    """Send the changes *first* to *last* to *target*."""
    if not hasattr(_mine, "connection"):
        _mine.connection = connect(work())
    row = _mine.connection.execute(_BODY, [first, last], prepare=True).fetchone()
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"{first}-{last}"}
    response = client().post(work().orders_url(target), content=row[0].encode(), headers=headers)
    if response.status_code in RETRYABLE:
        raise Refused(response.status_code)
    response.raise_for_status()
    broker().srem(f"open:{target}", first)


@worker_ready.connect
def say_ready(**_: object) -> None:
    """Have the producer know."""
    if _READY in os.environ:
        broker().incr(os.environ[_READY])


@cache
def work() -> Work:
    """Return what is to be done, in a worker."""
    return Work(**json.loads(os.environ[_WORK]))


@cache
def client() -> httpx.Client:
    """Return the client of all of a worker's threads."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=work().in_flight)
    return httpx.Client(timeout=work().timeout, limits=limits)


@cache
def broker() -> redis.Redis:
    """Return a client of the broker, for what is open."""
    return redis.Redis.from_url(work().broker_url)


# The producer --------------------------------------------------------------------------------------------------------


def deliver(work: Work) -> None:
    """Put a task into the target's queue for each request; return once none is open."""
    for target in work.targets:
        with connect(work) as connection:
            produce(connection, target, work)
    while any(broker().scard(f"open:{target}") for target in work.targets):
        time.sleep(0.01)


def produce(connection: psycopg.Connection, target: str, work: Work) -> None:
    """Put what comes after the mark into *target*'s queue."""
    after, mark = Mark.read(connection, target), Mark(connection, target)
    limit = max(1, PAGE // work.batch) * work.batch
    with app.producer_pool.acquire() as producer:
        while ranges := connection.execute(_RANGES, [work.batch, after, limit], prepare=True).fetchall():
            broker().sadd(f"open:{target}", *[first for first, _ in ranges])
            for first, after in ranges:
                post.apply_async([target, first, after], queue=target, producer=producer)
                mark.begin(after)
                mark.end(after, work.batch)
            mark.write()


@contextmanager
def workers(work: Work) -> Iterator[None]:
    """Have a worker for each target, until the context ends."""
    ready = f"ready:{os.getpid()}"
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.peers.celery_tasks", "worker", "--pool", "threads"]
    lean = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
    started = [
        subprocess.Popen(
            [*command, *lean, "--concurrency", str(work.in_flight), "--queues", target, "--hostname", f"{target}@here"],
            env=os.environ | {_READY: ready},
            stdin=subprocess.DEVNULL,
        )
        for target in work.targets
    ]
    try:
        while int(broker().get(ready) or 0) < len(started):
            if any(worker.poll() is not None for worker in started):
                raise SystemExit("a worker ended")
            time.sleep(0.05)
        yield
    finally:
        for worker in started:
            worker.terminate()
        for worker in started:
            worker.wait()


if __name__ == "__main__":
    os.environ[_WORK] = sys.argv[1]
    from benchmarks.peers import celery_tasks  # the task's name is its module's

    run(celery_tasks.deliver, around=celery_tasks.workers)
