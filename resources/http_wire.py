"""An HTTP client whose every request has one deadline, from connecting to the last byte of the answer.

`resources/http_direct.py` sends most requests of a drain over the same wire, without the client.
"""

import logging
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore
import httpx

_HEADERS = {"User-Agent": "distributary/0.1", "Accept": "application/json", "Accept-Encoding": "identity"}


class Wire(httpcore.NetworkBackend):
    """What a client does its network work through. It keeps one request's deadline, and what became of its connection.

    httpx's own time-outs are for each read and each write, so an answer that comes byte by byte never ends
    (encode/httpx, issue 1450). Here each gets what is left until the deadline: no thread, no timer. Belongs to one
    thread.
    """

    def __init__(self, network: httpcore.NetworkBackend | None = None) -> None:
        self._network = network or httpcore.SyncBackend()
        self._give_up_at = 0.0  # nothing is sent before `begin`
        self.connected = self.spoke = self.heard = False
        """Since `begin`: a connection was opened; bytes were given to one; bytes came back."""

    def begin(self, *, give_up_at: float) -> None:
        """Start a request, which must be over at *give_up_at*, in monotonic seconds."""
        self._give_up_at = give_up_at
        self.connected = self.spoke = self.heard = False

    @property
    def mute(self) -> bool:
        """Say whether the request went out on a connection from an earlier one, and not a byte came back."""
        return self.spoke and not self.connected and not self.heard

    def left(self, otherwise: type[httpcore.TimeoutException]) -> float:
        """Return the seconds until the deadline; raises *otherwise* if there are none."""
        left = self._give_up_at - time.monotonic()
        if left <= 0:
            raise otherwise
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline is never later
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Try the host's addresses one after another, each for its share of what is left.

        How long a name may be looked up is the resolver's own setting; it takes no time-out.
        """
        self.connected = True
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for untried in range(len(addresses), 0, -1):
            try:
                stream = self._network.connect_tcp(
                    addresses[-untried],
                    port,
                    timeout=self.left(httpcore.ConnectTimeout) / untried,
                    local_address=local_address,
                    socket_options=socket_options,
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if untried == 1:
                    raise
            else:
                return _Stream(stream, self)
        raise httpcore.ConnectError(f"{host} has no address")


class _Stream(httpcore.NetworkStream):
    """A connection that waits no longer than its wire's deadline, whatever each call would allow."""

    def __init__(self, stream: httpcore.NetworkStream, wire: Wire, *, layers_of_tls: int = 0) -> None:
        self._stream = stream
        self._wire = wire
        self._layers_of_tls = layers_of_tls
        # Within TLS within TLS, to a proxy, the socket's own `send` would go past the inner one.
        self._socket: socket.socket | None = stream.get_extra_info("socket") if layers_of_tls < 2 else None

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        data = self._stream.read(max_bytes, timeout=self._wire.left(httpcore.ReadTimeout))
        if data:
            self._wire.heard = True
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._wire.spoke = True
        if self._socket is None:
            self._stream.write(buffer, timeout=self._wire.left(httpcore.WriteTimeout))
            return
        # Not the stream's own `write`: its time-out is for each packet that a slow reader takes.
        unsent = memoryview(buffer)
        try:
            while unsent:
                self._socket.settimeout(self._wire.left(httpcore.WriteTimeout))
                unsent = unsent[self._socket.send(unsent) :]
        except TimeoutError as error:
            raise httpcore.WriteTimeout from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        try:
            left = self._wire.left(httpcore.ConnectTimeout)
        except httpcore.ConnectTimeout:
            self.close()  # as the stream does with any other failure here: nobody else knows of it yet
            raise
        stream = self._stream.start_tls(ssl_context, server_hostname, timeout=left)
        return _Stream(stream, self._wire, layers_of_tls=self._layers_of_tls + 1)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@cache
def ssl_context() -> ssl.SSLContext:
    """Read the certificates once: it takes longer than a request, and each lane has a client of its own."""
    return httpx.create_ssl_context()


def every_header(headers: Mapping[str, str]) -> httpx.Headers:
    """Return what goes with every request: *headers*, beside or in place of those that say who we are and so on."""
    every = httpx.Headers({"Connection": "keep-alive"} | _HEADERS)
    every.update(headers)  # whatever the case that a name is written in
    return every


def open_client(
    *, wire: Wire, headers: Mapping[str, str], timeout_seconds: float, transport: httpx.BaseTransport | None = None
) -> httpx.Client:
    """Return a client with one connection, over *wire*; it follows no redirect and keeps no cookie.

    *headers* go with every request, as `every_header` has them.
    """
    # It writes every URL down, the key in its query included.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    client = httpx.Client(
        headers=every_header(headers),
        timeout=httpx.Timeout(timeout_seconds),
        limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
        follow_redirects=False,
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),  # a repeat is the same bytes
        verify=ssl_context(),
        transport=transport,
        event_hooks={"response": [_hide_location]},
    )
    # httpcore takes a network backend, httpx passes none on. A transport of our own would lose the proxies that httpx
    # reads from the environment, so the pools that it made get theirs here; a test watches over the private names.
    for made in (client._transport, *client._mounts.values()):
        if isinstance(made, httpx.HTTPTransport):
            made._pool._network_backend = wire
    return client


def _hide_location(response: httpx.Response) -> None:
    """Keep httpx from reading where a redirect points, as it does though it follows none: an error if it is no URL."""
    response.extensions["headers"] = list(response.headers.raw)
    response.headers.pop("location", None)


def headers_as_sent(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer that a client of `open_client` had, its `Location` included."""
    headers: list[tuple[bytes, bytes]] = response.extensions["headers"]
    return headers


def read_body(response: httpx.Response, *, limit: int) -> tuple[bytes, bool]:
    """Return the body up to *limit* bytes, and whether it was cut: by its length, the deadline, or the connection.

    The status is known by now, so a body that breaks off is an answer all the same.
    """
    chunks: list[bytes] = []
    try:
        for chunk in response.iter_bytes():
            chunks.append(chunk[:limit])
            limit -= len(chunk)
            if limit < 0:
                # Leaving the stream unread closes the connection; the next request opens another.
                return b"".join(chunks), True
    except (httpx.HTTPError, httpx.StreamError):
        return b"".join(chunks), True
    return b"".join(chunks), False
