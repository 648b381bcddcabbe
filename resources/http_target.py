"""Target APIs over HTTP: one `httpx.Client` for each lane, behind the port of `pipelines.delivery.target`."""

import base64
import json
import logging
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import quote, urlencode
from uuid import UUID

import httpx

from pipelines.delivery.config import ApiKeyAuth, BasicAuth, BearerAuth, Secret, TargetConfig
from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.target import Answer, NoAnswer, TargetClient

_USER_AGENT = "distributary/0.1"
_REDACTED = b"[redacted]"
_SHORTEST_SECRET = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a target is and how to speak to it, secrets resolved. Its `repr` shows none of them."""

    base_url: str
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    query: str = field(repr=False, default="")
    """A part of every request's query, percent-encoded."""
    secrets: tuple[bytes, ...] = field(repr=False, default=())
    timeout_seconds: float = 15.0
    max_response_bytes: int = 1_000_000


def endpoint(config: TargetConfig, secret: Callable[[str], str]) -> Endpoint:
    """Resolve *config*'s auth and headers; *secret* returns an environment variable's value or raises ConfigError."""
    headers: dict[str, str] = {"User-Agent": _USER_AGENT, "Accept": "application/json", "Accept-Encoding": "identity"}
    query = ""
    secrets: list[str] = []

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
        username = resolve(auth.username)
        secrets.clear()  # a name is none; redacted, it could be torn out of an answer that speaks of records
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
    for name, value in config.headers.items():
        headers[name] = resolve(value)
    return Endpoint(
        base_url=str(config.base_url).rstrip("/"),
        headers=headers,
        query=query,
        secrets=_spellings(secrets),
        timeout_seconds=config.timeout_seconds,
        max_response_bytes=config.max_response_bytes,
    )


def _spellings(secrets: Iterable[str]) -> tuple[bytes, ...]:
    """Return *secrets* as a target may echo them: as they are, percent-encoded, in JSON with slashes escaped or not."""
    found: set[str] = set()
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            as_json = json.dumps(secret)[1:-1]
            found |= {secret, quote(secret, safe=""), as_json, as_json.replace("/", "\\/")}
    return tuple(sorted((one.encode() for one in found), key=len, reverse=True))


@cache
def _ssl_context() -> ssl.SSLContext:
    """Read the certificates once: it takes longer than a request, and each lane has a client of its own."""
    return httpx.create_ssl_context()


class HttpTargetClient(TargetClient):
    """One lane's connection to a target. Redirects are never followed; bodies are read up to a limit."""

    def __init__(self, endpoint: Endpoint, *, transport: httpx.BaseTransport | None = None) -> None:
        self._endpoint = endpoint
        # It writes every URL down, the key in its query included.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._client = httpx.Client(
            headers=endpoint.headers,
            timeout=httpx.Timeout(endpoint.timeout_seconds),
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
            follow_redirects=False,
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),  # a repeat is the same bytes
            verify=_ssl_context(),
            transport=transport,
        )

    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        started = time.monotonic()
        headers = {"Idempotency-Key": str(key)}
        if request.content_type is not None:
            headers["Content-Type"] = request.content_type
        if request.compressed:
            headers["Content-Encoding"] = "gzip"
        url = self._endpoint.base_url + request.path
        if self._endpoint.query:
            # Not as httpx's `params`: those take the place of the path's own query.
            url += ("&" if "?" in request.path else "?") + self._endpoint.query
        try:
            with self._client.stream(request.method, url, content=request.body, headers=headers) as response:
                body, truncated = self._read(response, give_up_at=started + self._endpoint.timeout_seconds)
                return Answer(
                    status=response.status_code,
                    headers={name.lower(): self._redact_text(value) for name, value in response.headers.items()},
                    body=self._redact(body),
                    truncated=truncated,
                    seconds=time.monotonic() - started,
                )
        except httpx.InvalidURL as error:
            # The base URL was checked when it was loaded, so it is the record's key that makes this one too long.
            return Answer(status=414, body=f"not sent: {error}".encode())
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            return self._no_answer(error, started, may_have_arrived=False)
        except (httpx.HTTPError, httpx.StreamError) as error:
            return self._no_answer(error, started, may_have_arrived=True)

    def _read(self, response: httpx.Response, *, give_up_at: float) -> tuple[bytes, bool]:
        """Return the body up to the limit, and whether it was cut: by its length, its time, or the connection.

        The status is known by now, so a body that breaks off is an answer all the same.
        """
        chunks: list[bytes] = []
        room = self._endpoint.max_response_bytes
        try:
            for chunk in response.iter_bytes():
                chunks.append(chunk[:room])
                room -= len(chunk)
                if room < 0 or time.monotonic() > give_up_at:
                    # Leaving the stream unread closes the connection; the next request opens another.
                    return b"".join(chunks), True
        except (httpx.HTTPError, httpx.StreamError):
            return b"".join(chunks), True
        return b"".join(chunks), False

    def _no_answer(self, error: Exception, started: float, *, may_have_arrived: bool) -> NoAnswer:
        if isinstance(error, httpx.ConnectTimeout):
            what = f"no connection within {self._endpoint.timeout_seconds:g} s"
        elif isinstance(error, httpx.TimeoutException):
            what = f"no answer within {self._endpoint.timeout_seconds:g} s"
        elif may_have_arrived:
            what = f"the connection broke: {self._redact_text(str(error))[:200] or type(error).__name__}"
        else:
            what = f"cannot connect: {self._redact_text(str(error))[:200] or type(error).__name__}"
        return NoAnswer(reason=what, may_have_arrived=may_have_arrived, seconds=time.monotonic() - started)

    def _redact(self, text: bytes) -> bytes:
        for secret in self._endpoint.secrets:
            if secret in text:
                text = text.replace(secret, _REDACTED)
        return text

    def _redact_text(self, text: str) -> str:
        return self._redact(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")

    def close(self) -> None:
        self._client.close()
