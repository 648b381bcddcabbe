"""What the network does is an answer or none, never an exception; over real sockets."""

import contextlib
import gzip
import itertools
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpcore
import httpx
import pytest

from pipelines.delivery.catalog import policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import HttpRequest, compile_routes
from pipelines.delivery.target import Answer, NoAnswer
from pipelines_tests.fakes.http_server import HttpApi, Reply, per_item, refusing
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import change
from pipelines_tests.resources.raw_server import serving
from resources.http_target import HttpTargetClient, endpoint
from resources.http_wire import Wire, open_client
from resources.system_clock import SystemClock

KEY = UUID("0b0f6a52-3f0b-5f0e-9d5a-7d1f6c1b3a11")
POST = HttpRequest(method="POST", path="/rows", body=b'[{"id": 1}]', content_type="application/json")
SECRETS = {"TOKEN": "s3cr3t-token", "USER": "some one", "PASSWORD": "pa&ss=w/rd", "SHORT": "abc"}


def a_client(url: str, **config: Any) -> HttpTargetClient:
    target = TargetConfig.model_validate(
        {"name": "api", "base_url": url, "routes": {"rows": {"upsert": {"path": "/rows"}}}, **config}
    )
    return HttpTargetClient(endpoint(target, SECRETS.__getitem__))


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with HttpApi() as api:
        yield api


def sent(url: str, request: HttpRequest = POST, **config: Any) -> Answer | NoAnswer:
    with contextlib.closing(a_client(url, **config)) as client:
        return client.send(request, key=KEY)


def answered(url: str, request: HttpRequest = POST, **config: Any) -> Answer:
    answer = sent(url, request, **config)
    assert isinstance(answer, Answer), answer
    return answer


def unanswered(url: str, request: HttpRequest = POST, **config: Any) -> NoAnswer:
    answer = sent(url, request, **config)
    assert isinstance(answer, NoAnswer), answer
    return answer


# The request ----------------------------------------------------------------------------------------------------------


def test_the_request_is_sent_as_it_was_rendered(api: HttpApi) -> None:
    answered(api.url)

    (request,) = api.requests
    assert (request.method, request.path, request.body) == ("POST", "/rows", b'[{"id": 1}]')
    assert request.key == str(KEY)
    assert request.headers["content-type"] == "application/json"
    assert "cookie" not in request.headers


@pytest.mark.parametrize(
    "path", ["/rows/a%2Fb%20c%3F", "/rows/%C3%A4%E2%82%AC", "/rows?x=a%20b+c&y=%26&z", "/rows//a/", "/rows/a'(b)*~!"]
)
def test_the_path_arrives_byte_for_byte(api: HttpApi, path: str) -> None:
    """A key with a slash in it is one segment, and stays one."""
    answered(api.url + "/v1", HttpRequest(method="DELETE", path=path))

    assert api.requests[0].path == "/v1" + path


def test_a_delete_without_a_body_has_none(api: HttpApi) -> None:
    answered(api.url, HttpRequest(method="DELETE", path="/rows/1"))

    (request,) = api.requests
    assert request.body == b""
    assert "content-type" not in request.headers


def test_a_delete_with_a_body_has_it(api: HttpApi) -> None:
    answered(api.url, HttpRequest(method="DELETE", path="/rows", body=b'["1"]', content_type="application/json"))

    assert api.requests[0].body == b'["1"]'


def test_a_compressed_body_says_so(api: HttpApi) -> None:
    body = gzip.compress(b'[{"id": 1}]')
    answered(api.url, HttpRequest(method="POST", path="/rows", body=body, content_type="x/y", compressed=True))

    (request,) = api.requests
    assert request.headers["content-encoding"] == "gzip"
    assert request.body == body
    assert request.json == [{"id": 1}]


def test_one_connection_serves_many_requests(api: HttpApi) -> None:
    with contextlib.closing(a_client(api.url)) as client:
        for _ in range(5):
            client.send(POST, key=KEY)

    assert (len(api.requests), api.connections) == (5, 1)


