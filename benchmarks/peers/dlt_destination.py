"""dlt with a custom destination: pages of rows from an incremental resource, posted from files that load side by side.

As its page on performance says: rows come in pages, files are rotated so that there are several to load, and the
loader has as many workers as requests may be in flight.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx

from benchmarks.peers.httpx_threads import post
from benchmarks.peers.script import PAGE, Work, connect, run

os.environ |= {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    "NORMALIZE__DATA_WRITER__FILE_MAX_ITEMS": "1000",
    "NORMALIZE__DATA_WRITER__DISABLE_COMPRESSION": "true",
    "EXTRACT__DATA_WRITER__DISABLE_COMPRESSION": "true",
}

import dlt


def deliver(work: Work) -> None:
    """Run a pipeline for each target; what an earlier run left is loaded first."""
    os.environ["LOAD__WORKERS"] = str(work.in_flight)
    for target in work.targets:
        deliver_to(target, work)


def deliver_to(target: str, work: Work) -> None:
    """Run one target's pipeline."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=work.in_flight)
    with httpx.Client(timeout=work.timeout, limits=limits) as client:
        url = work.orders_url(target)

        @dlt.destination(name=target, batch_size=work.batch, loader_parallelism_strategy="parallel")
        def api(items: list[dict[str, Any]], table: dict[str, Any]) -> None:  # noqa: ARG001
            body = "[" + ",".join(item["payload"] for item in items) + "]"
            post(client, url, body.encode(), f"{items[0]['change_id']}-{items[-1]['change_id']}")

        after_the_last = dlt.sources.incremental("change_id", initial_value=0)

        @dlt.resource(name="orders", write_disposition="append")
        def orders(change_id: dlt.sources.incremental[int] = after_the_last) -> Iterator[list[dict[str, Any]]]:
            after = change_id.last_value
            with closing(connect(work)) as connection:
                while rows := connection.execute(
                    "select change_id, payload::text from distributary.change_log "
                    "where change_id > %s order by change_id limit %s",
                    [after, PAGE],
                    prepare=True,
                ).fetchall():
                    yield [{"change_id": number, "payload": payload} for number, payload in rows]
                    after = rows[-1][0]

        pipeline = dlt.pipeline(target, destination=api, dataset_name="orders", pipelines_dir=f"{work.folder}/dlt")
        pipeline.run(orders()).raise_on_failed_jobs()


if __name__ == "__main__":
    run(deliver)
