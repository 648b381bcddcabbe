"""A target API over a real socket that does as it is told, and remembers what it was asked.

    with HttpApi() as api:
        api.script([Reply(status=503), Reply(status=200)])     # in order, then 200 for ever
        api.script(lambda request: Reply(drop="after"))        # or one by one

A request is *applied* where a real API would have changed its data: on a 2xx, unless the reply says otherwise.
"""

import contextlib
import errno
import gzip
import io
import json
import select
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What arrived."""

    number: int
    """From 0, in the order of arrival over all connections."""
    at: float
    """Monotonic seconds."""
    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    """As it arrived; `records` and `json` undo gzip."""

    @property
    def key(self) -> str | None:
        """Return the idempotency key."""
        return self.headers.get("idempotency-key")

    @property
    def json(self) -> Any:
        """Return the body, parsed."""
        return json.loads(gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body)

    @property
    def records(self) -> list[Any]:
        """Return the body's records: it is a list, or holds exactly one, or is a record itself."""
        document = self.json
        if isinstance(document, list):
            return document
        lists = [value for value in document.values() if isinstance(value, list)]
        return lists[0] if len(lists) == 1 else [document]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What to do with one request."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] = b""
    """Pieces of unknown number go out chunked: so a body may be without end."""
    delay: float = 0.0
    """Seconds before the answer."""
    hold: threading.Event | None = None
    """Withhold the answer until this is set, or the server is closed."""
    drop: Literal["before", "after"] | None = None
    """Close the connection, before or after applying the request, without an answer."""
    by: Literal["close", "reset", "half_close"] = "close"
    """How a connection is dropped: in order, by a TCP reset, or for sending alone, and then whatever comes is read."""
    interim: tuple[int, float] = (0, 0.0)
    """So many `102 Processing` before the answer, so many seconds apart."""
    head_pace: float | None = None
    """Send the status line and the headers byte by byte, so many seconds apart."""
    pace: float | None = None
    """Send the body byte by byte, so many seconds apart."""
    cut: int | None = None
    """Promise the whole body, send so many bytes of it, and close."""
    raw: bytes | None = None
    """Send this in place of an HTTP answer, and close."""
    idle: float | None = None
    """Close the connection unannounced after so many seconds without a request; 0 is right after the answer."""
    applies: bool | None = None
    """Default: if the status is 2xx."""
    applies_to: Collection[int] | None = None
    """The positions of the records that take effect, if not all."""
    applies_late: bool = False
    """Take effect after `delay` and `hold`, when the client may have given up and gone on."""

    @classmethod
    def json(cls, document: Any, *, status: int = 200, **more: Any) -> Self:
        """Return a reply with a JSON body."""
        return cls(
            status=status, body=json.dumps(document).encode(), headers={"Content-Type": "application/json"}, **more
        )


Script = Reply | Iterable[Reply] | Callable[[Request], Reply]


