"""A token is asked for once for all lanes, renewed once when it ends, and never shown; over real sockets."""

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.delivery.catalog import policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import HttpRequest, compile_routes
from pipelines.delivery.target import Answer, NoAnswer
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import change
from resources.http_target import Endpoint, HttpTargetClient, endpoint
from resources.oauth import Denied, Granted, Token, TokenEndpoint, TokenSource, Unavailable
from resources.system_clock import SystemClock

KEY = UUID("0b0f6a52-3f0b-5f0e-9d5a-7d1f6c1b3a11")
POST = HttpRequest(method="POST", path="/rows", body=b'[{"id": 1}]', content_type="application/json")
SECRETS = {"ID": "client one", "SECRET": "s3cr3t/with+more&than=that"}


class Guarded:
    """An API that takes only a token of its own token endpoint, and only the newest one."""

    def __init__(self, api: HttpApi) -> None:
        self.api = api
        self.minted = 0
        self.valid: set[str] = set()
        self.accepts_what_it_mints = True
        self.refusal = Reply(status=401)
        self.token_reply: Callable[[str], Reply] = lambda token: Reply.json(
            {"access_token": token, "token_type": "Bearer", "expires_in": 3600}
        )
        api.script(self._answer)

    @property
    def token_requests(self) -> list[Request]:
        return [request for request in self.api.requests if request.path == "/token"]

    @property
    def sent(self) -> list[Request]:
        return [request for request in self.api.requests if request.path != "/token"]

    def revoke(self) -> None:
        self.valid = set()

    def _answer(self, request: Request) -> Reply:
        if request.path == "/token":
            self.minted += 1
            token = f"t0ken-{self.minted}"
            if self.accepts_what_it_mints:
                self.valid = {token}
            return self.token_reply(token)
        return Reply() if request.headers.get("authorization", "")[7:] in self.valid else self.refusal


@pytest.fixture
def api() -> Iterator[HttpApi]:
    with HttpApi() as api:
        yield api


@pytest.fixture
def guarded(api: HttpApi) -> Guarded:
    return Guarded(api)


def configured(api: HttpApi, *, auth: Any = (), **config: Any) -> TargetConfig:
    oauth = {
        "type": "oauth2_client_credentials",
        "token_url": f"{api.url}/token",
        "client_id": "me",
        "client_secret": {"env": "SECRET"},
        **dict(auth),
    }
    rows = {"rows": {"upsert": {"path": "/rows"}}}
    return TargetConfig.model_validate({"name": "api", "base_url": api.url, "auth": oauth, "routes": rows, **config})


def an_endpoint(api: HttpApi, *, auth: Any = (), **config: Any) -> Endpoint:
    return endpoint(configured(api, auth=auth, **config), SECRETS.__getitem__)


def send(where: Endpoint, times: int = 1) -> Answer | NoAnswer:
    """Return the last answer of one lane."""
    with contextlib.closing(HttpTargetClient(where)) as client:
        for _ in range(times):
            answer = client.send(POST, key=KEY)
    return answer


def status(answer: Answer | NoAnswer) -> int:
    assert isinstance(answer, Answer), answer
    return answer.status


# The token request ----------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_once_and_goes_with_every_request(api: HttpApi, guarded: Guarded) -> None:
    where = an_endpoint(api)

    assert status(send(where, times=3)) == 200
    assert status(send(where)) == 200
    assert [request.headers["authorization"] for request in guarded.sent] == ["Bearer t0ken-1"] * 4
    (asked,) = guarded.token_requests
    assert (asked.method, asked.headers["content-type"]) == ("POST", "application/x-www-form-urlencoded")
    assert parse_qs(asked.body.decode()) == {"grant_type": ["client_credentials"]}


def test_no_token_is_asked_for_before_it_is_needed(api: HttpApi, guarded: Guarded) -> None:
    HttpTargetClient(an_endpoint(api)).close()

    assert api.requests == []


def test_the_client_shows_itself_in_a_header(api: HttpApi, guarded: Guarded) -> None:
    """Name and secret are each encoded as in a form before they are joined (RFC 6749 §2.3.1)."""
    send(an_endpoint(api, auth={"client_id": {"env": "ID"}}))

    scheme, _, pair = guarded.token_requests[0].headers["authorization"].partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(pair) == b"client+one:s3cr3t%2Fwith%2Bmore%26than%3Dthat"


