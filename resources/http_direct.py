"""One kept connection to one target, without httpx in between: what most requests go through.

What httpx would send by a proxy of the environment, or a transport that a test gives it, it still does, and it says
which that is. For the rest its share of a request, some 0.4 ms of CPU, is more than all else that a hundred records
cost; here it is a sixth of that. Answers are read by
`resources/http_answer.py`; connecting, TLS and the deadline are the wire's.
"""

import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import closing, suppress

import httpcore
import httpx

from resources.http_answer import AT_ONCE, Reading, Reply
from resources.http_wire import Wire, ssl_context

_LONGEST_URL = 65_536  # httpx's own limit
_KEPT_IDLE = 5.0  # seconds; httpx's own default
NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a socket that does not wait says if it would have to."""
_WITHOUT_LENGTH = frozenset({"DELETE", "GET", "HEAD", "OPTIONS"})
_FIELD_VALUE = re.compile(rb"[\x21-\xff](?:[\x20-\xff\t]*[\x21-\xff])?|")


class DirectConnection:
    """Sends requests to one origin, one after another. Belongs to one thread at a time; raises httpx's exceptions.

    A connection is used again if the target keeps it, nothing unasked came, and it was idle for 5 s at most.
    """

    def __init__(self, base_url: str, *, wire: Wire, headers: httpx.Headers) -> None:
        url = httpx.URL(base_url)
        self._host, self._tls = url.raw_host.decode("ascii"), url.scheme == "https"
        self._port = url.port or (443 if self._tls else 80)
        if self._tls:
            ssl_context()  # which takes a while once, and not out of the first request's time
        self._base = url.raw_path.rstrip(b"/")
        self._base_length = len(base_url)
        self._wire = wire
        self._every = httpx.Headers([(b"Host", url.netloc), *headers.raw])
        self._heads: dict[tuple[tuple[str, str], ...], bytes] = {}
        self._stream: httpcore.NetworkStream | None = None
        self._idle_since = 0.0

    def exchange(
        self, method: str, path: str, *, body: bytes | None, headers: Mapping[str, str], key: str, limit: int
    ) -> Reply:
        """Send one request under its idempotency *key* and read its answer, by the wire's deadline.

        *headers* are the same for many requests, and take the place of those that go with all. Of the answer's body no
        more than *limit* bytes are kept.
        """
        request = self.bytes_of(method, path, body=body, headers=headers, key=key)
        try:
            stream = self._connected()
            with suppress(httpcore.WriteError):  # it may have answered before it had read it all, and closed its ear
                stream.write(request)
            reply, reusable = _read(stream, limit)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            self.close()
            raise _as_httpx(error) from error
        except BaseException:
            self.close()
            raise
        self.ended(reusable=reusable)
        return reply

    def bytes_of(self, method: str, path: str, *, body: bytes | None, headers: Mapping[str, str], key: str) -> bytes:
        """Return a request as it is sent; raises httpx.InvalidURL and httpx.LocalProtocolError."""
        if self._base_length + len(path) > _LONGEST_URL:
            raise httpx.InvalidURL("URL too long")
        head = b"%b %b%b HTTP/1.1\r\n%bIdempotency-Key: %b\r\n" % (
            method.encode("ascii"),
            self._base,
            path.encode("ascii"),
            self._head(headers),
            key.encode("ascii"),
        )
        if body is None:
            return head + (b"\r\n" if method in _WITHOUT_LENGTH else b"Content-Length: 0\r\n\r\n")
        return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)

    def kept_socket(self) -> socket.socket | None:
        """Return the kept connection's socket, for who sends and reads by itself and then says that it `ended`.

        None if there is no connection that may be used again. The socket does not wait.
        """
        if self._stream is None or time.monotonic() - self._idle_since > _KEPT_IDLE:
            return None
        found: socket.socket = self._stream.get_extra_info("socket")
        if found.gettimeout() != 0.0:
            found.setblocking(False)
        try:
            found.recv(1)
        except NOT_YET:
            return found
        except OSError:
            pass
        self.close()  # it was closed, or something came that nobody asked for
        return None

    def ended(self, *, reusable: bool) -> None:
        """Note that an answer was read, and keep the connection if it is *reusable*."""
        if reusable:
            self._idle_since = time.monotonic()
        else:
            self.close()

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


def _read(stream: httpcore.NetworkStream, limit: int) -> tuple[Reply, bool]:
    """Read one answer to its end; return it, and whether the connection may be used again."""
    with closing(Reading(limit)) as reading:
        try:
            while not reading.take(stream.read(AT_ONCE)):
                pass
        except (httpcore.TimeoutException, httpcore.NetworkError):
            if not reading.break_off():
                raise
        return reading.reply()
