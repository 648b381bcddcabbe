"""Target APIs over HTTP: one connection for each lane, behind the port of `pipelines.delivery.target`."""

import base64
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import urlencode
from urllib.request import getproxies
from uuid import UUID

import httpx

from pipelines.delivery.config import (
    ApiKeyAuth,
    BasicAuth,
    BearerAuth,
    OAuth2ClientCredentialsAuth,
    Secret,
    TargetConfig,
)
from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.target import Answer, Multiplexer, NoAnswer
from resources.http_answer import Reply, answer_of
from resources.http_direct import DirectConnection
from resources.http_multiplexer import Flight, FlyingClient, HttpMultiplexer
from resources.http_wire import Wire, every_header, headers_as_sent, open_client, read_body
from resources.oauth import Token, TokenEndpoint, TokenSource
from resources.redaction import redact_text, spellings

# How targets say that a token has ended; 419, 440 and 498 are unofficial.
_TOKEN_REFUSED = frozenset({401, 403, 419, 440, 498})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a target is and how to speak to it, secrets resolved. Its `repr` shows none of them."""

    base_url: str
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    query: str = field(repr=False, default="")
    """A part of every request's query, percent-encoded."""
    secrets: tuple[bytes, ...] = field(repr=False, default=())
    tokens: TokenSource | None = field(repr=False, default=None)
    """Shared by every lane of a drain, so that a token is renewed once for all of them."""
    renew_on: frozenset[int] = _TOKEN_REFUSED
    """Statuses that call for a newer token."""
    success_on: frozenset[int] = frozenset()
    """Statuses of 400 and more that refuse nothing."""
    timeout_seconds: float = 15.0
    max_response_bytes: int = 1_000_000


def endpoint(config: TargetConfig, secret: Callable[[str], str]) -> Endpoint:
    """Resolve *config*'s auth and headers; *secret* returns an environment variable's value or raises ConfigError.

    It is made once for a drain: its lanes share what it holds.
    """
    headers: dict[str, str] = {}
    query = ""
    secrets: list[str] = []
    tokens: TokenSource | None = None
    renew_on = _TOKEN_REFUSED - _meanings_of_their_own(config)

    def resolve(value: str | Secret) -> str:
        if isinstance(value, str):
            return value
        found = secret(value.env)
        secrets.append(found)
        return found

    auth = config.auth
    if isinstance(auth, BearerAuth):
        headers["Authorization"] = f"Bearer {resolve(auth.token)}"
    elif isinstance(auth, BasicAuth):
        # The name is no secret; redacted, it could be torn out of an answer that speaks of records.
        username = auth.username if isinstance(auth.username, str) else secret(auth.username.env)
        pair = f"{username}:{resolve(auth.password)}"
        encoded = base64.b64encode(pair.encode()).decode()
        secrets.append(encoded)
        headers["Authorization"] = f"Basic {encoded}"
    elif isinstance(auth, ApiKeyAuth):
        if auth.header is not None:
            headers[auth.header] = resolve(auth.key)
        else:
            assert auth.query is not None  # the configuration asks for one of the two
            query = urlencode({auth.query: resolve(auth.key)})
            secrets.append(query.partition("=")[2])
    elif isinstance(auth, OAuth2ClientCredentialsAuth):
        client_id = auth.client_id if isinstance(auth.client_id, str) else secret(auth.client_id.env)
        grants = TokenEndpoint(
            url=auth.token_url,
            client_id=client_id,
            client_secret=resolve(auth.client_secret),
            scope=auth.scope,
            audience=auth.audience,
            credentials_in_body=auth.client_authentication == "body",
            timeout_seconds=config.timeout_seconds,
            longest_retry_after=config.retry.max_retry_after,
        )
        # A token that is denied is no record's fault, even where the file takes a 401 for that.
        tokens = TokenSource(grants.ask, denied_as=min(renew_on, default=407))
        secrets.append(grants.basic())
    for name, value in config.headers.items():
        headers[name] = resolve(value)
    return Endpoint(
        base_url=str(config.base_url).rstrip("/"),
        headers=headers,
        query=query,
        secrets=spellings(secrets),
        tokens=tokens,
        renew_on=renew_on,
        success_on=frozenset(config.success_on),
        timeout_seconds=config.timeout_seconds,
        max_response_bytes=config.max_response_bytes,
    )


