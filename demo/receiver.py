"""A webhook receiver that checks one thing: that each event came once.

`python -m demo.receiver --port 8803 --store inbox.db`. It offers

    POST /events              a JSON array of events, each with an `event_id`, under an `Idempotency-Key`
    GET  /events?after=0      what came, 1,000 at a time, in the order of arrival
    GET  /summary             how many requests and events came, and how many of them again
"""

import argparse
import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

PAGE_SIZE = 1000

_TABLES = """
create table request (
    idempotency_key text,
    digest          text,
    times           integer not null default 1,
    primary key (idempotency_key, digest)
);
create table event (
    position integer primary key,
    event_id integer not null,
    body     text    not null
);
"""


class Inbox:
    """What came, on disk, so that a receiver that is left running for a week needs no more memory."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._store = sqlite3.connect(path, check_same_thread=False)
        self._store.executescript(f"pragma journal_mode = off; pragma synchronous = off; {_TABLES}")

    def take(self, idempotency_key: str, body: bytes) -> tuple[int, str]:
        """Take one request; returns the status and the sentence to answer with.

        A request that came before, under the same key and with the same body, is counted and not taken again.
        The same key with another body is counted and refused.
        """
        digest = hashlib.sha256(body).hexdigest()
        try:
            events = [(int(event["event_id"]), json.dumps(event)) for event in json.loads(body)]
        except (ValueError, TypeError, KeyError):
            return 400, "The body must be a JSON array of objects, each with an event_id that is a whole number."
        with self._lock, self._store as store:
            known = [
                row[0]
                for row in store.execute("select digest from request where idempotency_key = ?", [idempotency_key])
            ]
            store.execute(
                "insert into request (idempotency_key, digest) values (?, ?) "
                "on conflict (idempotency_key, digest) do update set times = times + 1",
                [idempotency_key, digest],
            )
            if digest in known:
                return 200, "This request came before."
            if known:
                return 422, "This Idempotency-Key came before with another body."
            store.executemany("insert into event (event_id, body) values (?, ?)", events)
            return 200, f"Took {len(events)} events."

    def summary(self) -> dict[str, int]:
        """Return the counts of requests and events, and of those that came again."""
        with self._lock:
            requests, distinct, keys = self._store.execute(
                "select coalesce(sum(times), 0), count(*), count(distinct idempotency_key) from request"
            ).fetchone()
            events, ids = self._store.execute("select count(*), count(distinct event_id) from event").fetchone()
        return {
            "requests": requests,
            "repeated_requests": requests - distinct,
            "keys_with_another_body": distinct - keys,
            "events": events,
            "repeated_events": events - ids,
        }

    def events(self, after: int) -> dict[str, Any]:
        """Return the events that came after position *after*, and the position to ask for next (null at the end)."""
        with self._lock:
            rows = self._store.execute(
                "select position, body from event where position > ? order by position limit ?", [after, PAGE_SIZE]
            ).fetchall()
        return {
            "events": [json.loads(body) for _, body in rows],
            "next": rows[-1][0] if len(rows) == PAGE_SIZE else None,
        }


def make_server(port: int, inbox: Inbox) -> ThreadingHTTPServer:
    """Return a server on 127.0.0.1 that puts what it is sent into *inbox*; port 0 is any free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Idempotency-Key")
            if urlsplit(self.path).path != "/events":
                self._answer(404, {"message": "Events are taken by POST /events."})
            elif not key:
                self._answer(400, {"message": "A request needs an Idempotency-Key."})
            else:
                status, message = inbox.take(key, body)
                self._answer(status, {"message": message})

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/summary":
                self._answer(200, inbox.summary())
            elif url.path == "/events":
                self._answer(200, inbox.events(int(parse_qs(url.query).get("after", ["0"])[0])))
            else:
                self._answer(404, {"message": "There is GET /summary and GET /events?after=0."})

        def _answer(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m demo.receiver", description="Receive events and count repeats.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True, help="a file that does not exist yet")
    chosen = parser.parse_args(arguments)
    make_server(chosen.port, Inbox(chosen.store)).serve_forever()


if __name__ == "__main__":
    main()