def test_the_client_shows_itself_in_the_form_where_asked_to(api: HttpApi, guarded: Guarded) -> None:
    send(an_endpoint(api, auth={"client_id": {"env": "ID"}, "client_authentication": "body"}))

    (asked,) = guarded.token_requests
    assert "authorization" not in asked.headers
    assert parse_qs(asked.body.decode()) == {
        "grant_type": ["client_credentials"],
        "client_id": ["client one"],
        "client_secret": [SECRETS["SECRET"]],
    }


def test_scope_and_audience_are_sent(api: HttpApi, guarded: Guarded) -> None:
    send(an_endpoint(api, auth={"scope": "rows:write rows:read", "audience": "https://api.test/"}))

    assert parse_qs(guarded.token_requests[0].body.decode()) == {
        "grant_type": ["client_credentials"],
        "scope": ["rows:write rows:read"],
        "audience": ["https://api.test/"],
    }


def test_a_narrower_scope_than_asked_for_is_taken(api: HttpApi, guarded: Guarded) -> None:
    """Whether it is enough, the target says."""
    guarded.token_reply = lambda token: Reply.json({"access_token": token, "token_type": "bearer", "scope": "rows"})

    assert status(send(an_endpoint(api, auth={"scope": "rows more"}))) == 200


def test_the_files_headers_do_not_go_to_the_token_endpoint(api: HttpApi, guarded: Guarded) -> None:
    send(an_endpoint(api, headers={"X-Api-Key": {"env": "SECRET"}}))

    assert "x-api-key" not in guarded.token_requests[0].headers
    assert guarded.token_requests[0].headers["user-agent"] == "distributary/0.1"


# Renewal --------------------------------------------------------------------------------------------------------------


def test_a_token_that_has_ended_is_renewed_and_the_request_sent_again(api: HttpApi, guarded: Guarded) -> None:
    where = an_endpoint(api)
    send(where)
    guarded.revoke()

    assert status(send(where, times=2)) == 200
    refused, again, _ = guarded.sent[1:]
    assert (again.key, again.body) == (refused.key, refused.body) == (str(KEY), POST.body)
    assert again.headers["authorization"] == "Bearer t0ken-2"
    assert guarded.minted == 2


def test_a_storm_of_refusals_makes_one_token_request(api: HttpApi, guarded: Guarded) -> None:
    """Eight lanes are refused at the same moment."""
    where = an_endpoint(api)
    send(where)
    guarded.revoke()
    together = threading.Barrier(8)
    answer = guarded._answer

    def all_at_once(request: Request) -> Reply:
        if request.headers["authorization"] == "Bearer t0ken-1":
            together.wait(30)
        return answer(request)

    api.script(all_at_once)
    with ThreadPoolExecutor(8) as lanes:
        answers = list(lanes.map(lambda _: send(where), range(8)))

    assert [status(one) for one in answers] == [200] * 8
    assert guarded.minted == 2
    assert len(guarded.sent) == 1 + 8 + 8


def test_a_token_that_was_never_accepted_is_not_renewed(api: HttpApi, guarded: Guarded) -> None:
    """The next would be no better: the refusal is the answer, and the target pauses for it."""
    guarded.accepts_what_it_mints = False
    where = an_endpoint(api)

    assert status(send(where, times=3)) == 401
    assert (guarded.minted, len(guarded.sent)) == (1, 3)


def test_renewals_end_with_the_first_token_that_is_not_accepted(api: HttpApi, guarded: Guarded) -> None:
    where = an_endpoint(api)
    send(where)
    guarded.revoke()
    guarded.accepts_what_it_mints = False

    assert status(send(where, times=3)) == 401
    assert guarded.minted == 2


def test_a_fault_does_not_count_as_acceptance(api: HttpApi, guarded: Guarded) -> None:
    """A gateway's 503 says nothing of the token."""
    guarded.accepts_what_it_mints = False
    where = an_endpoint(api)
    guarded.refusal = Reply(status=503)
    send(where)
    guarded.refusal = Reply(status=401)
    send(where)

    assert guarded.minted == 1


@pytest.mark.parametrize("said", [401, 403, 419, 440, 498])
def test_a_token_may_be_refused_in_other_ways_than_401(api: HttpApi, guarded: Guarded, said: int) -> None:
    where = an_endpoint(api)
    guarded.refusal = Reply(status=said)
    send(where)
    guarded.revoke()

    assert status(send(where)) == 200
    assert guarded.minted == 2