# Credentials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auth", "header", "value"),
    [
        ({"type": "bearer", "token": {"env": "TOKEN"}}, "authorization", "Bearer s3cr3t-token"),
        (
            {"type": "basic", "username": {"env": "USER"}, "password": {"env": "PASSWORD"}},
            "authorization",
            "Basic c29tZSBvbmU6cGEmc3M9dy9yZA==",
        ),
        (
            {"type": "basic", "username": "me", "password": {"env": "PASSWORD"}},
            "authorization",
            "Basic bWU6cGEmc3M9dy9yZA==",
        ),
        ({"type": "api_key", "key": {"env": "TOKEN"}, "header": "X-Api-Key"}, "x-api-key", "s3cr3t-token"),
    ],
    ids=["bearer", "basic", "basic with a plain name", "api_key in a header"],
)
def test_credentials_go_with_every_request(api: HttpApi, auth: Any, header: str, value: str) -> None:
    answered(api.url, auth=auth)

    assert api.requests[0].headers[header] == value


@pytest.mark.parametrize(
    ("path", "arrived"),
    [("/rows", "/rows?key=pa%26ss%3Dw%2Frd"), ("/rows?a=b%20c&d", "/rows?a=b%20c&d&key=pa%26ss%3Dw%2Frd")],
)
def test_a_key_in_the_query_joins_the_query_of_the_path(api: HttpApi, path: str, arrived: str) -> None:
    """It must not take its place."""
    auth = {"type": "api_key", "key": {"env": "PASSWORD"}, "query": "key"}
    answered(api.url, HttpRequest(method="DELETE", path=path), auth=auth)

    assert api.requests[0].path == arrived


def test_no_credentials_are_none(api: HttpApi) -> None:
    answered(api.url)

    assert "authorization" not in api.requests[0].headers


def test_headers_of_the_file_are_sent(api: HttpApi) -> None:
    answered(api.url, headers={"X-Tenant": "7", "X-Secret": {"env": "TOKEN"}, "User-Agent": "mine/1"})

    headers = api.requests[0].headers
    assert (headers["x-tenant"], headers["x-secret"], headers["user-agent"]) == ("7", "s3cr3t-token", "mine/1")


def test_a_header_of_the_file_stands_for_ours_whatever_its_case() -> None:
    seen: list[httpx.Headers] = []

    def take(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200)

    headers = {"accept": "text/plain", "USER-AGENT": "mine/1"}
    client = open_client(wire=Wire(), headers=headers, timeout_seconds=1, transport=httpx.MockTransport(take))
    with contextlib.closing(client):
        client.get("http://api.test")

    assert (seen[0].get_list("Accept"), seen[0].get_list("User-Agent")) == (["text/plain"], ["mine/1"])


def test_secrets_are_not_in_the_endpoints_repr() -> None:
    target = TargetConfig.model_validate(
        {
            "name": "api",
            "base_url": "http://api.test",
            "auth": {"type": "api_key", "key": {"env": "TOKEN"}, "query": "key"},
            "headers": {"X-Secret": {"env": "PASSWORD"}},
            "routes": {"rows": {"upsert": {"path": "/rows"}}},
        }
    )

    shown = repr(endpoint(target, SECRETS.__getitem__))

    assert "s3cr3t" not in shown
    assert "pa&ss" not in shown


@pytest.mark.parametrize("echo", [b"pa&ss=w/rd", b"pa&ss=w\\/rd", b"pa%26ss%3Dw%2Frd"], ids=["plain", "JSON", "URL"])
def test_a_secret_is_known_however_the_target_spells_it(api: HttpApi, echo: bytes) -> None:
    """PHP's JSON escapes slashes, and a logged URL is percent-encoded."""
    api.script(Reply(status=400, body=b"no: " + echo))

    answer = answered(api.url, auth={"type": "basic", "username": "me", "password": {"env": "PASSWORD"}})

    assert answer.body == b"no: [redacted]"


def test_a_target_that_echoes_a_secret_does_not_get_it_into_the_answer(api: HttpApi) -> None:
    api.script(
        Reply(status=401, body=b"no such token: s3cr3t-token!", headers={"WWW-Authenticate": "Bearer s3cr3t-token"})
    )
    answer = answered(api.url, auth={"type": "bearer", "token": {"env": "TOKEN"}})

    assert answer.body == b"no such token: [redacted]!"
    assert answer.headers["www-authenticate"] == "Bearer [redacted]"


def test_a_key_in_the_query_is_not_logged(api: HttpApi, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answered(api.url, auth={"type": "api_key", "key": {"env": "TOKEN"}, "query": "key"})

    assert "s3cr3t-token" not in caplog.text


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 204, 301, 400, 404, 429, 500, 503])
def test_every_status_is_an_answer(api: HttpApi, status: int) -> None:
    api.script(Reply(status=status, headers={"Retry-After": "7"}))
    answer = answered(api.url)

    assert answer.status == status
    assert answer.headers["retry-after"] == "7"
    assert answer.seconds > 0