class HttpApi:
    """The server; it listens from the beginning to the end of its `with` block, or until `close`."""

    def __init__(self, script: Script = (), *, port: int = 0, keep: bool = True) -> None:
        """Listen on *port* (0: a free one); without *keep*, requests are counted and forgotten."""
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._keep = keep
        self._count = 0
        self._requests: list[Request] = []
        self._applied: list[Request] = []
        self.closing = threading.Event()
        self.script(script)
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="api", daemon=True)
        self._thread.start()

    def script(self, script: Script, *, then: Reply | None = None) -> None:
        """Answer with *script* from now on; after its last reply with *then*, by default 200."""
        last = then or Reply()
        if isinstance(script, Reply):
            function: Callable[[Request], Reply] = lambda _: script  # noqa: E731
        elif callable(script):
            function = script
        else:
            replies = iter(script)
            function = lambda _: next(replies, last)  # noqa: E731
        with self._lock:
            self._function, self._in_order = function, not callable(script)

    @property
    def port(self) -> int:
        """Return the port that it listens on."""
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        """Return the base URL, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Request]:
        """Return what has arrived so far."""
        with self._lock:
            return list(self._requests)

    @property
    def applied(self) -> list[Request]:
        """Return the requests that took effect, in that order."""
        with self._lock:
            return list(self._applied)

    @property
    def connections(self) -> int:
        """Return how many connections were ever opened."""
        return self._server.accepted

    def wait_for(self, count: int, *, seconds: float = 10.0) -> list[Request]:
        """Wait until *count* requests have arrived and return them; raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._count >= count, seconds):
                raise TimeoutError(f"{self._count} of {count} requests arrived in {seconds} s")
            return list(self._requests)

    def wait_until_left(self, *, seconds: float = 10.0) -> None:
        """Wait until no client is connected, so that nothing more of a dead one can arrive; raises TimeoutError."""
        if not self._server.wait_until_left(seconds):
            raise TimeoutError(f"a client is still connected after {seconds} s")

    def close(self) -> None:
        """Stop listening and close every connection."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, request: Request) -> tuple[Request, Reply]:
        """Note a request and find its reply. A function may block; replies in order are dealt out in order."""
        with self._arrived:
            request = replace(request, number=self._count)
            self._count += 1
            if self._keep:
                self._requests.append(request)
            self._arrived.notify_all()
            function = self._function
            if self._in_order:
                return request, function(request)
        return request, function(request)

    def _apply(self, request: Request, reply: Reply) -> None:
        """Note that *request* took effect, by *reply* perhaps not with all of its records."""
        if self._keep:
            with self._lock:
                self._applied.append(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], api: HttpApi) -> None:
        self.api = api
        self.accepted = 0
        self._open: set[socket.socket] = set()
        self._to_reset: set[socket.socket] = set()
        self._open_changed = threading.Condition()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Without the look-up of the host's full name that http.server does, which may be slow.
        _bind_in_the_end(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_changed:
            self._open.add(request)
            self.accepted += 1
        super().process_request(request, client_address)

    def reset(self, request: socket.socket) -> None:
        """Let a connection end by a TCP reset, which also throws away what the client has not read yet."""
        with self._open_changed:
            self._to_reset.add(request)

    def shutdown_request(self, request: Any) -> None:
        with self._open_changed:
            resets = request in self._to_reset
            self._to_reset.discard(request)
        if resets:
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_request(request)
        else:
            super().shutdown_request(request)
        with self._open_changed:
            self._open.discard(request)
            self._open_changed.notify_all()

    def wait_until_left(self, seconds: float) -> bool:
        with self._open_changed:
            return self._open_changed.wait_for(lambda: not self._open, seconds)

    def close_connections(self) -> None:
        with self._open_changed:
            still_open = list(self._open)
        for connection in still_open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is part of most scripts."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    wbufsize = -1  # one packet for head and body
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length) if length else b""
        if len(body) < length:  # the client died in mid-sentence: no API would act on that
            self.close_connection = True
            return
        arrived = Request(
            number=0,
            at=time.monotonic(),
            method=self.command,
            path=self.path,
            headers={name.lower(): value for name, value in self.headers.items()},
            body=body,
        )
        request, reply = self.server.api._take(arrived)
        if reply.drop == "before":
            self._drop(reply)
            return
        applies = reply.applies if reply.applies is not None else 200 <= reply.status < 300
        if applies and not reply.applies_late:
            self.server.api._apply(request, reply)
        if reply.delay:
            self.server.api.closing.wait(reply.delay)
        if reply.hold is not None:
            while not (reply.hold.wait(0.02) or self.server.api.closing.is_set() or self._is_left()):
                pass
        if applies and reply.applies_late:
            self.server.api._apply(request, reply)
        if reply.drop == "after":
            self._drop(reply)
            return
        if reply.raw is not None:
            self.wfile.write(reply.raw)
            self.close_connection = True
            return
        self._answer(reply)

    def _drop(self, reply: Reply) -> None:
        self.close_connection = True
        if reply.by == "reset":
            self.server.reset(self.connection)
        elif reply.by == "half_close":
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(65536):
                pass

    def _is_left(self) -> bool:
        """Whether the client has closed its end: no answer will be read any more."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        with contextlib.suppress(ConnectionError):
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        return True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _answer(self, reply: Reply) -> None:
        times, pace = reply.interim
        for _ in range(times):
            self.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            self.wfile.flush()
            if self.server.api.closing.wait(pace):
                return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if isinstance(reply.body, bytes):
            self.send_header("Content-Length", str(len(reply.body)))
            self._end_head(reply)
            for piece in self._pieces(reply, reply.body):
                self.wfile.write(piece)
        else:
            self.send_header("Transfer-Encoding", "chunked")
            self._end_head(reply)
            for piece in reply.body:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        if reply.idle == 0:
            self.close_connection = True
        elif reply.idle is not None:
            self.connection.settimeout(reply.idle)

    def _end_head(self, reply: Reply) -> None:
        if reply.head_pace is None:
            self.end_headers()
            return
        self.wfile, wire = io.BytesIO(), self.wfile
        self.end_headers()
        self.wfile, head = wire, self.wfile.getvalue()
        for piece in self._byte_by_byte(head, reply.head_pace):
            self.wfile.write(piece)

    def _pieces(self, reply: Reply, body: bytes) -> Iterable[bytes]:
        if reply.cut is not None:
            body = body[: reply.cut]
            self.close_connection = True
        return [body] if reply.pace is None else self._byte_by_byte(body, reply.pace)

    def _byte_by_byte(self, text: bytes, pace: float) -> Iterator[bytes]:
        for byte in text:
            yield bytes([byte])
            self.wfile.flush()
            if self.server.api.closing.wait(pace):
                return

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


# Scripts ------------------------------------------------------------------------------------------------------------


def refusing(bad: Collection[Any], *, status: int = 400, record_id: str = "id") -> Callable[[Request], Reply]:
    """Return a script that refuses any request with one of the records *bad*, without saying which."""

    def script(request: Request) -> Reply:
        return Reply(status=status if any(record[record_id] in bad for record in request.records) else 200)

    return script


def per_item(
    status_of: Callable[[Any], int | bool], *, status: int = 200, items: str = "results", record_id: str = "id"
) -> Callable[[Request], Reply]:
    """Return a script that answers for each record: `{"results": [{"id": …, "status": …}, …]}`."""

    def script(request: Request) -> Reply:
        results = [{"id": record[record_id], "status": status_of(record)} for record in request.records]
        return Reply.json({items: results}, status=status)

    return script


def _bind_in_the_end(server: socketserver.TCPServer, *, patience: float = 10.0) -> None:
    """Bind *server*; a port that it had before may be taken for a while by a client.

    While nothing listened on it, one that tried to connect to it may have been given it for its own end, and have met
    itself.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return socketserver.TCPServer.server_bind(server)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not server.server_address[1] or time.monotonic() > until:
                raise
            time.sleep(0.05)
