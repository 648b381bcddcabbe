"""Get a target's access tokens and share them among its lanes: OAuth 2.0 client credentials (RFC 6749 §4.4)."""

import base64
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from urllib.parse import quote_plus

import httpx

from pipelines.delivery.judging import excerpt
from pipelines.delivery.retrying import retry_after_seconds
from pipelines.delivery.target import Answer, NoAnswer
from resources.http_wire import Wire, open_client, read_body
from resources.redaction import redact, redact_text, spellings

_MAX_ANSWER_BYTES = 100_000
_TRANSIENT = frozenset({408, 425, 429, *range(500, 600)})
# Of a token's life: so early a newer one is asked for, but no more seconds than these.
_AHEAD = 0.2
_LONGEST_AHEAD = 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class Token:
    """An access token. Its `repr` does not show it."""

    value: str = field(repr=False)
    renew_at: float = inf
    """Monotonic seconds: from here on a newer one is asked for."""
    expires_at: float = inf
    secrets: tuple[bytes, ...] = field(repr=False, default=())
    """What an answer must not show: this token and the one before, as they may be spelled."""
    accepted: bool = False
    """Whether the target ever took it. Set by whoever sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """The token endpoint is unwell: it may be asked again, but not before `retry_after` seconds."""

    reason: str
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """The token endpoint answered, but not with a token: a person must see to it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """An access token and the seconds that it is good for, if that is known."""

    access_token: str = field(repr=False)
    expires_in: float = inf


_Outcome = Token | Answer | NoAnswer