def test_a_redirect_is_not_followed(api: HttpApi) -> None:
    """Credentials are not carried where nobody sent them."""
    api.script([Reply(status=307, headers={"Location": api.url + "/elsewhere"})])
    answer = answered(api.url, auth={"type": "bearer", "token": {"env": "TOKEN"}})

    assert answer.status == 307
    assert len(api.requests) == 1


def test_a_body_is_read_whole_up_to_the_limit(api: HttpApi) -> None:
    api.script(Reply(body=b"x" * 100))

    exactly = answered(api.url, max_response_bytes=100)
    cut = answered(api.url, max_response_bytes=99)

    assert (len(exactly.body), exactly.truncated) == (100, False)
    assert (len(cut.body), cut.truncated) == (99, True)


def test_a_body_without_end_is_cut_and_the_connection_given_up(api: HttpApi) -> None:
    """Memory holds no more than the limit, and the rest is not waited for."""
    api.script([Reply(body=itertools.repeat(b"x" * 65_536))])
    with contextlib.closing(a_client(api.url, max_response_bytes=1000)) as client:
        endless, next_one = client.send(POST, key=KEY), client.send(POST, key=KEY)

    assert isinstance(endless, Answer)
    assert (len(endless.body), endless.truncated) == (1000, True)
    assert isinstance(next_one, Answer)
    assert api.connections == 2


def test_a_body_that_breaks_off_is_an_answer_that_was_cut(api: HttpApi) -> None:
    """The status is known: a 201 whose body was lost is not a request to repeat."""
    api.script(Reply(status=201, body=b'{"id": 1, "name": "x"}', cut=9))
    answer = answered(api.url)

    assert (answer.status, answer.body, answer.truncated) == (201, b'{"id": 1,', True)


def test_a_gzipped_answer_is_read(api: HttpApi) -> None:
    api.script(Reply(body=gzip.compress(b'{"ok": true}'), headers={"Content-Encoding": "gzip"}))

    assert answered(api.url).body == b'{"ok": true}'


def test_a_gzip_bomb_is_cut(api: HttpApi) -> None:
    api.script(Reply(body=gzip.compress(b"x" * 20_000_000), headers={"Content-Encoding": "gzip"}))
    answer = answered(api.url, max_response_bytes=1000)

    assert (len(answer.body), answer.truncated) == (1000, True)


def test_an_answer_that_cannot_be_decoded_keeps_its_status(api: HttpApi) -> None:
    api.script(Reply(status=200, body=b"no gzip", headers={"Content-Encoding": "gzip"}))
    answer = answered(api.url)

    assert (answer.status, answer.truncated) == (200, True)


def test_cookies_are_not_kept(api: HttpApi) -> None:
    """A request is the same bytes whoever answered before; no target grows a jar in our memory."""
    api.script(Reply(headers={"Set-Cookie": "session=1; Path=/"}))
    with contextlib.closing(a_client(api.url)) as client:
        client.send(POST, key=KEY)
        client.send(POST, key=KEY)

    assert "cookie" not in api.requests[1].headers


# The deadline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [Reply(head_pace=0.02), Reply(interim=(150, 0.02))], ids=["headers", "1xx"])
def test_an_answer_that_drips_has_the_time_out_and_no_more(api: HttpApi, reply: Reply) -> None:
    """Each byte comes in time, the answer does not."""
    api.script(reply)
    answer = unanswered(api.url, timeout_seconds=0.3)

    assert answer.reason == "no answer within 0.3 s"
    assert answer.may_have_arrived


def test_a_body_that_drips_is_cut_at_the_deadline(api: HttpApi) -> None:
    """The status is known, so it is an answer; the whole would take minutes."""
    api.script(Reply(status=201, body=b"x" * 10_000, pace=0.02))
    answer = answered(api.url, timeout_seconds=0.3)

    assert (answer.status, answer.truncated) == (201, True)
    assert 0 < len(answer.body) < 10_000