@pytest.mark.parametrize("field", ["drop_on", "success_on", "retryable_status_codes"])
def test_a_403_that_means_something_else_here_renews_nothing(api: HttpApi, guarded: Guarded, field: str) -> None:
    where = an_endpoint(api, **{field: [403]})
    guarded.refusal = Reply(status=403)
    send(where)
    guarded.revoke()

    assert status(send(where)) == 403
    assert guarded.minted == 1


def test_a_401_that_may_be_sent_again_still_renews(api: HttpApi, guarded: Guarded) -> None:
    """Sending it again with a token that has ended would never help."""
    where = an_endpoint(api, retryable_status_codes=[401])
    send(where)
    guarded.revoke()

    assert status(send(where)) == 200


def test_the_time_of_a_renewal_is_not_the_targets(api: HttpApi, guarded: Guarded) -> None:
    where = an_endpoint(api)
    send(where)
    guarded.revoke()
    mint = guarded.token_reply
    guarded.token_reply = lambda token: replace(mint(token), delay=0.2)
    answer = send(where)
    renewed_at = guarded.token_requests[-1].at + 0.2

    assert isinstance(answer, Answer)
    assert 0 < answer.seconds <= time.monotonic() - renewed_at


# The source of tokens, with a clock -----------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """A token endpoint that gives what it is told to, and counts."""

    def __init__(self, *answers: Granted | Denied | Unavailable | BaseException) -> None:
        self.answers = list(answers)
        self.count = 0

    def __call__(self) -> Granted | Denied | Unavailable:
        self.count += 1
        answer = self.answers.pop(0) if self.answers else Granted(access_token=f"t{self.count}", expires_in=3600)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def a_token(source: TokenSource) -> Token:
    token = source.token()
    assert isinstance(token, Token), token
    return token


@pytest.mark.parametrize(("lifetime", "renewed_after"), [(100.0, 80.0), (3600.0, 3540.0), (86_400.0, 86_340.0)])
def test_a_token_is_renewed_ahead_of_its_end(lifetime: float, renewed_after: float) -> None:
    clock, asked = Clock(), Asked(Granted(access_token="t1", expires_in=lifetime))
    source = TokenSource(asked, clock=clock)
    first = a_token(source)

    clock.now += renewed_after - 0.1
    assert a_token(source) is first
    clock.now += 0.2
    assert a_token(source).value == "t2"
    assert asked.count == 2


def test_a_token_without_an_end_is_kept(api: HttpApi) -> None:
    clock, asked = Clock(), Asked(Granted(access_token="t1"))
    source = TokenSource(asked, clock=clock)
    first = a_token(source)
    clock.now += 1e9

    assert a_token(source) is first


def test_a_token_endpoint_may_be_down_while_the_token_lasts() -> None:
    """It is asked now and then, not with every request; only past the token's end is there none."""
    down = Unavailable(reason="the token endpoint is down")
    clock, asked = Clock(), Asked(Granted(access_token="t1", expires_in=100), *[down] * 50)
    source = TokenSource(asked, clock=clock)
    first = a_token(source)
    for second in range(100):
        clock.now = 1000.0 + second
        assert a_token(source) is first
    assert 2 <= asked.count <= 10

    clock.now = 1100.0
    outcome = source.token()
    assert outcome == NoAnswer(reason="the token endpoint is down", may_have_arrived=False)


def test_while_one_lane_renews_ahead_the_others_go_on() -> None:
    clock, asking, go_on = Clock(), threading.Event(), threading.Event()
    grants = iter([Granted(access_token="t1", expires_in=100), Granted(access_token="t2")])

    def ask() -> Granted:
        granted = next(grants)
        if granted.access_token == "t2":
            asking.set()
            assert go_on.wait(30)
        return granted

    source = TokenSource(ask, clock=clock)
    first = a_token(source)
    clock.now += 90
    with ThreadPoolExecutor(1) as lane:
        renewing = lane.submit(a_token, source)
        assert asking.wait(30)
        meanwhile = a_token(source)
        go_on.set()
        assert renewing.result(30).value == "t2"

    assert meanwhile is first