def _meanings_of_their_own(config: TargetConfig) -> frozenset[int]:
    """Return the statuses by which the target says something else than that a token has ended."""
    sent_again = set(config.retryable_status_codes) - {401}  # sending it again is not enough if the token has ended
    return frozenset(sent_again | set(config.success_on) | set(config.drop_on))


class HttpTargetClient(FlyingClient):
    """One lane's connection to a target. Redirects are never followed; bodies are read up to a limit."""

    def __init__(self, endpoint: Endpoint, *, transport: httpx.BaseTransport | None = None) -> None:
        self._endpoint = endpoint
        self._wire = Wire()
        self._transport = transport
        self._client: httpx.Client | None = None
        """For what does not go without; made when there is something."""
        self._lost_after: float | None = None
        """Seconds for which the next request was out before, on a connection that broke without a word."""
        self._refusal: tuple[UUID, Token, Answer | NoAnswer] | None = None
        """The key of a request whose token was refused when it was out already, that token, and the answer."""
        self._direct: DirectConnection | None = None
        with suppress(httpx.InvalidURL):  # which is the client's to say
            if transport is None and not self._goes_by_proxy():
                headers = every_header(endpoint.headers)
                self._direct = DirectConnection(endpoint.base_url, wire=self._wire, headers=headers)

    def _goes_by_proxy(self) -> bool:
        """Say whether httpx would send requests by a proxy of the environment. It is asked only if there is any."""
        proxies = getproxies()
        if not any(map(proxies.get, ("http", "https", "all"))):
            return False
        client = self._opened()
        return client._transport_for_url(httpx.URL(self._endpoint.base_url)) is not client._transport

    def _opened(self) -> httpx.Client:
        if self._client is None:
            self._client = open_client(
                wire=self._wire,
                headers=self._endpoint.headers,
                timeout_seconds=self._endpoint.timeout_seconds,
                transport=self._transport,
            )
        return self._client

    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        """Send *request*; a second time at once if its token has ended, or if a kept connection had."""
        tokens = self._endpoint.tokens
        if tokens is None:
            return self._exchange(request, key)
        refusal, self._refusal = self._refusal, None
        if refusal is not None and refusal[0] == key:
            _, token, answer = refusal
        else:
            found = tokens.token()
            if not isinstance(found, Token):
                lost = self._lost_after is not None  # it went out with the token before
                return replace(found, may_have_arrived=True) if lost and isinstance(found, NoAnswer) else found
            token, answer = found, self._exchange(request, key, found)
        if self._refuses_token(answer) and (newer := tokens.renew(token)) is not None:
            if not isinstance(newer, Token):
                return newer
            token, answer = newer, self._exchange(request, key, newer)
        if isinstance(answer, Answer) and answer.status < 500 and not self._refuses_token(answer):
            token.accepted = True
        return answer

    def multiplexer(self) -> Multiplexer:
        return HttpMultiplexer()

    def depart(self, request: HttpRequest, *, key: UUID) -> Flight | None:
        tokens, token = self._endpoint.tokens, None
        if (
            self._direct is None
            or self._lost_after is not None
            or (tokens is not None and (token := tokens.at_hand()) is None)
        ):
            return None
        try:
            data = self._direct.bytes_of(
                request.method,
                self._path_of(request),
                body=request.body,
                headers=_headers_of(request, token),
                key=str(key),
            )
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError):
            return None  # `send` puts it into words
        kept = self._direct.kept_socket()
        if kept is None:
            return None
        return Flight(
            self._direct,
            kept,
            data,
            secrets=self._secrets_with(token),
            timeout_seconds=self._endpoint.timeout_seconds,
            limit=self._endpoint.max_response_bytes,
            refuses=self._refuses,
            arrived=partial(self._arrived, key, token, time.monotonic()),
        )

    def _refuses(self, status: int) -> bool:
        return status >= 400 and status not in self._endpoint.success_on

    def _arrived(
        self, key: UUID, token: Token | None, started: float, answer: Answer | NoAnswer | None
    ) -> Answer | NoAnswer | None:
        """Say what a flight's end is worth: None if the same request has to be sent again, with a newer token or so."""
        if answer is None:
            self._lost_after = time.monotonic() - started
        elif token is not None and isinstance(answer, Answer):
            if self._refuses_token(answer):
                self._refusal = key, token, answer
                return None
            token.accepted |= answer.status < 500
        return answer

    def _secrets_with(self, token: Token | None) -> tuple[bytes, ...]:
        return self._endpoint.secrets if token is None else self._endpoint.secrets + token.secrets

    def _refuses_token(self, answer: Answer | NoAnswer) -> bool:
        return isinstance(answer, Answer) and answer.status in self._endpoint.renew_on

    def _exchange(self, request: HttpRequest, key: UUID, token: Token | None = None) -> Answer | NoAnswer:
        """Send *request* and read the answer, all within `timeout_seconds`."""
        lost_after, self._lost_after = self._lost_after, None
        started, sent_before = time.monotonic() - (lost_after or 0.0), lost_after is not None
        give_up_at = started + self._endpoint.timeout_seconds
        secrets = self._secrets_with(token)
        headers, path = _headers_of(request, token), self._path_of(request)
        while True:
            self._wire.begin(give_up_at=give_up_at)
            try:
                reply = self._send_once(request, path, headers, str(key))
                return answer_of(reply, secrets, started)
            except httpx.InvalidURL as error:
                # The base URL was checked when it was loaded, so it is the record's key that makes this one too long.
                return Answer(status=414, body=f"not sent: {error}".encode())
            except (httpx.HTTPError, httpx.StreamError, UnicodeError) as error:
                broke = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
                if broke and self._wire.mute and not sent_before:
                    # Most likely the target had closed the connection before the request was there (RFC 9112 §9.3.1).
                    # If not, the key lets it tell a repeat, so the same goes out once more, on a new connection.
                    sent_before = True
                    continue
                return self._no_answer(error, secrets, started, sent_before=sent_before)

    def _path_of(self, request: HttpRequest) -> str:
        query = self._endpoint.query
        if not query:
            return request.path
        # Not as httpx's `params`: those take the place of the path's own query.
        return f"{request.path}{'&' if '?' in request.path else '?'}{query}"

    def _send_once(self, request: HttpRequest, path: str, headers: dict[str, str], key: str) -> Reply:
        method, body, limit = request.method, request.body, self._endpoint.max_response_bytes
        if self._direct is not None:
            return self._direct.exchange(method, path, body=body, headers=headers, key=key, limit=limit)
        headers = headers | {"Idempotency-Key": key}
        url = self._endpoint.base_url + path
        with self._opened().stream(method, url, content=body, headers=headers) as response:
            said, truncated = read_body(response, limit=limit)
        return Reply(response.status_code, headers_as_sent(response), said, truncated)

    def _no_answer(
        self, error: Exception, secrets: tuple[bytes, ...], started: float, *, sent_before: bool
    ) -> NoAnswer:
        never_left = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
        never_left |= isinstance(error, UnicodeError) and not self._wire.spoke  # a host's name that is none
        if isinstance(error, httpx.TimeoutException):
            what = f"no {'connection' if never_left else 'answer'} within {self._endpoint.timeout_seconds:g} s"
        else:
            said = redact_text(str(error), secrets)[:200] or type(error).__name__
            what = f"{'cannot connect' if never_left else 'the connection broke'}: {said}"
        return NoAnswer(
            reason=f"the connection was closed; then {what}" if sent_before and never_left else what,
            may_have_arrived=sent_before or not never_left,
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        if self._client is not None:
            self._client.close()


def _headers_of(request: HttpRequest, token: Token | None) -> dict[str, str]:
    headers = {}
    if request.content_type is not None:
        headers["Content-Type"] = request.content_type
    if request.compressed:
        headers["Content-Encoding"] = "gzip"
    if token is not None:
        headers["Authorization"] = f"Bearer {token.value}"
    return headers