class TokenSource:
    """One target's current token, for all of its lanes. Whoever needs a new one first asks; the others wait for it."""

    def __init__(
        self,
        ask: Callable[[], Granted | Denied | Unavailable],
        *,
        denied_as: int = 401,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._denied_as = denied_as
        self._clock = clock
        self._lock = threading.Lock()
        self._token: Token | None = None
        self._spelled: tuple[bytes, ...] = ()
        self._flight: Future[_Outcome] | None = None
        self._quiet_until = -inf
        self._why_quiet = ""

    def token(self) -> _Outcome:
        """Return a token that has not expired, or what the request that wanted it comes to."""
        with self._lock:
            token, now = self._token, self._clock()
            if token is not None and (now < token.renew_at or (self._flight is not None and now < token.expires_at)):
                return token
            flight, mine = self._join()
        outcome = self._land(flight) if mine else flight.result()
        if not isinstance(outcome, Token) and token is not None and (now := self._clock()) < token.expires_at:
            # Renewed ahead of time so that a token endpoint may be down for a while: half of what is left, then again.
            token.renew_at = now + max(1.0, (token.expires_at - now) / 2)
            return token
        return outcome

    def at_hand(self) -> Token | None:
        """Return the token if nobody has to be asked for it."""
        with self._lock:
            token = self._token
            return token if token is not None and self._clock() < token.renew_at else None

    def renew(self, refused: Token) -> _Outcome | None:
        """Return the token after *refused*, which the target no longer takes; None if it never took it.

        When all lanes are refused at once one asks, and the others get what it brought. A token that was refused from
        the beginning would be followed by another such: the refusal is then the answer.
        """
        with self._lock:
            if self._token is not None and self._token is not refused:
                return self._token
            if self._flight is None and not refused.accepted:
                return None
            self._token = None
            flight, mine = self._join()
        return self._land(flight) if mine else flight.result()

    def _join(self) -> tuple[Future[_Outcome], bool]:
        """Return the request for a token that is out, or a new one, and whether it is the caller's to make."""
        if self._flight is not None:
            return self._flight, False
        self._flight = Future()
        return self._flight, True

    def _land(self, flight: Future[_Outcome]) -> _Outcome:
        try:
            outcome = self._mint()
        except BaseException as error:
            with self._lock:
                self._flight = None
            flight.set_exception(error)  # nobody waits for ever
            raise
        with self._lock:
            self._flight = None
            if isinstance(outcome, Token):
                self._token = outcome
        flight.set_result(outcome)
        return outcome

    def _mint(self) -> _Outcome:
        asked_at = self._clock()
        if asked_at < self._quiet_until:
            return NoAnswer(reason=self._why_quiet, may_have_arrived=False)
        match self._ask():
            case Granted() as granted:
                spelled = spellings([granted.access_token])
                expires_at = asked_at + granted.expires_in
                ahead = min(_AHEAD * granted.expires_in, _LONGEST_AHEAD)
                earlier, self._spelled = self._spelled, spelled
                return Token(
                    value=granted.access_token,
                    renew_at=expires_at - ahead,
                    expires_at=expires_at,
                    secrets=spelled + earlier,
                )
            case Unavailable() as unwell:
                if unwell.retry_after:
                    self._quiet_until, self._why_quiet = self._clock() + unwell.retry_after, unwell.reason
                return NoAnswer(reason=unwell.reason, may_have_arrived=False)
            case Denied() as denied:
                # As if the target itself had refused: it pauses for its credentials, and a probe asks again.
                return Answer(status=self._denied_as, body=denied.reason.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEndpoint:
    """Where tokens come from, and who asks for them."""

    url: str
    client_id: str
    client_secret: str = field(repr=False)
    scope: str | None = None
    audience: str | None = None
    credentials_in_body: bool = False
    timeout_seconds: float = 15.0
    longest_retry_after: float = 3600.0

    def secrets(self) -> tuple[bytes, ...]:
        """Return what no message may show, as it may be spelled."""
        return spellings([self.client_secret, self.basic()])

    def ask(self) -> Granted | Denied | Unavailable:
        """Ask for a token, once, on a connection of its own. Raises nothing for what the network does."""
        wire = Wire()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if not self.credentials_in_body:
            headers["Authorization"] = f"Basic {self.basic()}"
        with closing(open_client(wire=wire, headers=headers, timeout_seconds=self.timeout_seconds)) as client:
            wire.begin(give_up_at=time.monotonic() + self.timeout_seconds)
            try:
                with client.stream("POST", self.url, content=self._body()) as response:
                    body, _ = read_body(response, limit=_MAX_ANSWER_BYTES)
            except httpx.InvalidURL as error:
                return Denied(reason=f"{self._name}: {error}")
            except httpx.TimeoutException:
                return Unavailable(reason=f"{self._name} gave no answer within {self.timeout_seconds:g} s")
            except (httpx.HTTPError, httpx.StreamError, UnicodeError) as error:
                said = redact_text(str(error), self.secrets())[:200] or type(error).__name__
                return Unavailable(reason=f"{self._name} cannot be reached: {said}")
        return self._read(response.status_code, response.headers, body)

    @property
    def _name(self) -> str:
        return f"the token endpoint {self.url.partition('?')[0]}"

    def basic(self) -> str:
        """Return the client's name and password, each encoded as in a form (RFC 6749 §2.3.1)."""
        return base64.b64encode(f"{quote_plus(self.client_id)}:{quote_plus(self.client_secret)}".encode()).decode()

    def _body(self) -> bytes:
        # Loaded only where it is used: most deployments speak no OAuth.
        from oauthlib.oauth2 import BackendApplicationClient

        more = {"audience": self.audience} if self.audience is not None else {}
        if self.credentials_in_body:
            more["client_secret"] = self.client_secret
        body: str = BackendApplicationClient(self.client_id).prepare_request_body(
            scope=self.scope, include_client_id=self.credentials_in_body, **more
        )
        return body.encode()

    def _read(self, status: int, headers: Mapping[str, str], body: bytes) -> Granted | Denied | Unavailable:
        answered = f"{self._name} answered {status}"
        if not 200 <= status < 300:
            said = excerpt(redact(body, self.secrets()))
            answered += f" ({said})" if said else ""
            if status not in _TRANSIENT:
                return Denied(reason=answered)
            asked = retry_after_seconds(
                headers.get("retry-after"), now=datetime.now(UTC), longest=self.longest_retry_after
            )
            return Unavailable(reason=answered, retry_after=asked or 0.0)
        return self._granted(answered, body)

    def _granted(self, answered: str, body: bytes) -> Granted | Denied:
        from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error

        try:
            found = BackendApplicationClient(self.client_id).parse_request_body_response(body.decode())
        except OAuth2Error as error:
            return Denied(reason=redact_text(f"{answered}: {error}", self.secrets()))
        except Exception:  # whatever a parser makes of what is no such answer
            # Nothing of the body is said: it may hold a token in a form that is not known here.
            return Denied(reason=f"{answered}, but not with a token as JSON (RFC 6749 §5.1)")
        token, kind, lifetime = found["access_token"], found.get("token_type", "bearer"), found.get("expires_in")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token or not token:
            return Denied(reason=f"{answered} with a token that a header cannot carry")
        if not isinstance(kind, str) or kind.lower() != "bearer":
            return Denied(reason=f"{answered} with a token that is not of the type Bearer")
        # Some answer 0 where they mean that they do not say.
        return Granted(access_token=token, expires_in=float(lifetime) if lifetime and lifetime > 0 else inf)
