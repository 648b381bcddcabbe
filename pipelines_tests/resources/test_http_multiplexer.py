"""Requests from one thread come to what the blocking client's would, and hold nobody up; over real sockets."""

import contextlib
import gc
import gzip
import itertools
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

import httpx
import pytest

from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.target import Answer, NoAnswer
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.resources.raw_server import saying, serving
from resources import http_direct
from resources.http_multiplexer import Ended, Flight, HttpMultiplexer, StillOut
from resources.http_target import Endpoint, HttpTargetClient
from resources.oauth import Granted, TokenSource, Unavailable

pytestmark = pytest.mark.timeout(60)

KEY = UUID("0b0f6a52-3f0b-5f0e-9d5a-7d1f6c1b3a11")
POST = HttpRequest(method="POST", path="/rows", body=b'[{"id": 1}]', content_type="application/json")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ZIPPED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
MANY = b"0123456789abcdef" * 500_000  # more than two sockets hold, on their own machine too

Certified = Callable[[str], tuple[ssl.SSLContext, Path]]


@pytest.fixture
def multiplexer() -> Iterator[HttpMultiplexer]:
    with contextlib.closing(HttpMultiplexer()) as multiplexer:
        yield multiplexer


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with HttpApi() as api:
        yield api


@pytest.fixture
def tls(certified: Certified, trusting: Callable[[Path], None]) -> ssl.SSLContext:
    """Return a server's context that clients trust."""
    context, certificates = certified("localhost")
    trusting(certificates)
    return context


def new_client(url: str, **more: Any) -> HttpTargetClient:
    return HttpTargetClient(Endpoint(base_url=url, **{"timeout_seconds": 10.0, **more}))


@contextlib.contextmanager
def connected(url: str, **more: Any) -> Iterator[HttpTargetClient]:
    """Yield a client with a kept connection, by a first request."""
    with contextlib.closing(new_client(url, **more)) as client:
        first = client.send(POST, key=KEY)
        assert isinstance(first, Answer), first
        assert client._direct is not None
        assert client._direct._stream is not None
        yield client


def socket_of(client: HttpTargetClient) -> socket.socket:
    assert client._direct is not None
    assert client._direct._stream is not None
    found: socket.socket = client._direct._stream.get_extra_info("socket")
    return found


def flight_of(multiplexer: HttpMultiplexer, client: HttpTargetClient) -> Flight:
    return multiplexer._flights[socket_of(client).fileno()][1]


def wait_for_bytes(client: HttpTargetClient) -> None:
    """Wait until something lies in the client's socket, be it the end."""
    assert select.select([socket_of(client)], [], [], 10)[0]


def wait_until(multiplexer: HttpMultiplexer, true: Callable[[], bool]) -> None:
    """Go on until something is *true*; nothing may end before."""
    until = time.monotonic() + 10
    while not true():
        assert multiplexer.ended(0.01) == []
        assert time.monotonic() < until


def ended(multiplexer: HttpMultiplexer, *lanes: int) -> list[Ended]:
    """Wait for just these lanes; return what became of each."""
    found: dict[int, Ended] = {}
    until = time.monotonic() + 30
    while len(found) < len(lanes):
        assert time.monotonic() < until
        for lane, what in multiplexer.ended(None):
            assert lane in lanes
            assert lane not in found
            found[lane] = what
    return [found[lane] for lane in lanes]


def carried(multiplexer: HttpMultiplexer, client: HttpTargetClient, request: HttpRequest = POST) -> Ended:
    assert multiplexer.begin(0, client, request, key=KEY)
    (what,) = ended(multiplexer, 0)
    return what


def in_the_lanes_way(multiplexer: HttpMultiplexer, client: HttpTargetClient, request: HttpRequest) -> Answer | NoAnswer:
    """Do as a lane does: what cannot go without the client, or broke without a word, is the client's to send."""
    if multiplexer.begin(0, client, request, key=KEY):
        (what,) = ended(multiplexer, 0)
        if what is not None:
            return what
    return client.send(request, key=KEY)


def said(answer: Ended) -> tuple[int, bytes, bool]:
    assert isinstance(answer, Answer), answer
    return answer.status, answer.body, answer.truncated


def meaning(answer: Ended) -> tuple[int, bytes, bool, Mapping[str, str]] | tuple[str, bool]:
    """Return all of it but the time."""
    if isinstance(answer, NoAnswer):
        return answer.reason, answer.may_have_arrived
    return *said(answer), dict(answer.headers) if isinstance(answer, Answer) else {}


def post(body: bytes) -> HttpRequest:
    return HttpRequest(method="POST", path="/rows", body=body, content_type="text/plain")