def test_a_target_that_reads_slowly_has_the_time_out_and_no_more() -> None:
    """It takes some of the request again and again, so no single write ever waits for long."""
    body = b"x" * 30_000_000
    left, arrived = threading.Event(), [0]

    def serve(connection: socket.socket) -> None:
        while piece := connection.recv(262_144):
            arrived[0] += len(piece)
            left.wait(0.02)

    with serving(serve) as url:
        answer = unanswered(url, HttpRequest(method="POST", path="/rows", body=body), timeout_seconds=0.3)
        left.set()

    assert answer.reason == "no answer within 0.3 s"
    assert answer.may_have_arrived
    assert 0 < arrived[0] < len(body)


def test_a_tls_handshake_that_hangs_cannot_have_delivered() -> None:
    left = threading.Event()
    with serving(lambda _: left.wait(5)) as url:
        answer = unanswered(url.replace("http://", "https://"), timeout_seconds=0.2)
        left.set()

    assert answer.reason == "no connection within 0.2 s"
    assert not answer.may_have_arrived


def test_a_connection_that_is_too_late_for_tls_is_closed() -> None:
    wire = Wire()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        wire.begin(give_up_at=time.monotonic() + 60)
        stream = wire.connect_tcp("127.0.0.1", listener.getsockname()[1])
        wire.begin(give_up_at=time.monotonic())
        with pytest.raises(httpcore.ConnectTimeout):
            stream.start_tls(httpx.create_ssl_context())

    assert stream.get_extra_info("socket").fileno() == -1


