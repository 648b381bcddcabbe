"""A target API that costs next to nothing: it counts what it is sent, and is unwell for as long as it is told to be.

`python -m benchmarks.target --port 8901 --delay 0.03 [--behaviour hangs]`. It offers

    GET  /summary           what was taken: requests, records, distinct records, and when the first and the last came
    POST /behaviour/<one>   be `well`, or from now on answer 503 to all (`refuses`), or nothing (`hangs`)

and takes every other request as one of the pipeline's: a JSON array of objects, each with an `id`.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec

Behaviour = Literal["well", "refuses", "hangs"]


class _Record(msgspec.Struct):
    id: int


_DECODER = msgspec.json.Decoder(list[_Record])


@dataclass(slots=True, kw_only=True)
class Api:
    """What the target was sent so far, and how it behaves."""

    delay: float
    behaviour: Behaviour = "well"
    requests: int = 0
    refused: int = 0
    records: int = 0
    ids: set[int] = field(default_factory=set)
    first_at: float | None = None
    last_at: float | None = None

    def summary(self) -> dict[str, float | int | None]:
        """Return the counts; times are in monotonic seconds."""
        return {
            "requests": self.requests,
            "refused": self.refused,
            "records": self.records,
            "distinct": len(self.ids),
            "first_at": self.first_at,
            "last_at": self.last_at,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests, one after another."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.split(b" ", 2)
                body = await reader.readexactly(_content_length(head))
                status, answer = await self._answer(reader, method, path.decode(), body)
                writer.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%b" % (status, len(answer), answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, method: bytes, path: str, body: bytes) -> tuple[int, bytes]:
        if method == b"GET" and path == "/summary":
            return 200, json.dumps(self.summary()).encode()
        if path.startswith("/behaviour/"):
            wanted = path.removeprefix("/behaviour/")
            for behaviour in get_args(Behaviour):
                if behaviour == wanted:
                    self.behaviour = behaviour
                    return 200, b"{}"
            return 404, b"{}"
        if self.behaviour == "hangs":
            await reader.readexactly(1)  # until the client has had enough
        if self.behaviour == "refuses":
            self.refused += 1
            return 503, b"{}"
        if self.first_at is None:
            self.first_at = time.monotonic()
        if self.delay:
            await asyncio.sleep(self.delay)
        records = _DECODER.decode(body)
        self.requests += 1
        self.records += len(records)
        self.ids.update(record.id for record in records)
        self.last_at = time.monotonic()
        return 200, b"{}"


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _serve(api: Api, port: int) -> None:
    server = await asyncio.start_server(api.serve, "127.0.0.1", port, limit=2**20)
    async with server:
        await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.target", description="Take records and count them.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before an answer")
    parser.add_argument("--behaviour", choices=get_args(Behaviour), default="well")
    chosen = parser.parse_args(arguments)
    asyncio.run(_serve(Api(delay=chosen.delay, behaviour=chosen.behaviour), chosen.port))


if __name__ == "__main__":
    main()