def whole_request(connection: socket.socket) -> bytes:
    """Read a request to the end of its body and return that; raises OSError if it ends before."""
    came = bytearray()
    while b"\r\n\r\n" not in came:
        came += _more(connection)
    head, _, body = bytes(came).partition(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    pieces, missing = [body], length - len(body)
    while missing:
        pieces.append(_more(connection))
        missing -= len(pieces[-1])
    return b"".join(pieces)


def _more(connection: socket.socket, most: int = 65_536) -> bytes:
    data = connection.recv(min(most, 65_536))
    if not data:
        raise ConnectionAbortedError
    return data


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# Alike ----------------------------------------------------------------------------------------------------------------


def both_ways(
    answer: bytes, *, closes: bool, timeout: float = 10.0, request: HttpRequest = POST
) -> list[tuple[Any, Any, list[bytes]]]:
    """Have *answer* as the second of three on a connection, sent by the client and then by the multiplexer.

    Return for each what the second and the third came to, and what the target was sent over which connections.
    """
    found = []
    for multiplexed in (False, True):
        with (
            saying(OK, answer, CREATED, CREATED, closes_after=lambda said: closes and said is answer) as (url, came),
            connected(url, timeout_seconds=timeout, max_response_bytes=1000, secrets=(b"s3cr3t",)) as client,
            contextlib.closing(HttpMultiplexer()) as multiplexer,
        ):
            if multiplexed:
                assert client.depart(request, key=KEY) is not None
                second = in_the_lanes_way(multiplexer, client, request)
            else:
                second = client.send(request, key=KEY)
            third = client.send(POST, key=KEY)
            host = url.removeprefix("http://").encode()
            found.append((meaning(second), meaning(third), [sent.replace(host, b"target") for sent in came]))
    return found


@pytest.mark.parametrize(
    ("answer", "closes", "connections"),
    [
        (OK, False, 1),
        (b"HTTP/1.1 503 No\r\nX-A: of s3cr3t\r\nX-B: 1\r\nx-b: 2\r\nContent-Length: 9\r\n\r\nno s3cr3t", False, 1),
        (b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + OK, False, 1),
        (CHUNKED + b"1\r\no\r\n1;x=y\r\nk\r\n0\r\nT: 1\r\n\r\n", False, 1),
        (CHUNKED + b"1\r\no\r\n", True, 2),
        (CHUNKED + b"1\r\no\r\nx\r\n", False, 2),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", True, 2),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", True, 2),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False, 2),
        (b"HTTP/1.1 200\nContent-Length: 2\n\nok", False, 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, 1),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", False, 1),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxxx", False, 2),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", False, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", True, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nok", False, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nok", False, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", False, 1),
        (OK + CREATED, False, 2),
        (OK + b"garbage", False, 2),
        (ZIPPED % (len(gzip.compress(b"ok")), gzip.compress(b"ok")), False, 1),
        (ZIPPED % (7, b"no gzip"), False, 2),
        (ZIPPED % (len(gzip.compress(b"x" * 5000)), gzip.compress(b"x" * 5000)), False, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000, False, 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001, False, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n" + b"x" * 900_000, False, 2),
        (b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 1_000_000, False, 2),
        (b"HTTP/1.1 102 P\r\n\r\n" * 50_000, False, 2),
        (b"HTTP/1.1 102 P\r\n\r\n", True, 2),
        (b"HTTP/1.1 banana\r\n\r\n", False, 2),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False, 2),
        (b"\x00" * 100, False, 2),
        (b"HTTP/1.1 20", True, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Le", True, 2),
        (b"", True, 2),
    ],
    ids=[
        "plain",
        "secrets",
        "interim",
        "chunked",
        "chunked, broken off",
        "chunked, then garbage",
        "no length",
        "HTTP/1.0, no length",
        "HTTP/1.0",
        "bare line feeds",
        "204",
        "304",
        "101",
        "close",
        "length too long",
        "length too short",
        "two lengths",
        "length and chunks",
        "another answer",
        "garbage after it",
        "gzip",
        "no gzip",
        "gzip that is longer than the limit",
        "as long as the limit",
        "longer than the limit",
        "much longer than the limit",
        "endless header",
        "endless interim",
        "interim alone",
        "no status",
        "SSH",
        "zeros",
        "half a status",
        "half a head",
        "nothing",
    ],
)
def test_an_answer_is_the_same_either_way_and_the_connection_kept_alike(
    answer: bytes, closes: bool, connections: int
) -> None:
    by_client, multiplexed = both_ways(answer, closes=closes)

    assert multiplexed == by_client
    assert multiplexed[2].count(b"") == connections


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 102 P\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok",
        CHUNKED + b"2\r\nok\r\n",
    ],
    ids=["interim", "half a head", "half a body", "half of the chunks"],
)
def test_an_answer_that_stops_is_the_same_either_way(answer: bytes) -> None:
    by_client, multiplexed = both_ways(answer, closes=False, timeout=0.5)

    assert multiplexed == by_client
    assert multiplexed[2].count(b"") == 2


@pytest.mark.parametrize(
    "request_",
    [
        POST,
        HttpRequest(method="DELETE", path="/rows/a%2Fb?x=%26"),
        HttpRequest(method="POST", path="/rows/1/archive"),
        HttpRequest(method="PUT", path="/rows", body=b"", content_type="text/plain"),
        HttpRequest(method="PATCH", path="/rows", body=b"\x1f\x8b", content_type="x/y", compressed=True),
    ],
    ids=["post", "delete", "post without a body", "an empty body", "compressed"],
)
def test_the_target_is_sent_the_same_bytes_either_way(request_: HttpRequest, multiplexer: HttpMultiplexer) -> None:
    headers = {"Authorization": "Bearer s3cr3t", "Content-Type": "a/b"}
    with saying(OK, OK, OK) as (url, came), connected(f"{url}/v1", headers=headers, query="key=a%20b") as client:
        client.send(request_, key=KEY)
        assert said(carried(multiplexer, client, request_)) == (200, b"ok", False)

    assert came[3] == came[2]
    assert b"Idempotency-Key: %b\r\n" % str(KEY).encode() in came[3]


@pytest.mark.parametrize(
    "request_",
    [
        HttpRequest(method="DELETE", path="/rows/" + "x" * 100_000),
        HttpRequest(method="DELETE", path="/rows/ä"),
        HttpRequest(method="POST", path="/rows", body=b"", content_type="a\r\nX-Admin: 1"),
    ],
    ids=["too long", "not of ASCII", "two headers"],
)
def test_what_cannot_be_sent_is_the_clients_to_explain(request_: HttpRequest, multiplexer: HttpMultiplexer) -> None:
    with saying(OK, OK) as (url, came), connected(url) as client:
        assert not multiplexer.begin(0, client, request_, key=KEY)
        assert isinstance(client.send(request_, key=KEY), Answer | NoAnswer)
        assert len(came) == 2


# Left to the client ---------------------------------------------------------------------------------------------------