def test_a_proxy_of_the_environment_is_held_to_the_deadline(api: HttpApi, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, api.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    api.script(Reply(head_pace=0.02))
    answer = unanswered("http://api.test", timeout_seconds=0.3)

    assert answer.reason == "no answer within 0.3 s"
    assert [request.path for request in api.requests] == ["http://api.test/rows"]


@pytest.mark.parametrize("location", ["https:login", "mailto:a@b.test", "http://a:b/", "http://xn--/", "/login"])
def test_a_redirect_by_a_proxy_is_an_answer_wherever_it_points(
    api: HttpApi, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """httpx raises InvalidURL for some: that was taken for a record's path that is too long, and the record buried."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, api.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    api.script(Reply(status=302, headers={"Location": location}))
    answer = answered("http://api.test")

    assert (answer.status, answer.headers["location"]) == (302, location)


def test_httpx_makes_its_connections_through_the_wire(api: HttpApi) -> None:
    """It has no argument for that: who raises httpx or httpcore sees here whether the private names still hold."""
    wire = Wire()
    with contextlib.closing(open_client(wire=wire, headers={}, timeout_seconds=5)) as client:
        seen = []
        for _ in range(2):
            wire.begin(give_up_at=time.monotonic() + 5)
            client.get(api.url)
            seen.append((wire.connected, wire.spoke, wire.heard))

    assert seen == [(True, True, True), (False, True, True)]


def test_each_address_of_a_host_gets_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that swallows packets does not use up what the next would need."""
    tried: list[tuple[str, float]] = []

    class Swallowing(httpcore.NetworkBackend):
        def connect_tcp(self, host: str, port: int, timeout: Any = None, **_: Any) -> httpcore.NetworkStream:
            tried.append((host, timeout))
            raise httpcore.ConnectTimeout

    addresses = ["2001:db8::1", "192.0.2.1", "192.0.2.2"]
    found = [(socket.AF_UNSPEC, socket.SOCK_STREAM, 6, "", (address, 443)) for address in [*addresses, addresses[0]]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    wire = Wire(Swallowing())
    wire.begin(give_up_at=time.monotonic() + 300)
    with pytest.raises(httpcore.ConnectTimeout):
        wire.connect_tcp("api.test", 443)

    assert [address for address, _ in tried] == addresses
    assert [round(share, -1) for _, share in tried] == [100, 150, 300]


# Connections that are kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["close", "reset", "half_close"])
def test_a_kept_connection_that_was_closed_costs_no_retry(api: HttpApi, by: Any) -> None:
    """The target closed it without notice: the same bytes go again at once, under the same key, on a new one."""
    api.script([Reply(), Reply(drop="before", by=by), Reply(status=201)])
    with contextlib.closing(a_client(api.url)) as client:
        client.send(POST, key=KEY)
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, Answer)
    assert answer.status == 201
    lost, again = api.requests[1:]
    assert (again.key, again.body, again.path) == (lost.key, lost.body, lost.path)
    assert api.connections == 2


def test_a_target_that_keeps_no_connection_answers_every_request_once(api: HttpApi) -> None:
    """It promises to and does not: whether the client notices in time or not."""
    api.script(Reply(idle=0))
    with contextlib.closing(a_client(api.url)) as client:
        answers = [client.send(POST, key=KEY) for _ in range(50)]

    assert all(isinstance(answer, Answer) for answer in answers)
    assert len(api.requests) == 50


@pytest.mark.parametrize("drop", ["before", "after"])
def test_a_request_is_sent_twice_at_most(api: HttpApi, drop: Any) -> None:
    api.script([Reply()], then=Reply(drop=drop))
    with contextlib.closing(a_client(api.url)) as client:
        client.send(POST, key=KEY)
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.may_have_arrived
    assert answer.reason.startswith("the connection broke")
    assert len(api.requests) == 1 + 2


def test_after_a_time_out_nothing_goes_again_at_once(api: HttpApi) -> None:
    """The target is slow, perhaps for what it was asked: to ask more would not help it."""
    api.script([Reply()], then=Reply(hold=threading.Event()))
    with contextlib.closing(a_client(api.url, timeout_seconds=0.2)) as client:
        client.send(POST, key=KEY)
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.reason == "no answer within 0.2 s"
    assert len(api.requests) == 2


def test_once_the_target_spoke_nothing_goes_again_at_once(api: HttpApi) -> None:
    """It had the request, so its silence is no closed connection's."""
    api.script([Reply()], then=Reply(raw=b"HTTP/1.1 20"))
    with contextlib.closing(a_client(api.url)) as client:
        client.send(POST, key=KEY)
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert len(api.requests) == 2


def test_a_target_that_is_gone_after_a_lost_request_may_have_had_it() -> None:
    """The new connection is refused, but the old one took the request."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        connection.recv(65_536)

    request = HttpRequest(method="DELETE", path="/rows/1")  # one packet, so that each is read whole
    with serving(serve, connections=1) as url, contextlib.closing(a_client(url)) as client:
        client.send(request, key=KEY)
        answer = client.send(request, key=KEY)

    assert isinstance(answer, NoAnswer)
    assert answer.may_have_arrived
    assert answer.reason.startswith("the connection was closed; then cannot connect")


def test_the_time_of_a_lost_request_counts(api: HttpApi) -> None:
    """The record waited for both."""
    api.script([Reply(), Reply(drop="after", delay=0.2), Reply()])
    with contextlib.closing(a_client(api.url)) as client:
        client.send(POST, key=KEY)
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, Answer)
    assert answer.seconds >= 0.2


def test_both_requests_share_one_deadline(api: HttpApi) -> None:
    api.script([Reply(), Reply(drop="after", delay=0.4)], then=Reply(delay=0.4))
    with contextlib.closing(a_client(api.url, timeout_seconds=0.6)) as client:
        client.send(POST, key=KEY)
        answer = client.send(POST, key=KEY)

    assert isinstance(answer, NoAnswer)


# No answer ------------------------------------------------------------------------------------------------------------


def test_a_connection_that_is_refused_cannot_have_delivered() -> None:
    with HttpApi() as api:
        url = api.url
    answer = unanswered(url)

    assert not answer.may_have_arrived
    assert answer.reason.startswith("cannot connect")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "no..host", "xn--", "x" * 64 + ".test"])
def test_a_name_that_is_not_known_or_none_cannot_have_delivered(host: str) -> None:
    answer = unanswered(f"http://{host}")

    assert answer.reason.startswith("cannot connect")
    assert not answer.may_have_arrived


def test_a_tls_handshake_that_fails_cannot_have_delivered(api: HttpApi) -> None:
    answer = unanswered(api.url.replace("http://", "https://"), timeout_seconds=2)

    assert not answer.may_have_arrived
    assert api.requests == []


@pytest.mark.parametrize("drop", ["before", "after"])
def test_a_connection_that_breaks_after_the_request_left_may_have_delivered(api: HttpApi, drop: Any) -> None:
    api.script(Reply(drop=drop))
    answer = unanswered(api.url)

    assert answer.may_have_arrived
    assert answer.reason.startswith("the connection broke")
    assert len(api.requests) == 1
    assert len(api.applied) == (1 if drop == "after" else 0)


def test_an_answer_that_does_not_come_in_time_may_have_delivered(api: HttpApi) -> None:
    api.script(Reply(hold=threading.Event()))
    answer = unanswered(api.url, timeout_seconds=0.1)

    assert answer.may_have_arrived
    assert answer.reason == "no answer within 0.1 s"


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 banana\r\n\r\n", b"", b"\x00" * 100])
def test_what_is_not_http_is_no_answer(api: HttpApi, raw: bytes) -> None:
    api.script(Reply(raw=raw))
    answer = unanswered(api.url)

    assert answer.may_have_arrived


def test_headers_without_end_are_no_answer(api: HttpApi) -> None:
    api.script(Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X-Filler: " + b"x" * 1_000_000))

    assert unanswered(api.url).may_have_arrived


def test_a_server_that_never_accepts_is_given_up_on() -> None:
    """Its backlog is full: a connect that hangs, not one that is refused."""
    with socket.socket() as listener, contextlib.ExitStack() as fillers:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        answer = unanswered(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_seconds=0.1)

    assert answer.reason == "no connection within 0.1 s"
    assert not answer.may_have_arrived


def test_after_a_failure_the_next_request_opens_another_connection(api: HttpApi) -> None:
    api.script([Reply(drop="after"), Reply()])
    with contextlib.closing(a_client(api.url)) as client:
        first, second = client.send(POST, key=KEY), client.send(POST, key=KEY)

    assert isinstance(first, NoAnswer)
    assert isinstance(second, Answer)


def test_a_url_that_is_too_long_is_an_answer_about_the_record(api: HttpApi) -> None:
    """A key of 100,000 characters must not end the drain, nor pass for an outage: no later try will be better."""
    answer = answered(api.url, HttpRequest(method="DELETE", path="/rows/" + "x" * 100_000))

    assert answer.status == 414
    assert api.requests == []


def test_reasons_hold_no_secrets() -> None:
    """Whatever words an error has."""

    def fail(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("broke near s3cr3t-token")

    target = TargetConfig.model_validate(
        {
            "name": "api",
            "base_url": "http://api.test",
            "auth": {"type": "bearer", "token": {"env": "TOKEN"}},
            "routes": {"rows": {"upsert": {"path": "/rows"}}},
        }
    )
    client = HttpTargetClient(endpoint(target, SECRETS.__getitem__), transport=httpx.MockTransport(fail))
    answer = client.send(POST, key=KEY)
    client.close()

    assert isinstance(answer, NoAnswer)
    assert answer.reason == "the connection broke: broke near [redacted]"


# A drain over real sockets --------------------------------------------------------------------------------------------


def drained(api: HttpApi, ledger: FakeLedger, *, upsert: dict[str, Any]) -> DrainReport:
    config = TargetConfig.model_validate(
        {"name": "api", "base_url": api.url, "max_in_flight": 2, "routes": {"customers": {"upsert": upsert}}}
    )
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        return drain(
            policy=policy_of(config),
            routes=compile_routes(config),
            ledger=target_ledger,
            connect=lambda: HttpTargetClient(endpoint(config, SECRETS.__getitem__)),
            clock=SystemClock(),
            limits=DrainLimits(),
        )


def test_a_drain_finds_the_bad_record_of_a_batch(api: HttpApi) -> None:
    ledger = FakeLedger(targets={"api": "beginning"}, changes=[change(i) for i in range(1, 101)], clock=SystemClock())
    api.script(refusing(["42"]))

    report = drained(api, ledger, upsert={"path": "/rows", "batch": {"max_records": 50}, "compress": "gzip"})

    assert (report.end, report.total("accepted"), report.total("dead")) == ("caught_up", 99, 1)
    assert sorted(row["change"] for request in api.applied for row in request.records) == [
        i for i in range(1, 101) if i != 42
    ]
    assert api.connections == 2


def test_a_drain_settles_a_batch_item_by_item(api: HttpApi) -> None:
    ledger = FakeLedger(targets={"api": "beginning"}, changes=[change(i) for i in range(1, 101)], clock=SystemClock())
    api.script(per_item(lambda row: 422 if row["change"] % 10 == 0 else 200, status=207))
    results = {"items": "$.results", "id": "id", "status": "status"}

    batch = {"max_records": 20, "body": {"rows": "$records"}}
    report = drained(api, ledger, upsert={"path": "/rows", "batch": batch, "results": results})

    assert (report.end, report.total("accepted"), report.total("dead")) == ("caught_up", 90, 10)
    assert report.retries == 0
