"""One kept connection to one target, without httpx in between: what most requests go through.

httpx is asked where a request would go, and what headers go with all of them; what it would send itself (through a
proxy of the environment, or a transport that a test gives it) it still does. For the rest its share of a request, some
0.4 ms of CPU, is more than all else that a hundred records cost; here it is a sixth of that. The framing is llhttp's,
which Node.js reads answers with (`httptools`); connecting, TLS and the deadline are the wire's.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import httpcore
import httptools
import httpx

from resources.http_wire import Wire, read_body, ssl_context

_LONGEST_URL = 65_536  # httpx's own limit
_LONGEST_HEAD = 100_000  # h11's
_KEPT_IDLE = 5.0  # seconds; httpx's own default
_AT_ONCE = 65_536
_WITHOUT_LENGTH = frozenset({"DELETE", "GET", "HEAD", "OPTIONS"})
_FIELD_VALUE = re.compile(rb"[\x21-\xff](?:[\x20-\xff\t]*[\x21-\xff])?|")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, its body up to a limit. Headers are as they were sent."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    truncated: bool


class DirectConnection:
    """Sends requests to one origin, one after another. Belongs to one thread; raises httpx's exceptions.

    A connection is used again if the target keeps it, nothing unasked came, and it was idle for 5 s at most.
    """

    def __init__(self, base_url: str, *, wire: Wire, headers: httpx.Headers) -> None:
        url = httpx.URL(base_url)
        self._host, self._tls = url.raw_host.decode("ascii"), url.scheme == "https"
        self._port = url.port or (443 if self._tls else 80)
        self._base = url.raw_path.rstrip(b"/")
        self._base_length = len(base_url)
        self._wire = wire
        self._every = httpx.Headers([(b"Host", url.netloc), *headers.raw])
        self._heads: dict[tuple[tuple[str, str], ...], bytes] = {}
        self._stream: httpcore.NetworkStream | None = None
        self._idle_since = 0.0

    @classmethod
    def for_client(cls, client: httpx.Client, base_url: str, *, wire: Wire) -> Self | None:
        """Return what takes *client*'s place for requests to *base_url*; None if they go by a proxy."""
        try:
            url = httpx.URL(base_url)
            if client._transport_for_url(url) is not client._transport:
                return None
            return cls(base_url, wire=wire, headers=client.headers)
        except httpx.InvalidURL:
            return None  # which is the client's to say

    def exchange(
        self, method: str, path: str, *, body: bytes | None, headers: Mapping[str, str], key: str, limit: int
    ) -> Reply:
        """Send one request under its idempotency *key* and read its answer, by the wire's deadline.

        *headers* are the same for many requests, and take the place of those that go with all. Of the answer's body no
        more than *limit* bytes are kept.
        """
        if self._base_length + len(path) > _LONGEST_URL:
            raise httpx.InvalidURL("URL too long")
        request = b"%b %b%b HTTP/1.1\r\n%bIdempotency-Key: %b\r\n" % (
            method.encode("ascii"),
            self._base,
            path.encode("ascii"),
            self._head(headers),
            key.encode("ascii"),
        )
        if body is not None or method not in _WITHOUT_LENGTH:
            request += b"Content-Length: %d\r\n" % len(body or b"")
        try:
            stream = self._connected()
            with suppress(httpcore.WriteError):  # it may have answered before it had read it all, and closed its ear
                stream.write(b"%b\r\n%b" % (request, body or b""))
            reply, reusable = _Reading(stream).reply(limit)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            self.close()
            raise _as_httpx(error) from error
        except BaseException:
            self.close()
            raise
        if reusable:
            self._idle_since = time.monotonic()
        else:
            self.close()
        return reply

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _connected(self) -> httpcore.NetworkStream:
        if self._stream is not None and (
            # Idle and readable: it was closed, or something came that nobody asked for.
            time.monotonic() - self._idle_since > _KEPT_IDLE or self._stream.get_extra_info("is_readable")
        ):
            self.close()
        if self._stream is None:
            stream = self._wire.connect_tcp(self._host, self._port)
            if self._tls:
                context = ssl_context()
                context.set_alpn_protocols(["http/1.1"])
                stream = stream.start_tls(context, server_hostname=self._host)
            self._stream = stream
        return self._stream

    def _head(self, headers: Mapping[str, str]) -> bytes:
        """Return the lines of the headers that are the same for many requests."""
        kind = tuple(headers.items())
        head = self._heads.get(kind)  # of a few kinds, and once an hour another token's
        if head is None:
            merged = httpx.Headers(self._every)
            merged.update(headers)
            head = b"".join(_line(name, value) for name, value in merged.raw)
            self._heads[kind] = head
        return head


def _line(name: bytes, value: bytes) -> bytes:
    if not _FIELD_VALUE.fullmatch(value):
        raise httpx.LocalProtocolError(f"Illegal header value {value!r}")
    return b"%b: %b\r\n" % (name, value)


def _as_httpx(error: Exception) -> httpx.TransportError:
    kind: type[httpx.TransportError] = getattr(httpx, type(error).__name__)
    return kind(str(error))


class _Reading:
    """Reads one answer. The parser calls the `on_…` methods."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream
        self._parser = httptools.HttpResponseParser(self)
        # As much as h11 puts up with: lines that end without a CR, and a length beside chunks.
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_chunked_length=True)
        self._headers: list[tuple[bytes, bytes]] = []
        self._status = 0
        self._pieces: list[bytes] = []
        self._has_head = self._complete = self._kept = self._unasked = False

    def reply(self, limit: int) -> tuple[Reply, bool]:
        """Return the answer, and whether the connection may be used again."""
        try:
            self._read_head()
            names = {name.lower() for name, _ in self._headers}
            if b"content-encoding" in names:
                answer = httpx.Response(self._status, headers=self._headers, stream=_Stream(self._chunks()))
                body, truncated = read_body(answer, limit=limit)
            else:
                body, truncated = self._read_body(limit)
        finally:
            del self._parser  # it holds this, and Python looks for such circles seldom while a drain is at work
        reusable = self._complete and self._kept and not self._unasked and not truncated
        return Reply(self._status, self._headers, body, truncated), reusable

    def _read_head(self) -> None:
        size = 0
        while not self._has_head:
            data = self._stream.read(_AT_ONCE)
            size += len(data)
            if not data:
                raise httpcore.RemoteProtocolError("Server disconnected without sending a response.")
            if size > _LONGEST_HEAD + _AT_ONCE:
                raise httpcore.RemoteProtocolError("the headers have no end")
            self._feed(data)

    def _read_body(self, limit: int) -> tuple[bytes, bool]:
        pieces: list[bytes] = []
        try:
            for piece in self._chunks():
                pieces.append(piece[:limit])
                limit -= len(piece)
                if limit < 0:
                    return b"".join(pieces), True
        except httpx.HTTPError:
            return b"".join(pieces), True
        return b"".join(pieces), False

    def _chunks(self) -> Iterator[bytes]:
        """Yield the body as it comes; raises httpx's exceptions."""
        try:
            while True:
                pieces, self._pieces = self._pieces, []
                yield from pieces
                if self._complete:
                    return
                data = self._stream.read(_AT_ONCE)
                if not data:
                    if self._has_length():
                        raise httpcore.RemoteProtocolError("the body ended before its end")
                    return  # without a length, its end is the connection's
                self._feed(data)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise _as_httpx(error) from error

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

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        if self._has_head and not self._complete:
            self._complete, self._kept = True, self._parser.should_keep_alive()


class _Stream(httpx.SyncByteStream):
    """A body for httpx to decode."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces
