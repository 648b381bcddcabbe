"""Servers over real sockets that say what they are told, byte for byte."""

import contextlib
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def serving(
    serve: Callable[[socket.socket], object], *, connections: int | None = None, context: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve each connection by a function, then close it; after so many *connections* refuse more. Yield the URL."""
    threads, lock, still_open = list[threading.Thread](), threading.Lock(), set[socket.socket]()

    def attend(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.settimeout(10)
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            with connection:
                with lock:
                    still_open.add(connection)
                try:
                    serve(connection)
                finally:
                    with lock:
                        still_open.discard(connection)
                    connection.shutdown(socket.SHUT_RDWR)

    def listen() -> None:
        for served in itertools.count(1):
            try:
                connection, _ = listener.accept()
            except OSError:  # the end of the test
                return
            if served == connections:
                listener.close()
            threads.append(threading.Thread(target=attend, args=(connection,), daemon=True))
            threads[-1].start()

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}" if context is None else f"https://localhost:{port}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        with lock:
            for connection in still_open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for one in threads:
            one.join(10)


def _ends_with_the_connection(answer: bytes) -> bool:
    return not answer.startswith(b"HTTP/1.1") or b"Content-Length" not in answer


@contextlib.contextmanager
def saying(
    *answers: bytes,
    context: ssl.SSLContext | None = None,
    closes_after: Callable[[bytes], bool] = _ends_with_the_connection,
) -> Iterator[tuple[str, list[bytes]]]:
    """Serve one answer for each request in turn; yield the URL and what came, `b""` where a connection begins."""
    left, came = list(answers), list[bytes]()

    def serve(connection: socket.socket) -> None:
        came.append(b"")
        while left and (request := connection.recv(65_536)):
            came.append(request)
            answer = left.pop(0)
            connection.sendall(answer)
            if closes_after(answer):
                break

    with serving(serve, context=context) as url:
        yield url, came
