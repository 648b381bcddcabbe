"""The short way to a target sends and hears what httpx would, checks certificates, and never answers with leftovers.

What the network may do to it is in test_http_target.py, whose requests go this way too.
"""

import contextlib
import gc
import gzip
import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.target import Answer, NoAnswer
from pipelines_tests.fakes.http_server import HttpApi
from pipelines_tests.resources.raw_server import saying
from resources import http_direct
from resources.http_target import Endpoint, HttpTargetClient

KEY = UUID("0b0f6a52-3f0b-5f0e-9d5a-7d1f6c1b3a11")
POST = HttpRequest(method="POST", path="/rows", body=b'[{"id": 1}]', content_type="application/json")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def answers(url: str, *, times: int = 1, request: HttpRequest = POST, timeout: float = 5.0) -> list[Answer | NoAnswer]:
    client = HttpTargetClient(Endpoint(base_url=url, timeout_seconds=timeout))
    with contextlib.closing(client):
        assert client._direct is not None
        return [client.send(request, key=KEY) for _ in range(times)]


def said(answer: Answer | NoAnswer) -> tuple[int, bytes, bool]:
    assert isinstance(answer, Answer), answer
    return answer.status, answer.body, answer.truncated


@pytest.mark.parametrize(
    "request_",
    [
        POST,
        HttpRequest(method="DELETE", path="/rows/a%2Fb?x=%26"),
        HttpRequest(method="DELETE", path="/rows", body=b'["1"]', content_type="application/json"),
        HttpRequest(method="POST", path="/rows/1/archive"),
        HttpRequest(method="PUT", path="/rows", body=b"", content_type="text/plain"),
        HttpRequest(method="PATCH", path="/rows", body=b"\x1f\x8b", content_type="x/y", compressed=True),
    ],
    ids=["post", "delete", "delete with a body", "post without a body", "an empty body", "compressed"],
)
def test_the_target_is_sent_what_httpx_would_send(request_: HttpRequest) -> None:
    with HttpApi() as api:
        headers = {"X-Tenant": "7", "User-Agent": "mine/1", "Content-Type": "a/b"}
        client = HttpTargetClient(Endpoint(base_url=f"{api.url}/v1", headers=headers, query="key=a%20b"))
        with contextlib.closing(client):
            client.send(request_, key=KEY)
            assert client._direct is not None
            client._direct.close()
            client._direct = None
            client.send(request_, key=KEY)

    direct, by_httpx = api.requests
    assert (direct.method, direct.path, direct.body) == (by_httpx.method, by_httpx.path, by_httpx.body)
    assert dict(direct.headers) == dict(by_httpx.headers)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_it_is_not_taken_where_a_proxy_is_to_be_used(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "inside.test")
    for url, is_direct in [("http://api.test", False), ("http://inside.test", True)]:
        with contextlib.closing(HttpTargetClient(Endpoint(base_url=url))) as client:
            assert (client._direct is not None) == is_direct


def test_a_proxy_for_others_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with HttpApi() as api, contextlib.closing(HttpTargetClient(Endpoint(base_url=api.url))) as client:
        assert client._direct is not None
        assert isinstance(client.send(POST, key=KEY), Answer)


def test_what_goes_without_httpx_makes_no_client_of_it() -> None:
    """Eight lanes would make eight, in the time of a hundred requests."""
    with HttpApi() as api, contextlib.closing(HttpTargetClient(Endpoint(base_url=api.url))) as client:
        client.send(POST, key=KEY)
        assert client._client is None


def test_certificates_are_read_before_a_request_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("resources.http_direct.ssl_context", lambda: read.append("read"))
    HttpTargetClient(Endpoint(base_url="http://api.test")).close()
    assert read == []

    HttpTargetClient(Endpoint(base_url="https://api.test")).close()
    assert read == ["read"]


@pytest.mark.parametrize(
    ("answer", "heard"),
    [
        (b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + OK, (200, b"ok", False)),
        (CHUNKED + b"1\r\no\r\n1;x=y\r\nk\r\n0\r\nT: 1\r\n\r\n", (200, b"ok", False)),
        (CHUNKED + b"1\r\no\r\n", (200, b"o", True)),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", (200, b"until the end", False)),
        (b"HTTP/1.1 200\nContent-Length: 2\n\nok", (200, b"ok", False)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"", False)),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxxx", (101, b"", False)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", (200, b"ok", True)),
    ],
    ids=["interim", "chunked", "chunked, broken off", "no length", "bare line feeds", "204", "101", "broken off"],
)
def test_answers_are_read_as_they_are_framed(answer: bytes, heard: tuple[int, bytes, bool]) -> None:
    with saying(answer) as (url, _):
        assert said(*answers(url)) == heard