class Watched(TokenSource):
    """Says when so many lanes have joined a request for a token, and holds it until then."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(self._hold)
        self.asked = asked
        self.joined = threading.Semaphore(0)
        self.go_on = threading.Event()

    def _hold(self) -> Granted | Denied | Unavailable:
        assert self.go_on.wait(30)
        return self.asked()

    def _join(self) -> Any:
        self.joined.release()
        return super()._join()

    def together(self, lane: Callable[[], Any]) -> list[Any]:
        """Return what eight lanes get that all need a token at the same time."""
        with ThreadPoolExecutor(8) as lanes:
            outcomes = [lanes.submit(lane) for _ in range(8)]
            for _ in outcomes:
                assert self.joined.acquire(timeout=30)
            self.go_on.set()
            return [outcome.result(30) for outcome in outcomes]


def test_lanes_that_are_refused_together_wait_for_one_request() -> None:
    source = Watched(Asked())
    source.go_on.set()
    refused = a_token(source)
    refused.accepted = True
    source.go_on.clear()
    source.joined = threading.Semaphore(0)
    tokens = source.together(lambda: source.renew(refused))

    assert {token.value for token in tokens} == {"t2"}
    assert source.asked.count == 2


def test_lanes_share_the_failure_too() -> None:
    """Else each would wait its time-out out, one after another."""
    source = Watched(Asked(Unavailable(reason="down")))
    outcomes = source.together(source.token)

    assert outcomes == [NoAnswer(reason="down", may_have_arrived=False)] * 8
    assert source.asked.count == 1


def test_a_renewal_that_failed_is_tried_again_without_the_refused_token() -> None:
    asked = Asked(Granted(access_token="t1"), Unavailable(reason="down"))
    source = TokenSource(asked)
    refused = a_token(source)
    refused.accepted = True

    assert isinstance(source.renew(refused), NoAnswer)
    assert a_token(source).value == "t3"


def test_a_retry_after_is_waited_for() -> None:
    """Until then no lane asks."""
    clock, asked = Clock(), Asked(Unavailable(reason="answered 429", retry_after=60))
    source = TokenSource(asked, clock=clock)
    for _ in range(3):
        assert source.token() == NoAnswer(reason="answered 429", may_have_arrived=False)
    clock.now += 59
    assert isinstance(source.token(), NoAnswer)
    assert asked.count == 1

    clock.now += 2
    assert a_token(source).value == "t2"


def test_a_request_that_breaks_leaves_nobody_waiting() -> None:
    source = TokenSource(Asked(MemoryError()))
    with pytest.raises(MemoryError):
        source.token()

    assert a_token(source).value == "t2"


# A token endpoint that gives none -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(status=500, body=b"oops"), "answered 500 (oops)"),
        (Reply(status=503), "answered 503"),
        (Reply(status=429, headers={"Retry-After": "5"}), "answered 429"),
        (Reply(drop="after"), "cannot be reached: Server disconnected"),
        (Reply(head_pace=0.05), "gave no answer within 0.3 s"),
        (Reply(hold=threading.Event()), "gave no answer within 0.3 s"),
    ],
    ids=["500", "503", "429", "drop", "drip", "silence"],
)
def test_a_token_endpoint_that_is_unwell_is_the_targets_fault(
    api: HttpApi, guarded: Guarded, reply: Reply, reason: str
) -> None:
    guarded.token_reply = lambda _: reply
    answer = send(an_endpoint(api, timeout_seconds=0.3))

    assert isinstance(answer, NoAnswer)
    assert answer.reason.startswith(f"the token endpoint {api.url}/token {reason}")
    assert not answer.may_have_arrived
    assert guarded.sent == []


def test_a_token_endpoint_that_is_not_there_is_the_targets_fault(api: HttpApi) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/token?tenant=7"
    answer = send(an_endpoint(api, auth={"token_url": url}))

    assert isinstance(answer, NoAnswer)
    assert answer.reason.startswith(f"the token endpoint {url.partition('?')[0]} cannot be reached: ")
    assert not answer.may_have_arrived


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply.json({"error": "invalid_client"}, status=401), 'answered 401 ({"error": "invalid_client"})'),
        (Reply.json({"error": "invalid_scope"}, status=400), 'answered 400 ({"error": "invalid_scope"})'),
        (Reply(status=403), "answered 403"),
        (Reply(status=404), "answered 404"),
        (Reply(status=302, headers={"Location": "/login"}), "answered 302"),
        (
            Reply.json({"error": "invalid_client", "error_description": "no such client"}),
            "answered 200: (invalid_client) no such client",
        ),
        (Reply(body=b"<html>Sign in"), "answered 200: (missing_token)"),
        (Reply(body=b"\xff\xfe"), "answered 200, but not with a token as JSON"),
        (Reply(body=b"[]"), "answered 200, but not with a token as JSON"),
        (Reply.json({"access_token": "x", "token_type": "mac"}), "answered 200 with a token that is not of the type"),
        (Reply.json({"access_token": "a\nb"}), "answered 200 with a token that a header cannot carry"),
        (Reply.json({"access_token": ["x"]}), "answered 200 with a token that a header cannot carry"),
        (Reply.json({"access_token": ""}), "answered 200 with a token that a header cannot carry"),
        (Reply.json({"access_token": "x", "expires_in": "soon"}), "answered 200, but not with a token as JSON"),
    ],
)
def test_a_token_endpoint_that_refuses_pauses_the_target(
    api: HttpApi, guarded: Guarded, reply: Reply, said: str
) -> None:
    """A person must see to it; a 401 says so to the judge."""
    guarded.token_reply = lambda _: reply
    answer = send(an_endpoint(api))

    assert status(answer) == 401
    assert isinstance(answer, Answer)
    assert answer.body.decode().startswith(f"the token endpoint {api.url}/token {said}")
    assert guarded.sent == []


def test_a_refusal_by_the_token_endpoint_when_renewing_pauses_the_target(api: HttpApi, guarded: Guarded) -> None:
    where = an_endpoint(api)
    send(where)
    guarded.revoke()
    guarded.token_reply = lambda _: Reply(status=400)
    answer = send(where)

    assert isinstance(answer, Answer)
    assert (answer.status, answer.body) == (401, f"the token endpoint {api.url}/token answered 400".encode())


@pytest.mark.parametrize("lifetime", [0, -5, None, "3600", 3600.5])
def test_a_lifetime_may_be_missing_or_oddly_written(api: HttpApi, guarded: Guarded, lifetime: Any) -> None:
    """An end of 0 seconds would ask for a token with every request."""
    guarded.token_reply = lambda token: Reply.json({"access_token": token, "expires_in": lifetime})
    answer = send(an_endpoint(api), times=3)

    assert status(answer) == 200
    assert guarded.minted == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["access_token", "token_type", "expires_in", "expires_at", "scope", "error", "error_uri"])


@settings(deadline=None)  # the parser is loaded with its first use
@given(st.binary(max_size=40) | st.dictionaries(FIELDS, JSON).map(lambda found: json.dumps(found).encode()))
def test_whatever_a_token_endpoint_says_is_a_grant_or_a_refusal(body: bytes) -> None:
    where = TokenEndpoint(url="http://api.test/token", client_id="me", client_secret="s3cret")
    outcome = where._read(200, {}, body)

    assert isinstance(outcome, Granted | Denied)
    if isinstance(outcome, Granted):
        f"Bearer {outcome.access_token}".encode("ascii")
        assert outcome.expires_in > 0


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["basic", "body"])
def test_a_token_endpoint_that_echoes_the_secret_does_not_get_it_into_the_answer(
    api: HttpApi, guarded: Guarded, where: str
) -> None:
    secret = SECRETS["SECRET"]
    pair = base64.b64encode(b"me:s3cr3t%2Fwith%2Bmore%26than%3Dthat")
    echo = b" ".join([secret.encode(), json.dumps(secret).encode(), b"s3cr3t%2Fwith%2Bmore%26than%3Dthat", pair])
    target = an_endpoint(api, auth={"client_authentication": where})
    for reply in (
        Reply(status=401, body=echo),
        Reply(status=500, body=echo),
        Reply.json({"error": "invalid_client", "error_description": secret}),
    ):
        guarded.token_reply = lambda _, reply=reply: reply
        answer = send(target)
        said = answer.reason if isinstance(answer, NoAnswer) else answer.body.decode()
        assert "[redacted]" in said
        assert "s3cr3t" not in said
        assert pair.decode() not in said


def test_a_target_that_echoes_tokens_does_not_get_them_into_the_answer(api: HttpApi, guarded: Guarded) -> None:
    """Neither the one that was sent nor the one before."""
    where = an_endpoint(api)
    echo = Reply(status=401, body=b"t0ken-1 t0ken-2", headers={"WWW-Authenticate": "Bearer t0ken-2, t0ken-1"})
    guarded.refusal = echo
    send(where)
    guarded.revoke()
    guarded.accepts_what_it_mints = False
    answer = send(where)

    assert isinstance(answer, Answer)
    assert guarded.minted == 2
    assert answer.body == b"[redacted] [redacted]"
    assert answer.headers["www-authenticate"] == "Bearer [redacted], [redacted]"


def test_a_token_in_an_answer_that_cannot_be_used_is_not_shown(api: HttpApi, guarded: Guarded) -> None:
    guarded.token_reply = lambda token: Reply(body=b'{"id_token": "t0ken-1"')
    answer = send(an_endpoint(api))

    assert isinstance(answer, Answer)
    assert b"t0ken" not in answer.body


def test_secrets_are_in_no_repr(api: HttpApi, guarded: Guarded) -> None:
    where = an_endpoint(api)
    send(where)
    assert where.tokens is not None
    token = where.tokens.token()
    grants = TokenEndpoint(url="http://api.test", client_id="me", client_secret="s3cr3t-x")
    shown = repr([where, where.tokens, token, grants, Granted(access_token="t0ken-9")])

    assert "s3cr3t" not in shown
    assert "t0ken" not in shown


# A drain --------------------------------------------------------------------------------------------------------------


def drained(api: HttpApi, ledger: FakeLedger, **config: Any) -> DrainReport:
    upsert = {"path": "/rows", "batch": {"max_records": 5}}
    target = configured(api, max_in_flight=4, routes={"customers": {"upsert": upsert}}, **config)
    where = endpoint(target, SECRETS.__getitem__)
    with ledger.open_target("api", run_id="run") as target_ledger:
        assert target_ledger is not None
        return drain(
            policy=policy_of(target),
            routes=compile_routes(target),
            ledger=target_ledger,
            connect=lambda: HttpTargetClient(where),
            clock=SystemClock(),
            limits=DrainLimits(),
        )


def a_ledger(records: int = 200) -> FakeLedger:
    changes: Sequence[Any] = [change(i) for i in range(1, records + 1)]
    return FakeLedger(targets={"api": "beginning"}, changes=changes, clock=SystemClock())


def test_a_token_that_ends_within_a_drain_costs_it_no_retry(api: HttpApi, guarded: Guarded) -> None:
    answer, once = guarded._answer, threading.Lock()

    def end_once(request: Request) -> Reply:
        if len(guarded.sent) >= 20 and once.acquire(blocking=False):
            guarded.revoke()
        return answer(request)

    api.script(end_once)
    report = drained(api, a_ledger())

    assert (report.end, report.total("accepted"), report.retries) == ("caught_up", 200, 0)
    assert guarded.minted == 2
    taken = [row["change"] for request in api.applied if request.path != "/token" for row in request.records]
    assert sorted(taken) == list(range(1, 201))


def test_a_drain_whose_client_is_unknown_pauses_and_buries_nothing(api: HttpApi, guarded: Guarded) -> None:
    guarded.token_reply = lambda _: Reply.json({"error": "invalid_client"}, status=401)
    report = drained(api, a_ledger())

    assert (report.end, report.total("dead"), report.total("accepted")) == ("paused", 0, 0)
    assert report.reason is not None
    assert f"the token endpoint {api.url}/token answered 401" in report.reason
    assert "credentials refused" in report.reason


@pytest.mark.parametrize("field", ["drop_on", "success_on"])
@pytest.mark.parametrize("statuses", [[401], [401, 403, 419, 440, 498]])
def test_a_token_that_is_denied_is_no_answer_about_records(
    api: HttpApi, guarded: Guarded, field: str, statuses: list[int]
) -> None:
    """Even where the file gives 401 a meaning of its own."""
    guarded.token_reply = lambda _: Reply(status=400)
    report = drained(api, a_ledger(), **{field: statuses})

    assert (report.end, report.total("dead"), report.total("accepted")) == ("paused", 0, 0)


def test_a_drain_whose_token_endpoint_is_down_defers(api: HttpApi, guarded: Guarded) -> None:
    guarded.token_reply = lambda _: Reply(status=503)
    report = drained(api, a_ledger(), retry={"initial_backoff": 0.01, "max_elapsed": 0.05})

    assert (report.end, report.total("dead"), guarded.sent) == ("deferred", 0, [])
    assert report.reason is not None
    assert "the token endpoint" in report.reason
