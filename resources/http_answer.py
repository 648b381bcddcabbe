"""Read one answer, as its bytes come: whoever has them gives them, and is told when the answer is over.

The framing is llhttp's, which Node.js reads answers with (`httptools`). A body that is encoded is httpx's to decode.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import httpcore
import httptools
import httpx
import msgspec

from pipelines.delivery.target import Answer
from resources.http_wire import read_body
from resources.redaction import redact

AT_ONCE = 65_536
"""Bytes that should be read at once."""
_LONGEST_HEAD = 100_000  # h11's


class Reply(msgspec.Struct, frozen=True):
    """An answer, its body up to a limit. Headers are as they were sent."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    truncated: bool


def answer_of(reply: Reply, secrets: tuple[bytes, ...], started: float) -> Answer:
    """Return *reply* to a request of *started*, in monotonic seconds, without *secrets*."""
    return Answer(
        status=reply.status,
        headers=_Headers(reply.headers, secrets),
        body=redact(reply.body, secrets),
        truncated=reply.truncated,
        seconds=time.monotonic() - started,
    )


class _Headers(Mapping[str, str]):
    """Headers by their names in lower case; what comes more than once is one, with commas. Few are ever looked at."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]], secrets: tuple[bytes, ...]) -> None:
        self._raw, self._secrets = raw, secrets

    @cached_property
    def _readable(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for raw_name, raw_value in self._raw:
            name = raw_name.decode("latin-1").lower()
            value = redact(raw_value, self._secrets).decode("utf-8", "replace")
            found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def __getitem__(self, name: str) -> str:
        return self._readable[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readable)

    def __len__(self) -> int:
        return len(self._readable)

    def __repr__(self) -> str:
        return repr(self._readable)


class Reading:
    """One answer on its way. It must be closed. The parser calls the `on_…` methods."""

    def __init__(self, limit: int) -> None:
        """Keep no more than *limit* bytes of the body."""
        self._limit = limit
        self._parser = httptools.HttpResponseParser(self)
        # As much as h11 puts up with: lines that end without a CR, and a length beside chunks.
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_chunked_length=True)
        self._headers: list[tuple[bytes, bytes]] = []
        self._status = self._before_head = self._body_size = 0
        self._pieces: list[bytes] = []
        self._has_head = self._complete = self._kept = self._unasked = self._cut = False

    def take(self, data: bytes) -> bool:
        """Take what came, nothing at the connection's end; say whether the answer is over.

        Raises httpcore.RemoteProtocolError if there will be no answer. Once its status is known, there is one.
        """
        if not data:
            if not self._has_head:
                raise httpcore.RemoteProtocolError("Server disconnected without sending a response.")
            self._cut |= self._has_length()  # without a length, its end is the connection's
            return True
        if not self._has_head:
            self._before_head += len(data)
            if self._before_head > _LONGEST_HEAD + AT_ONCE:
                raise httpcore.RemoteProtocolError("the headers have no end")
        try:
            self._feed(data)
        except httpcore.RemoteProtocolError:
            if not self.break_off():
                raise
            return True
        self._cut |= self._body_size > self._limit
        return self._complete or self._cut

    def break_off(self) -> bool:
        """Note that nothing more will come; say whether what came is an answer all the same."""
        self._cut |= self._has_head
        return self._has_head

    def reply(self) -> tuple[Reply, bool]:
        """Return the answer, and whether the connection may be used again."""
        if any(name.lower() == b"content-encoding" for name, _ in self._headers):
            answer = httpx.Response(self._status, headers=self._headers, stream=_Body(self._pieces))
            body, truncated = read_body(answer, limit=self._limit)
        else:
            body, truncated = b"".join(self._pieces)[: self._limit], False
        truncated |= self._cut
        reusable = self._complete and self._kept and not self._unasked and not truncated
        return Reply(self._status, self._headers, body, truncated), reusable

    def close(self) -> None:
        """Let go of the parser: it holds this, and Python looks for such circles seldom while a drain is at work."""
        del self._parser

    def _has_length(self) -> bool:
        return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self._headers)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._complete, self._kept = True, False
        except httptools.HttpParserError as error:
            if not self._complete:
                raise httpcore.RemoteProtocolError(str(error) or type(error).__name__) from None
            self._unasked = True

    def on_message_begin(self) -> None:
        """Note what comes after the answer; before it there may be interim ones."""
        self._unasked |= self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header of the answer; not of its trailer."""
        if not self._has_head:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Tell an interim answer (1xx) from the one that was asked for."""
        status = self._parser.get_status_code()
        if self._has_head:
            return
        if status >= 200 or status == 101:
            self._status, self._has_head = status, True
        else:
            self._headers.clear()

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        if not self._complete:
            self._pieces.append(data)
            self._body_size += len(data)

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        if self._has_head and not self._complete:
            self._complete, self._kept = True, self._parser.should_keep_alive()


class _Body(httpx.SyncByteStream):
    """A body for httpx to decode."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces)
