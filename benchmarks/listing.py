"""A target API that lists records, made as they are asked for.

`python -m benchmarks.listing --port 8901 --records 1000000` answers

    GET /orders?limit=1000&after=17    {"items": […], "next": "1017", "total": …}

It lacks every thousandth record, has another wrong (one field), and has some that the source has not got.
"""

import argparse
import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

PER = 1000
"""Of so many records one is missing, one stale, one extra."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What a target of *records* lists; the source has those from 1 to *records*."""

    records: int

    @property
    def each(self) -> int:
        """How many are missing; as many are stale, and as many extra."""
        return self.records // PER

    def page(self, after: int, limit: int) -> dict[str, Any]:
        """Return the page after the id *after*."""
        items: list[dict[str, Any]] = []
        for number in self._ids(after):
            if len(items) == limit:
                return {"items": items, "next": str(items[-1]["id"]), "total": self.total}
            items.append(record(number, wrong=number % PER == 2 and number <= self.records))
        return {"items": items, "next": None, "total": self.total}

    @property
    def total(self) -> int:
        """How many it lists."""
        return self.records - self.each + self.each

    def _ids(self, after: int) -> Iterator[int]:
        for number in range(after + 1, self.records + self.each + 1):
            if number % PER != 1 or number > self.each * PER:
                yield number


def record(number: int, *, wrong: bool = False) -> dict[str, Any]:
    """Return a record as the source has it too, unless it is *wrong*."""
    return {
        "id": number,
        "customer": number % 1000,
        "note": f"{number:032x}" * 4,
        "cents": number * 7 + wrong,
        "paid": number % 3 == 0,
        "rank": None if number % 5 == 0 else number % 11,
    }


async def _serve(listed: Listed, port: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                query = {name: values[0] for name, values in parse_qs(path.partition("?")[2]).items()}
                page = listed.page(int(query.get("after", "0")), int(query.get("limit", "1")))
                body = json.dumps(page).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.listing", description="List records.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--records", type=int, required=True)
    chosen = parser.parse_args(arguments)
    asyncio.run(_serve(Listed(records=chosen.records), chosen.port))


if __name__ == "__main__":
    main()
