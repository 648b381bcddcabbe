"""How fast the receiver could be: requests that were made beforehand, from the barest client there can be.

`python -m benchmarks.ceiling URL_OF_A_TARGET … --requests 2000 --in-flight 8` sends the same body again and again over
`in_flight` connections to each target and says in JSON what that took. No database, no JSON, no HTTP library.
"""

import argparse
import json
import resource
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

_RECORD = '{"id": %d, "version": 1, "note": "%s"}'


def main(arguments: Sequence[str] | None = None) -> None:
    """Send everything, print what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description="Send as fast as can be.")
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--requests", type=int, default=2000, help="to each target")
    parser.add_argument("--in-flight", type=int, default=8, help="connections to each target")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=300, help="of a record")
    chosen = parser.parse_args(arguments)
    filler = "x" * max(0, chosen.bytes - len(_RECORD))
    body = ("[" + ",".join(_RECORD % (number + 1, filler) for number in range(chosen.batch)) + "]").encode()
    with ExitStack() as open_until_the_end:
        selector = open_until_the_end.enter_context(selectors.DefaultSelector())
        for url in chosen.urls:
            split = urlsplit(url)
            head = f"POST {split.path}/orders HTTP/1.1\r\nHost: {split.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
            for number in range(min(chosen.in_flight, chosen.requests)):
                connection = open_until_the_end.enter_context(socket.create_connection((split.hostname, split.port)))
                requests = len(range(number, chosen.requests, chosen.in_flight))
                selector.register(connection, selectors.EVENT_READ, _Sender(connection, head.encode() + body, requests))
        found = _send_all(selector)
    found["records_per_second"] = len(chosen.urls) * chosen.requests * chosen.batch / found["seconds"]
    print(json.dumps(found))


@dataclass(slots=True)
class _Sender:
    """One connection, and how many requests it still has to send."""

    connection: socket.socket
    request: bytes
    left: int

    def send(self) -> None:
        self.left -= 1
        self.connection.sendall(self.request)


def _send_all(selector: selectors.BaseSelector) -> dict[str, float]:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    senders = [key.data for key in selector.get_map().values()]
    for sender in senders:
        sender.send()
    unanswered = len(senders)
    while unanswered:
        for key, _ in selector.select():
            sender = key.data
            if not sender.connection.recv(65536).startswith(b"HTTP/1.1 200"):
                raise SystemExit("the receiver did not answer 200")
            if sender.left:
                sender.send()
            else:
                unanswered -= 1
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


if __name__ == "__main__":
    main()