def test_without_a_kept_connection_nothing_is_sent(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    with contextlib.closing(new_client(api.url)) as client:
        assert not multiplexer.begin(0, client, POST, key=KEY)
        assert multiplexer.ended(0) == []

    assert (api.requests, api.connections) == ([], 0)


class Tokens:
    """An endpoint that gives one token after another."""

    def __init__(self, *, lasting: float = 3600.0) -> None:
        self.asked, self.unwell, self._lasting = 0, False, lasting
        self.source = TokenSource(self.ask)

    def ask(self) -> Granted | Unavailable:
        if self.unwell:
            return Unavailable(reason="later")
        self.asked += 1
        return Granted(access_token=f"t0ken-{self.asked}", expires_in=self._lasting)


def test_a_token_that_has_to_be_asked_for_is_the_clients_to_ask_for(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    tokens = Tokens()
    with connected(api.url) as kept, contextlib.closing(new_client(api.url, tokens=tokens.source)) as client:
        client._direct, kept._direct = kept._direct, client._direct
        assert not multiplexer.begin(0, client, POST, key=KEY)
        client._direct, kept._direct = kept._direct, client._direct

    assert (len(api.requests), tokens.asked) == (1, 0)


def test_a_token_that_is_at_hand_goes_with_the_request_and_is_redacted(
    api: HttpApi, multiplexer: HttpMultiplexer
) -> None:
    tokens = Tokens()
    api.script([Reply(), Reply(body=b"you said t0ken-1")])
    with connected(api.url, tokens=tokens.source) as client:
        assert said(carried(multiplexer, client)) == (200, b"you said [redacted]", False)

    assert [request.headers["authorization"] for request in api.requests] == ["Bearer t0ken-1"] * 2
    assert tokens.asked == 1


def test_a_token_that_is_refused_is_the_clients_to_renew(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    tokens = Tokens()
    with connected(api.url, tokens=tokens.source) as client:
        api.script(lambda request: Reply(status=401 if request.headers["authorization"].endswith("-1") else 200))
        assert carried(multiplexer, client) is None
        assert said(client.send(POST, key=KEY))[0] == 200
        assert said(carried(multiplexer, client))[0] == 200

    sent = [request.headers["authorization"].removeprefix("Bearer t0ken-") for request in api.requests]
    assert sent == ["1", "1", "2", "2"]  # what was refused once is not tried again
    assert (tokens.asked, api.connections) == (2, 1)


def test_a_token_that_was_first_taken_from_the_multiplexer_was_accepted(
    api: HttpApi, multiplexer: HttpMultiplexer
) -> None:
    """Only a token that was ever taken is followed by another."""
    tokens = Tokens()
    with connected(api.url, tokens=tokens.source) as client:
        token = tokens.source.at_hand()
        assert token is not None
        token.accepted = False
        api.script([Reply(status=503), Reply(status=200)])
        assert said(carried(multiplexer, client))[0] == 503
        assert not token.accepted
        assert said(carried(multiplexer, client))[0] == 200
        assert token.accepted


def test_a_lost_request_may_have_arrived_though_no_newer_token_was_had(
    api: HttpApi, multiplexer: HttpMultiplexer
) -> None:
    tokens = Tokens()
    api.script([Reply(), Reply(drop="after")])
    with connected(api.url, tokens=tokens.source) as client:
        assert carried(multiplexer, client) is None
        tokens.source._token = None
        tokens.unwell = True
        answer = client.send(POST, key=KEY)
        tokens.unwell = False
        again = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.may_have_arrived
    assert isinstance(again, Answer)


def test_where_a_proxy_is_used_nothing_is_sent(
    api: HttpApi, multiplexer: HttpMultiplexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, api.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.closing(new_client("http://api.test")) as client:
        assert isinstance(client.send(POST, key=KEY), Answer)
        assert not multiplexer.begin(0, client, POST, key=KEY)

    assert len(api.requests) == 1


def test_a_client_with_a_transport_of_its_own_sends_by_itself(multiplexer: HttpMultiplexer) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200))
    client = HttpTargetClient(Endpoint(base_url="http://api.test"), transport=transport)
    with contextlib.closing(client):
        client.send(POST, key=KEY)
        assert not multiplexer.begin(0, client, POST, key=KEY)


def test_after_it_was_idle_for_long_a_connection_is_the_clients_to_replace(
    api: HttpApi, multiplexer: HttpMultiplexer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(api.url) as client:
        assert isinstance(carried(multiplexer, client), Answer)
        assert client._direct is not None
        assert client._direct._idle_since > time.monotonic() - 5  # the time of an answer counts anew
        client._direct._idle_since -= http_direct._KEPT_IDLE
        assert not multiplexer.begin(0, client, POST, key=KEY)
        assert isinstance(client.send(POST, key=KEY), Answer)
        assert isinstance(carried(multiplexer, client), Answer)

    assert (len(api.requests), api.connections) == (4, 2)


@pytest.mark.parametrize("watched", [False, True], ids=["never watched", "watched"])
def test_what_comes_unasked_between_requests_is_nobodys_answer(watched: bool, multiplexer: HttpMultiplexer) -> None:
    """Else it would stand for the next request, which may have been refused."""
    unasked = threading.Event()

    def serve(connection: socket.socket) -> None:
        for _ in range(1 + watched):
            whole_request(connection)
            connection.sendall(OK)
        unasked.wait(10)
        connection.sendall(b"HTTP/1.1 500 Not yours\r\nContent-Length: 0\r\n\r\n")
        with contextlib.suppress(OSError):
            came.append(whole_request(connection))

    came: list[bytes] = []
    with serving(serve) as url, connected(url) as client:
        if watched:
            carried(multiplexer, client)
        unasked.set()
        wait_for_bytes(client)
        if watched:
            assert multiplexer.ended(0) == []
        assert not multiplexer.begin(0, client, POST, key=KEY)
        assert client._direct is not None
        assert client._direct._stream is None

    assert came == []


@pytest.mark.parametrize("by", ["close", "reset", "half_close"])
@pytest.mark.parametrize("watched", [False, True], ids=["never watched", "watched"])
def test_a_connection_that_was_closed_between_requests_is_the_clients_to_replace(
    by: str, watched: bool, multiplexer: HttpMultiplexer
) -> None:
    closed, left = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        served.append(1)
        whole_request(connection)
        connection.sendall(OK)
        if len(served) > 1:
            left.wait(10)
            return
        if watched:
            whole_request(connection)
            connection.sendall(OK)
        closed.wait(10)
        if by == "reset":
            reset(connection)
        elif by == "half_close":
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                came.append(_more(connection))

    served: list[int] = []
    came: list[bytes] = []
    with serving(serve) as url, connected(url) as client:
        if watched:
            carried(multiplexer, client)
        closed.set()
        wait_for_bytes(client)
        if watched:
            assert multiplexer.ended(0) == []
            assert multiplexer._selector.select(0) == []  # else it would wake for it again and again
        assert not multiplexer.begin(0, client, POST, key=KEY)
        assert said(client.send(POST, key=KEY)) == (200, b"ok", False)
        left.set()

    assert (len(served), came) == (2, [])


# Broken ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["close", "reset", "half_close"])
def test_what_broke_without_a_word_goes_once_more_by_the_client(
    api: HttpApi, multiplexer: HttpMultiplexer, by: Any
) -> None:
    api.script([Reply(), Reply(drop="before", by=by), Reply(status=201)])
    with connected(api.url) as client:
        assert carried(multiplexer, client) is None
        assert not multiplexer.begin(0, client, POST, key=KEY)
        assert said(client.send(POST, key=KEY))[0] == 201
        assert said(carried(multiplexer, client))[0] == 200

    lost, again = api.requests[1:3]
    assert (again.key, again.body, again.path) == (lost.key, lost.body, lost.path)
    assert (len(api.requests), api.connections) == (4, 2)


def test_a_request_is_sent_twice_at_most(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    api.script([Reply()], then=Reply(drop="after"))
    with connected(api.url) as client:
        assert carried(multiplexer, client) is None
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.may_have_arrived
    assert answer.reason.startswith("the connection broke")
    assert len(api.requests) == 1 + 2


def test_a_target_that_is_gone_after_a_lost_request_may_have_had_it(multiplexer: HttpMultiplexer) -> None:
    def serve(connection: socket.socket) -> None:
        whole_request(connection)
        connection.sendall(OK)
        whole_request(connection)

    with serving(serve, connections=1) as url, connected(url) as client:
        assert carried(multiplexer, client) is None
        answer = client.send(POST, key=KEY)
        later = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.may_have_arrived
    assert answer.reason.startswith("the connection was closed; then cannot connect")
    assert isinstance(later, NoAnswer)
    assert not later.may_have_arrived


def test_the_time_of_a_lost_request_counts(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    """The record waited for both, as where the client sends both."""
    api.script([Reply(), Reply(drop="after", delay=0.2), Reply(), Reply()])
    with connected(api.url) as client:
        assert carried(multiplexer, client) is None
        answer, next_one = client.send(POST, key=KEY), client.send(POST, key=KEY)

    assert isinstance(answer, Answer)
    assert answer.seconds >= 0.2
    assert isinstance(next_one, Answer)
    assert next_one.seconds < answer.seconds


def test_both_requests_share_one_deadline(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    api.script([Reply(), Reply(drop="after", delay=0.5)], then=Reply(delay=0.7))
    with connected(api.url, timeout_seconds=1.0) as client:
        assert carried(multiplexer, client) is None
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.reason == "no answer within 1 s"


@pytest.mark.parametrize("by", [reset, socket.socket.close], ids=["reset", "close"])
def test_a_head_that_breaks_off_is_no_answer(by: Callable[[socket.socket], None], multiplexer: HttpMultiplexer) -> None:
    """The target had the request, so it does not go again at once."""
    heard = threading.Event()

    def serve(connection: socket.socket) -> None:
        served.append(1)
        whole_request(connection)
        connection.sendall(OK)
        whole_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nConte")
        heard.wait(10)
        by(connection)

    served: list[int] = []
    with serving(serve) as url, connected(url) as client:
        assert multiplexer.begin(0, client, POST, key=KEY)
        wait_until(multiplexer, lambda: flight_of(multiplexer, client)._heard)
        heard.set()
        (answer,) = ended(multiplexer, 0)
        assert isinstance(answer, NoAnswer)
        assert answer.may_have_arrived
        assert answer.reason.startswith("the connection broke: ")
        assert not multiplexer.begin(0, client, POST, key=KEY)
        assert isinstance(client.send(POST, key=KEY), Answer)

    assert len(served) == 2


@pytest.mark.parametrize("by", [reset, socket.socket.close], ids=["reset", "close"])
def test_a_body_that_breaks_off_is_an_answer_that_was_cut(
    by: Callable[[socket.socket], None], multiplexer: HttpMultiplexer
) -> None:
    """The status is known: a 201 whose body was lost is not a request to repeat."""
    heard = threading.Event()

    def serve(connection: socket.socket) -> None:
        whole_request(connection)
        connection.sendall(OK)
        whole_request(connection)
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\nhalf")
        heard.wait(10)
        by(connection)

    with serving(serve) as url, connected(url) as client:
        assert multiplexer.begin(0, client, POST, key=KEY)
        wait_until(multiplexer, lambda: flight_of(multiplexer, client)._heard)
        heard.set()
        (answer,) = ended(multiplexer, 0)
        assert not multiplexer.begin(0, client, POST, key=KEY)

    assert said(answer) == (201, b"half", True)


# The deadline ---------------------------------------------------------------------------------------------------------


def slow_on_one_path(reply: Reply) -> Callable[[Request], Reply]:
    return lambda request: reply if request.path == "/slow" else Reply()


@pytest.mark.parametrize(
    ("reply", "is_answer"),
    [
        (Reply(hold=threading.Event()), False),
        (Reply(head_pace=0.01, headers={"X": "x" * 1000}), False),
        (Reply(interim=(1000, 0.01)), False),
        (Reply(status=201, body=b"x" * 10_000, pace=0.01), True),
    ],
    ids=["silence", "a head that drips", "interim answers", "a body that drips"],
)
def test_an_answer_has_the_time_out_and_no_more_and_the_others_go_on(
    api: HttpApi, multiplexer: HttpMultiplexer, reply: Reply, is_answer: bool
) -> None:
    api.script(slow_on_one_path(reply))
    slow = HttpRequest(method="POST", path="/slow", body=b"x", content_type="text/plain")
    with connected(api.url, timeout_seconds=0.5) as late, connected(api.url) as quick:
        assert multiplexer.begin(1, late, slow, key=KEY)
        others = 0
        found: list[tuple[int, Ended]] = []
        while not any(lane == 1 for lane, _ in found):
            if 2 not in [lane for lane, _ in multiplexer._flights.values()]:
                assert multiplexer.begin(2, quick, POST, key=KEY)
            new = multiplexer.ended(1.0)
            assert all(isinstance(what, Answer) for lane, what in new if lane == 2)
            others += sum(lane == 2 for lane, _ in new)
            found += new
        (answer,) = [what for lane, what in found if lane == 1]
        if any(lane == 2 for lane, _ in multiplexer._flights.values()):
            ended(multiplexer, 2)
        connections = api.connections
        assert not multiplexer.begin(1, late, slow, key=KEY)
        assert isinstance(late.send(POST, key=KEY), Answer)

    assert others > 1
    assert connections == 2
    assert api.connections == 3
    if is_answer:
        status, body, truncated = said(answer)
        assert (status, truncated) == (201, True)
        assert 0 < len(body) < 10_000
    else:
        assert isinstance(answer, NoAnswer)
        assert (answer.reason, answer.may_have_arrived) == ("no answer within 0.5 s", True)
        assert answer.seconds >= 0.5


def test_a_target_that_reads_slowly_has_the_time_out_and_no_more(multiplexer: HttpMultiplexer) -> None:
    left, arrived = threading.Event(), [0]

    def serve(connection: socket.socket) -> None:
        whole_request(connection)
        connection.sendall(OK)
        while piece := connection.recv(65_536):
            arrived[0] += len(piece)
            left.wait(0.02)

    with serving(serve) as url, connected(url, timeout_seconds=0.5) as client:
        answer = carried(multiplexer, client, post(MANY * 4))
        left.set()

    assert isinstance(answer, NoAnswer)
    assert (answer.reason, answer.may_have_arrived) == ("no answer within 0.5 s", True)
    assert 0 < arrived[0] < len(MANY) * 4


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_target_that_never_stops_talking_holds_nobody_up(
    secure: bool, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    """Nothing of a chunk's extension is kept, so no limit of bytes ends it, and there is always more to read."""

    def serve(connection: socket.socket) -> None:
        if b"talk" not in whole_request(connection):
            while True:
                connection.sendall(OK)
                if whole_request(connection) == b"talk":
                    break
        connection.sendall(CHUNKED + b"2\r\nok\r\n2;")
        while True:
            connection.sendall(b"x" * 1_000_000)

    with (
        serving(serve, context=tls if secure else None) as url,
        connected(url, timeout_seconds=1.0) as talked_at,
        connected(url) as other,
    ):
        assert multiplexer.begin(1, talked_at, post(b"talk"), key=KEY)
        assert multiplexer.begin(2, other, POST, key=KEY)
        answers = ended(multiplexer, 1, 2)

    assert [said(answer) for answer in answers] == [(200, b"ok", True), (200, b"ok", False)]


def test_a_flight_gives_way_though_there_is_more_to_read(multiplexer: HttpMultiplexer) -> None:
    """How much there is depends on who is quicker, so here it never ends: it was read on after the time was over."""
    reads = itertools.count(1)

    class Talking:
        def recv(self, _: int) -> bytes:
            assert next(reads) < 1000
            return CHUNKED + b"2\r\nok\r\n2;" if next(reads) == 2 else b"x"

    with saying(OK, OK) as (url, _), connected(url) as client:
        flight = client.depart(POST, key=KEY)
        assert flight is not None
        flight.send()
        flight.socket = Talking()  # type: ignore[assignment]
        assert isinstance(flight.read(), StillOut)
        assert said(flight.expire()) == (200, b"ok", True)


# Large bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_large_body_arrives_as_it_is_at_a_target_that_is_slow_to_read_and_the_others_go_on(
    secure: bool, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    reads = threading.Event()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                body = whole_request(connection)
                came.append(body)
                connection.sendall(OK)
                if body == b"next is large":
                    reads.wait(10)

    came: list[bytes] = []
    with (
        serving(serve, context=tls if secure else None) as url,
        connected(url) as client,
        connected(url) as other,
    ):
        carried(multiplexer, client, post(b"next is large"))
        assert multiplexer.begin(1, client, post(MANY), key=KEY)
        assert flight_of(multiplexer, client)._unsent
        for _ in range(5):
            assert multiplexer.begin(2, other, POST, key=KEY)
            assert said(*ended(multiplexer, 2)) == (200, b"ok", False)
        reads.set()
        assert said(*ended(multiplexer, 1)) == (200, b"ok", False)
        assert said(carried(multiplexer, client, post(b"after it"))) == (200, b"ok", False)
        assert said(client.send(post(MANY), key=KEY)) == (200, b"ok", False)

    assert [body for body in came if body != POST.body] == [b"next is large", MANY, b"after it", MANY]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("then", ["close", "reset", "reads on"])
def test_an_answer_before_the_body_was_read_is_heard_and_the_connection_not_used_again(
    secure: bool, then: str, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    """The rest of the body would be read as the next request."""
    answered, heard, left = threading.Event(), threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        served.append(1)
        whole_request(connection)
        connection.sendall(OK)
        if len(served) > 1:
            left.wait(10)
            return
        _more(connection)
        connection.sendall(b"HTTP/1.1 413 Too large\r\nContent-Length: 3\r\n\r\nbig")
        answered.set()
        if then == "reset":
            # What was sent is there by now; a reset does not take it back.
            reset(connection)
        elif then == "reads on":
            heard.wait(10)
            with contextlib.suppress(OSError):
                while True:
                    rest.append(_more(connection))

    served: list[int] = []
    rest: list[bytes] = []
    with serving(serve, context=tls if secure else None) as url, connected(url) as client:
        assert multiplexer.begin(0, client, post(MANY), key=KEY)
        answered.wait(10)
        (answer,) = ended(multiplexer, 0)
        assert said(answer) == (413, b"big", False)
        assert not multiplexer.begin(0, client, POST, key=KEY)
        heard.set()
        assert said(client.send(POST, key=KEY)) == (200, b"ok", False)
        left.set()

    assert len(served) == 2
    assert sum(map(len, rest)) < len(MANY)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("status", [200, 202, 302, 422])
def test_after_an_early_answer_that_is_no_refusal_the_rest_of_the_body_is_sent_all_the_same(
    status: int, secure: bool, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    """It was taken for accepted, so the target must have it all (RFC 9110 §7.5)."""
    answered = threading.Event()

    def serve(connection: socket.socket) -> None:
        whole_request(connection)
        connection.sendall(OK)
        head, _, body = _more(connection).partition(b"\r\n\r\n")
        assert b"Content-Length: %d" % len(MANY) in head
        connection.sendall(b"HTTP/1.1 %d Early\r\nContent-Length: 5\r\n\r\nearly" % status)
        answered.wait(10)
        came.append(body)
        while missing := len(MANY) - sum(map(len, came)):
            came.append(_more(connection, missing))
        whole_request(connection)
        connection.sendall(CREATED)

    came: list[bytes] = []
    with (
        serving(serve, connections=1, context=tls if secure else None) as url,
        connected(url, success_on=frozenset({422})) as client,
    ):
        assert multiplexer.begin(0, client, post(MANY), key=KEY)
        wait_until(multiplexer, lambda: flight_of(multiplexer, client)._early is not None)
        answered.set()
        (answer,) = ended(multiplexer, 0)
        assert said(answer) == (status, b"early", False)
        assert said(carried(multiplexer, client)) == (201, b"", False)
        assert b"".join(came) == MANY


def test_an_early_answer_is_none_if_the_rest_of_the_body_cannot_be_sent_in_time(multiplexer: HttpMultiplexer) -> None:
    """As by the blocking way: the target said yes to what it does not have."""
    left = threading.Event()

    def serve(connection: socket.socket) -> None:
        whole_request(connection)
        connection.sendall(OK)
        _more(connection)
        connection.sendall(OK)
        left.wait(10)

    with serving(serve) as url:
        for multiplexed in (False, True):
            with connected(url, timeout_seconds=0.5) as client:
                request = post(MANY)
                answer = carried(multiplexer, client, request) if multiplexed else client.send(request, key=KEY)
                assert meaning(answer) == ("no answer within 0.5 s", True)
        left.set()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_large_answer_is_read_whole_up_to_the_limit(
    secure: bool, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                body = whole_request(connection)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    limit = len(MANY)
    with (
        serving(serve, context=tls if secure else None) as url,
        connected(url, max_response_bytes=limit) as client,
    ):
        for body in (MANY, b"small", MANY[::-1], b""):
            assert said(carried(multiplexer, client, post(body))) == (200, body, False)
        assert said(carried(multiplexer, client, post(MANY + b"x"))) == (200, MANY, True)
        assert not multiplexer.begin(0, client, POST, key=KEY)


# TLS ------------------------------------------------------------------------------------------------------------------


class TlsByHand:
    """A server's end of a TLS connection whose records go out when they are told to."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def shake_hands(self) -> None:
        """Do so, and keep back the session tickets, which come after."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self._incoming.write(_more(self._connection))
            else:
                return

    def recv(self) -> bytes:
        while True:
            try:
                return self._tls.read(65_536)
            except ssl.SSLWantReadError:
                self._incoming.write(_more(self._connection))

    def say(self, data: bytes) -> None:
        self._tls.write(data)
        self.flush()

    def say_goodbye(self) -> None:
        """Send a close-notify; the connection stays open."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self.flush()

    def flush(self) -> None:
        self._connection.sendall(self._outgoing.read())


def test_one_tls_connection_carries_many_requests(multiplexer: HttpMultiplexer, tls: ssl.SSLContext) -> None:
    with saying(*[OK] * 20, context=tls) as (url, came), connected(url) as client:
        for _ in range(9):
            assert said(carried(multiplexer, client)) == (200, b"ok", False)
            assert said(client.send(POST, key=KEY)) == (200, b"ok", False)

    assert came.count(b"") == 1


@pytest.mark.parametrize("late", [False, True], ids=["before the request", "before the answer"])
def test_a_session_ticket_is_neither_an_answer_nor_something_unasked(
    late: bool, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    """It makes the socket readable, and there is nothing to read."""
    ticket_read = threading.Event()

    def serve(connection: socket.socket) -> None:
        server = TlsByHand(connection, tls)
        server.shake_hands()
        if not late:
            server.flush()
        came.append(server.recv())
        if late:
            server.flush()
            ticket_read.wait(10)
        server.say(OK)

    came: list[bytes] = []
    with serving(serve) as url:
        client = new_client(url.replace("http://127.0.0.1", "https://localhost"))
        with contextlib.closing(client):
            client._wire.begin(give_up_at=time.monotonic() + 10)
            assert client._direct is not None
            client._direct._connected()
            client._direct.ended(reusable=True)
            if not late:
                wait_for_bytes(client)
            assert multiplexer.begin(0, client, POST, key=KEY)
            if late:
                wait_for_bytes(client)
                wait_until(multiplexer, lambda: not select.select([socket_of(client)], [], [], 0)[0])
                ticket_read.set()
            (answer,) = ended(multiplexer, 0)

    assert said(answer) == (200, b"ok", False)
    assert len(came) == 1


@pytest.mark.parametrize(
    ("answer", "heard"),
    [
        (None, "not begun"),
        (b"", None),
        (b"HTTP/1.1 200 OK\r\nConten", "no answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", (200, b"ok", True)),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", (200, b"until the end", False)),
    ],
    ids=["between requests", "before an answer", "in a head", "in a body", "at an end"],
)
def test_a_goodbye_is_the_connections_end(
    answer: bytes | None, heard: Any, multiplexer: HttpMultiplexer, tls: ssl.SSLContext
) -> None:
    """The TCP connection stays open: the close-notify alone says it."""
    left = threading.Event()

    def serve(connection: socket.socket) -> None:
        server = TlsByHand(connection, tls)
        server.shake_hands()
        server.recv()
        server.say(OK)
        if answer is not None:
            server.recv()
            if answer:
                server.say(answer)
        server.say_goodbye()
        left.wait(10)

    with serving(serve) as url, connected(url.replace("http://127.0.0.1", "https://localhost")) as client:
        if answer is None:
            wait_for_bytes(client)
            assert not multiplexer.begin(0, client, POST, key=KEY)
        else:
            what = carried(multiplexer, client)
            if heard == "no answer":
                assert isinstance(what, NoAnswer)
                assert what.may_have_arrived
            else:
                assert (what if what is None else said(what)) == heard
        assert client.depart(POST, key=KEY) is None
        left.set()


def test_what_is_no_tls_breaks_the_connection(multiplexer: HttpMultiplexer, tls: ssl.SSLContext) -> None:
    def serve(connection: socket.socket) -> None:
        server = TlsByHand(connection, tls)
        server.shake_hands()
        server.recv()
        server.say(OK)
        server.recv()
        server.say(b"HTTP/1.1 200 OK\r\nConten")
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with contextlib.suppress(OSError):
            _more(connection)

    with serving(serve) as url, connected(url.replace("http://127.0.0.1", "https://localhost")) as client:
        answer = carried(multiplexer, client)

    assert isinstance(answer, NoAnswer)
    assert answer.may_have_arrived
    assert answer.reason.startswith("the connection broke: ")


# Many lanes -----------------------------------------------------------------------------------------------------------


def echo(request: Request) -> Reply:
    return Reply(body=request.body)


def test_many_lanes_are_carried_at_once_and_each_has_its_own_answers(
    api: HttpApi, multiplexer: HttpMultiplexer
) -> None:
    """Held back until all have arrived, so that they are out together."""
    lanes, rounds = 40, 5
    arrived = threading.Barrier(lanes)

    def together(request: Request) -> Reply:
        if request.body != POST.body:
            arrived.wait(20)
        return echo(request)

    api.script(together)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(api.url)) for _ in range(lanes)]
        for number in range(rounds):
            bodies = [b"%d of %d" % (number, lane) for lane in range(lanes)]
            for lane, client in enumerate(clients):
                assert multiplexer.begin(lane, client, post(bodies[lane]), key=KEY)
            answers = ended(multiplexer, *range(lanes))
            assert [said(answer) for answer in answers] == [(200, body, False) for body in bodies]

    assert (len(api.requests), api.connections) == (lanes * (1 + rounds), lanes)


@pytest.mark.parametrize("closed_by", ["answer", "client", "deadline", "target"])
def test_a_sockets_number_that_was_anothers_is_watched_for_its_new_owner(
    api: HttpApi, multiplexer: HttpMultiplexer, closed_by: str
) -> None:
    def script(request: Request) -> Reply:
        if request.body == b"close":
            return Reply(headers={"Connection": "close"})
        if request.body == b"hold":
            return Reply(hold=threading.Event())
        return Reply(body=request.body, idle=0.05 if request.body == b"idle" else None)

    api.script(script)
    for _ in range(20):  # the server may take the number that gets free
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(connected(api.url, timeout_seconds=0.5))
            assert isinstance(carried(multiplexer, first), Answer)
            number = socket_of(first).fileno()
            if closed_by == "answer":
                assert isinstance(carried(multiplexer, first, post(b"close")), Answer)
            elif closed_by == "client":
                assert isinstance(first.send(post(b"close"), key=KEY), Answer)
            elif closed_by == "deadline":
                assert isinstance(carried(multiplexer, first, post(b"hold")), NoAnswer)
            else:
                assert isinstance(carried(multiplexer, first, post(b"idle")), Answer)
                wait_for_bytes(first)
                assert not multiplexer.begin(0, first, POST, key=KEY)
            second = stack.enter_context(connected(api.url))
            if socket_of(second).fileno() != number:
                continue
            assert said(carried(multiplexer, second, post(b"mine"))) == (200, b"mine", False)
            assert isinstance(first.send(POST, key=KEY), Answer)
            assert multiplexer.begin(1, first, post(b"one"), key=KEY)
            assert multiplexer.begin(2, second, post(b"two"), key=KEY)
            one, two = ended(multiplexer, 1, 2)
            assert (said(one)[1], said(two)[1]) == (b"one", b"two")
            return
    pytest.fail("no number was given again")


def test_a_client_sends_by_itself_and_by_the_multiplexer_in_turns(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    api.script(echo)
    with connected(api.url) as client:
        for number in range(20):
            body = b"%d" % number
            assert said(carried(multiplexer, client, post(body))) == (200, body, False)
            assert said(client.send(post(body * 2), key=KEY)) == (200, body * 2, False)
            assert multiplexer.ended(0) == []

    assert (len(api.requests), api.connections) == (41, 1)


def test_what_comes_for_a_client_that_is_at_it_itself_is_not_taken_from_it(
    api: HttpApi, multiplexer: HttpMultiplexer
) -> None:
    """Its connection is still watched: what wakes the multiplexer is for the client to read."""
    api.script(lambda request: Reply(body=request.body, delay=0.01))
    with connected(api.url) as busy, connected(api.url) as other, ThreadPoolExecutor(1) as pool:
        for number in range(10):
            assert isinstance(carried(multiplexer, busy), Answer)
            by_itself = pool.submit(busy.send, post(b"%d" % number), key=KEY)
            while not by_itself.done():
                assert multiplexer.begin(1, other, POST, key=KEY)
                assert said(*ended(multiplexer, 1)) == (200, POST.body, False)
            assert said(by_itself.result()) == (200, b"%d" % number, False)

    assert api.connections == 2


@pytest.mark.parametrize("seed", range(3))
def test_lanes_over_a_faulty_target_send_everything_in_order(seed: int) -> None:
    """As a drain does: what has to wait or broke without a word is sent by a thread of the lane's own."""
    lanes, each = 8, 40
    dice = random.Random(seed)

    def script(request: Request) -> Reply:
        if request.body == POST.body:
            return Reply()
        body = request.body
        return dice.choice(
            [
                *[Reply(body=body)] * 12,
                Reply(body=body, delay=0.01),
                Reply(body=body, headers={"Connection": "close"}),
                Reply(body=body, idle=0),
                Reply(body=body, idle=0.01, delay=0.005),
                Reply(body=[body[:2], body[2:]]),
                Reply(drop="before"),
                Reply(drop="after", by="reset"),
                Reply(drop="after", by="half_close"),
                Reply(status=201, body=body, cut=3),
                Reply(raw=b"HTTP/1.1 20"),
            ]
        )

    def by_itself(lane: int, request: HttpRequest) -> None:
        done.put((lane, clients[lane].send(request, key=KEY)))
        multiplexer.wake()

    done: SimpleQueue[tuple[int, Answer | NoAnswer]] = SimpleQueue()
    given = [0] * lanes
    results: list[list[Ended]] = [[] for _ in range(lanes)]
    with (
        HttpApi() as api,
        contextlib.closing(HttpMultiplexer()) as multiplexer,
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(lanes) as pool,
    ):
        api.script(script)
        clients = [stack.enter_context(connected(api.url, timeout_seconds=20)) for _ in range(lanes)]
        busy, multiplexed = set[int](), 0

        def request_of(lane: int) -> HttpRequest:
            return post(b"lane %d: %d" % (lane, given[lane]))

        while any(number < each for number in given):
            for lane in range(lanes):
                if lane not in busy and given[lane] < each:
                    busy.add(lane)
                    if multiplexer.begin(lane, clients[lane], request_of(lane), key=KEY):
                        multiplexed += 1
                    else:
                        pool.submit(by_itself, lane, request_of(lane))
            through = [(lane, what, True) for lane, what in multiplexer.ended(10)]
            with contextlib.suppress(Empty):
                while True:
                    through.append((*done.get_nowait(), False))
            for lane, what, may_be_sent_again in through:
                if what is None:
                    assert may_be_sent_again
                    pool.submit(by_itself, lane, request_of(lane))
                    continue
                results[lane].append(what)
                given[lane] += 1
                busy.discard(lane)
        arrived = api.requests

    assert multiplexed > lanes * each / 3
    for lane in range(lanes):
        bodies = [request.body for request in arrived if request.body.startswith(b"lane %d: " % lane)]
        expected = [b"lane %d: %d" % (lane, number) for number in range(each)]
        assert [body for body, _ in itertools.groupby(bodies)] == expected
        assert all(bodies.count(body) <= 2 for body in expected)
        for body, what in zip(expected, results[lane], strict=True):
            if isinstance(what, Answer):
                assert (what.body, what.truncated) in ((body, False), (body[:3], True))
            else:
                assert isinstance(what, NoAnswer)
                assert what.may_have_arrived


# Waking and closing ---------------------------------------------------------------------------------------------------


def test_a_wait_ends_when_it_is_woken(multiplexer: HttpMultiplexer) -> None:
    """Without an end in sight, from another thread."""
    for _ in range(20):
        waker = threading.Thread(target=multiplexer.wake)
        waker.start()
        assert multiplexer.ended(None) == []
        waker.join()


def test_a_wait_ends_when_it_was_woken_before(multiplexer: HttpMultiplexer) -> None:
    waker = threading.Thread(target=multiplexer.wake)
    waker.start()
    waker.join()

    assert multiplexer.ended(None) == []


def test_a_wait_for_an_answer_ends_when_it_is_woken(api: HttpApi, multiplexer: HttpMultiplexer) -> None:
    api.script(slow_on_one_path(Reply(hold=threading.Event())))
    slow = HttpRequest(method="POST", path="/slow", body=b"x", content_type="text/plain")
    with connected(api.url) as client:
        assert multiplexer.begin(0, client, slow, key=KEY)
        multiplexer.wake()
        assert multiplexer.ended(None) == []


def test_waking_again_and_again_neither_waits_nor_is_forgotten(multiplexer: HttpMultiplexer) -> None:
    """More often than the socket for it holds."""
    for _ in range(100_000):
        multiplexer.wake()
    assert multiplexer.ended(None) == []
    until = time.monotonic() + 10
    while select.select([multiplexer._ear], [], [], 0)[0]:
        assert multiplexer.ended(None) == []
        assert time.monotonic() < until
    multiplexer.wake()
    assert multiplexer.ended(None) == []


def test_waking_one_that_was_closed_does_nothing() -> None:
    """Who wakes it may have seen it asleep, and have been slower than its end."""
    multiplexer = HttpMultiplexer()
    multiplexer.close()
    multiplexer.wake()


def test_closing_lets_go_of_what_is_still_out(api: HttpApi) -> None:
    api.script(slow_on_one_path(Reply(body=b"late", hold=threading.Event())))
    slow = HttpRequest(method="POST", path="/slow", body=b"x", content_type="text/plain")
    multiplexer = HttpMultiplexer()
    with connected(api.url) as one, connected(api.url) as other:
        assert isinstance(carried(multiplexer, other), Answer)
        assert multiplexer.begin(1, one, slow, key=KEY)
        api.wait_for(4)
        multiplexer.close()
        multiplexer.close()
        assert said(one.send(POST, key=KEY)) == (200, b"", False)
        assert said(other.send(POST, key=KEY)) == (200, b"", False)

    api.wait_until_left()
    assert api.connections == 3  # whose request was through has its connection still


# Garbage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "closes"),
    [
        (OK, False),
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n", False),
        (ZIPPED % (len(gzip.compress(b"ok")), gzip.compress(b"ok")), False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", True),
        (b"HTTP/1.1 banana\r\n\r\n", True),
        (b"HTTP/1.1 20", True),
        (b"", True),
    ],
    ids=["plain", "chunked", "gzip", "broken off", "no HTTP", "half a head", "nothing"],
)
def test_a_request_leaves_nothing_for_the_garbage_collector(
    answer: bytes, closes: bool, multiplexer: HttpMultiplexer
) -> None:
    """A drain has it look seldom: a circle for each request was 5 MB of a million changes."""
    lanes = 20
    second = [answer] * lanes
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(saying(OK, one, closes_after=lambda said: closes and said != OK)) for one in second]
        clients = [stack.enter_context(connected(url)) for url, _ in urls]
        assert multiplexer.begin(0, clients[0], POST, key=KEY)  # what is made once is made by it
        ended(multiplexer, 0)
        gc.collect()
        gc.disable()
        try:
            for lane, client in enumerate(clients[1:]):
                assert multiplexer.begin(lane, client, POST, key=KEY)
                ended(multiplexer, lane)
            left = gc.collect()
        finally:
            gc.enable()

    assert left < lanes / 2


def test_a_request_that_is_too_late_leaves_nothing_for_the_garbage_collector(
    api: HttpApi, multiplexer: HttpMultiplexer
) -> None:
    api.script(slow_on_one_path(Reply(hold=threading.Event())))
    slow = HttpRequest(method="POST", path="/slow", body=b"x", content_type="text/plain")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(api.url, timeout_seconds=0.3)) for _ in range(10)]
        gc.collect()
        gc.disable()
        try:
            for lane, client in enumerate(clients):
                assert multiplexer.begin(lane, client, slow, key=KEY)
            assert all(isinstance(what, NoAnswer) for what in ended(multiplexer, *range(10)))
            left = gc.collect()
        finally:
            gc.enable()

    assert left < 10