@pytest.mark.parametrize(
    "first",
    [
        OK + b"HTTP/1.1 500 Not yours\r\nContent-Length: 0\r\n\r\n",
        OK + b"garbage",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=["another answer", "garbage", "close", "HTTP/1.0"],
)
def test_what_comes_after_an_answer_is_not_taken_for_the_next(first: bytes) -> None:
    with saying(first, b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n") as (url, came):
        one, two = answers(url, times=2)

    assert said(one) == (200, b"ok", False)
    assert said(two) == (201, b"", False)
    assert came.count(b"") == 2


def test_what_comes_unasked_between_requests_is_nobodys_answer() -> None:
    """Else it would stand for the next request, which may have been refused."""
    unasked = threading.Event()

    def serve() -> None:
        for _ in range(2):
            connection, _address = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(OK)
                unasked.wait(5)
                with contextlib.suppress(OSError):
                    connection.sendall(b"HTTP/1.1 500 Not yours\r\nContent-Length: 0\r\n\r\n")
                    connection.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        client = HttpTargetClient(Endpoint(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}"))
        with contextlib.closing(client):
            first = client.send(POST, key=KEY)
            unasked.set()
            assert client._direct is not None
            assert client._direct._stream is not None
            select.select([client._direct._stream.get_extra_info("socket")], [], [], 5)
            second = client.send(POST, key=KEY)
        thread.join(10)

    assert (said(first), said(second)) == ((200, b"ok", False), (200, b"ok", False))


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpApi() as api:
        answers(api.url, times=3)
        assert api.connections == 1
        monkeypatch.setattr(http_direct, "_KEPT_IDLE", -1.0)
        answers(api.url, times=3)
        assert api.connections == 1 + 3


def test_a_request_leaves_nothing_for_the_garbage_collector() -> None:
    """A drain has it look seldom: a circle for each request was 5 MB of a million changes."""
    zipped = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 22\r\n\r\n" + gzip.compress(b"ok")
    for answer in (OK, zipped):
        with saying(*[answer] * 20) as (url, _), contextlib.closing(HttpTargetClient(Endpoint(base_url=url))) as client:
            client.send(POST, key=KEY)
            gc.collect()
            gc.disable()
            try:
                for _ in range(10):
                    client.send(POST, key=KEY)
                left = gc.collect()
            finally:
                gc.enable()
        assert left < 10


def test_a_header_that_would_be_two_is_not_sent() -> None:
    """A secret that was read with its line break."""
    with HttpApi() as api:
        client = HttpTargetClient(Endpoint(base_url=api.url, headers={"Authorization": "Bearer x\r\nX-Admin: 1"}))
        with contextlib.closing(client):
            answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert "Illegal header value" in answer.reason
    assert api.requests == []


# Certificates ---------------------------------------------------------------------------------------------------------


def test_a_certificate_that_is_trusted_and_for_the_host_will_do(
    certified: Callable[[str], tuple[ssl.SSLContext, Path]], trusting: Callable[[Path], None]
) -> None:
    context, certificates = certified("localhost")
    trusting(certificates)
    with saying(OK, OK, context=context) as (url, came):
        first, second = answers(url, times=2)

    assert (said(first), said(second)) == ((200, b"ok", False), (200, b"ok", False))
    assert [bool(request) for request in came] == [False, True, True]


@pytest.mark.parametrize(("host", "trusted"), [("localhost", False), ("elsewhere.test", True)])
def test_a_certificate_that_is_not_trusted_or_of_another_host_gets_no_request(
    certified: Callable[[str], tuple[ssl.SSLContext, Path]],
    trusting: Callable[[Path], None],
    host: str,
    trusted: bool,
) -> None:
    context, certificates = certified(host)
    if trusted:
        trusting(certificates)
    with saying(OK, context=context) as (url, came):
        (answer,) = answers(url)

    assert isinstance(answer, NoAnswer)
    assert not answer.may_have_arrived
    assert "certificate" in answer.reason.lower()
    assert not any(came)


def test_httpx_is_asked_for_proxies_by_a_name_that_holds() -> None:
    """It is private: who raises httpx sees here whether it is still there."""
    with httpx.Client() as client:
        assert client._transport_for_url(httpx.URL("http://api.test")) is client._transport
