"""List a target's records page by page: where a page is asked for, what an answer says, when the list is at its end.

"Could not be read" is never "is not there": whatever is not a whole page, or leads nowhere, raises ListingFailed.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from threading import Condition
from typing import Any
from urllib.parse import parse_qsl, quote, urljoin, urlsplit
from uuid import NAMESPACE_URL, uuid5

import msgspec
import tenacity

from pipelines.delivery.clock import Clock
from pipelines.delivery.judging import JudgingRules, excerpt
from pipelines.delivery.rate_limit import TokenBucket
from pipelines.delivery.reading import CursorPaging, LinkPaging, NextUrlPaging, NumberedPaging, OffsetPaging, ReadConfig
from pipelines.delivery.retrying import backoff, retry_after_seconds
from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.sections import JsonPath
from pipelines.delivery.sending import RetryPolicy
from pipelines.delivery.target import Answer, NoAnswer, TargetClient
from pipelines.reconciliation.compare import decode, number_text

_RETRIED = frozenset({408, 420, 421, 423, 425, 429, 430, 500, 502, 503, 504})
_LONGEST_KEY = 2600
"""Bytes; an index of Postgres holds little more, the source's own too."""
_WITHOUT_NEWS = 10
"""So many pages in a row with nothing on them but what was listed before are a circle."""


class ListingFailed(Exception):
    """The target's list cannot be read: a sentence that says why. What was listed before it stands."""


class PositionLost(ListingFailed):
    """The target does not know any more where an interrupted listing was."""


class NotThere(PositionLost):
    """404 or 410: what was asked for is not at the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What one answer says."""

    records: Mapping[str, bytes]
    """By key, the part of each that is compared, as JSON."""
    unkeyed: int
    """Records that have no key of the source's: the target's own."""
    next: str | None
    """The path of the next page; None: there is none."""
    total: int | None


def match_key(values: Sequence[Any]) -> str:
    """Return the text by which a record is matched with a source row, from its key column by column."""
    texts = [_key_text(value) for value in values]
    return texts[0] if len(texts) == 1 else msgspec.json.format(msgspec.json.encode(texts), indent=0).decode()


def _key_text(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Decimal():
            return number_text(value)
        case _:
            return str(value)


def first_path(read: ReadConfig) -> str:
    """Return the path of the first page."""
    page = read.page
    given: dict[str, object] = {}
    if page is not None and page.size is not None and page.size_parameter is not None:
        given[page.size_parameter] = page.size
    if isinstance(page, OffsetPaging):
        given[page.parameter] = 0
    elif isinstance(page, NumberedPaging):
        given[page.parameter] = page.first
    return _with(read.path, given)


def read_page(read: ReadConfig, answer: Answer, *, path: str, base_url: str) -> Page:
    """Read the *answer* to a request for *path*; raises ListingFailed."""
    if answer.truncated:
        raise ListingFailed(
            "a page was cut short: the connection broke, or it is larger than read.max_response_bytes "
            f"({read.max_response_bytes:,}); lower page.size or raise that"
        )
    try:
        document = _document(answer.body.removeprefix(BOM_UTF8))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ListingFailed(f"a page is not JSON: {excerpt(answer.body)[:200] or 'it is empty'}") from None
    try:
        items = read.items.find(document)
    except LookupError:
        raise ListingFailed(f"a page has no list at {read.items.text}: {excerpt(answer.body)[:200]}") from None
    if not isinstance(items, list):
        raise ListingFailed(f"what a page has at {read.items.text} is not a list: {excerpt(answer.body)[:200]}")
    records: dict[str, bytes] = {}
    unkeyed = 0
    for item in items:
        values = [_found(item, at) for at in read.key]
        match = match_key(values)
        odd = "\x00" in match or len(match.encode()) > _LONGEST_KEY
        if odd or any(value is None or isinstance(value, dict | list) for value in values):
            unkeyed += 1
            continue
        records[match] = _encode(_found(item, read.item))
    if items and not records and path == first_path(read):
        where = ", ".join(at.text for at in read.key)
        raise ListingFailed(f"none of the {len(items)} records of the first page has a key at {where}; mend read.key")
    return Page(
        records=records,
        unkeyed=unkeyed,
        next=_next_path(read, document, answer, path=path, base_url=base_url, items=len(items)),
        total=_total(read, document, answer),
    )


# A backslash that is one, and both halves of a character, are passed over; what is left of the last is half of one.
_HALVES = re.compile(
    rb"(?P<whole>\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _document(body: bytes) -> Any:
    """Return what *body* says; of a text that was cut within a character (UTF-16), the half is U+FFFD."""
    try:
        return decode(body)
    except msgspec.DecodeError:
        mended = _HALVES.sub(lambda found: found["whole"] or rb"\ufffd", body)
        if mended == body:
            raise
        return decode(mended)


_encode: Callable[[Any], bytes] = msgspec.json.Encoder(decimal_format="number").encode


def _found(item: Any, at: JsonPath) -> Any:
    try:
        return at.find(item)
    except LookupError:
        return None


def _total(read: ReadConfig, document: Any, answer: Answer) -> int | None:
    if read.total_header is not None:
        said: Any = answer.headers.get(read.total_header.lower())
    elif read.total is not None:
        said = _found(document, read.total)
    else:
        return None
    if isinstance(said, str) and said.isascii() and said.isdigit():
        said = int(said)
    if isinstance(said, bool) or not isinstance(said, int) or said < 0:
        where = read.total_header or (read.total.text if read.total else "")
        raise ListingFailed(f"a page says no total at {where}; mend read.total, or remove it")
    return said


def _next_path(read: ReadConfig, document: Any, answer: Answer, *, path: str, base_url: str, items: int) -> str | None:
    match read.page:
        case CursorPaging(parameter=parameter, next=at):
            cursor = _found(document, at)
            if cursor is None or cursor == "" or cursor is False:
                return None
            if not isinstance(cursor, str | int | Decimal) or cursor is True:
                raise ListingFailed(f"what a page has at {at.text} is no cursor")
            return _with(path, {parameter: cursor})
        case OffsetPaging(parameter=parameter):
            return _with(path, {parameter: _number(path, parameter) + items}) if items else None
        case NumberedPaging(parameter=parameter):
            return _with(path, {parameter: _number(path, parameter) + 1}) if items else None
        case LinkPaging(header=header):
            said = answer.headers.get(header.lower(), "")
            url = _linked(said) if header.lower() == "link" else said.strip() or None
        case NextUrlPaging(next=at):
            url = _found(document, at) or None
            if url is not None and not isinstance(url, str):
                raise ListingFailed(f"what a page has at {at.text} is no URL")
        case _:
            return None
    return None if url is None else _path_within(url, base_url=base_url, path=path)


_LINK = re.compile(r'<([^<>]*)>((?:\s*;\s*[\w*!#$%&+.^`|~-]+\s*(?:=\s*(?:"[^"]*"|[^\s;,"]+))?)*)')


def _linked(header: str) -> str | None:
    """Return the URL of the link whose relation is `next` (RFC 8288)."""
    for url, parameters in _LINK.findall(header):
        found = re.search(r';\s*rel\s*=\s*(?:"([^"]*)"|([^\s;,"]+))', parameters, re.IGNORECASE)
        if found is not None and "next" in (found[1] or found[2] or "").lower().split():
            return str(url)
    return None


def _path_within(url: str, *, base_url: str, path: str) -> str:
    """Return the path of *url*, an answer's next page, to be appended to *base_url*; raises ListingFailed.

    The requests carry credentials: they are not to be led to another host, or out of what `base_url` names.
    """
    try:
        there = urlsplit(urljoin(base_url + path, url))
        here = urlsplit(base_url)
        same = (there.scheme, there.hostname, _port(there)) == (here.scheme, here.hostname, _port(here))
    except ValueError:
        raise ListingFailed(f"the next page's URL cannot be read: {url[:200]}") from None
    if not same or "@" in there.netloc:
        raise ListingFailed(
            f"the next page is said to be at {there.scheme}://{there.netloc}, which is not where base_url is; "
            "it is not followed"
        )
    whole = there.path + (f"?{there.query}" if there.query else "")
    inside = whole.removeprefix(here.path)
    if not whole.startswith(here.path) or not inside.startswith("/"):
        raise ListingFailed(f"the next page is said to be at {there.path}, which is not below base_url; not followed")
    if any(segment in (".", "..") for segment in inside.partition("?")[0].split("/")):
        raise ListingFailed(f"the next page's path has a segment '.' or '..': {inside[:200]}; not followed")
    return inside


def _port(parts: Any) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _with(path: str, parameters: Mapping[str, object]) -> str:
    """Return *path* with these query parameters in place of those of their names."""
    before, _, query = path.partition("?")
    kept = [part for part in query.split("&") if part and part.partition("=")[0] not in parameters]
    given = [f"{name}={quote(str(value), safe='')}" for name, value in parameters.items()]
    return before + ("?" + "&".join(kept + given) if kept or given else "")


def _number(path: str, parameter: str) -> int:
    return int(dict(parse_qsl(path.partition("?")[2]))[parameter])


# Asking --------------------------------------------------------------------------------------------------------------


class _Unwell(Exception):
    """No page yet; the target may be well again soon."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(slots=True, kw_only=True)
class Reader:
    """Asks for pages as the target's file allows: its rate limit, its retries, its `Retry-After`."""

    client: TargetClient
    clock: Clock
    retry: RetryPolicy
    rules: JudgingRules
    bucket: TokenBucket | None = None
    requests: int = 0
    _nobody: Condition = field(default_factory=Condition)

    def get(self, path: str) -> Answer:
        """Return the answer to a GET of *path* that is a success; raises ListingFailed."""
        failing_since: list[float] = []

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after if isinstance(error, _Unwell) else None
            drawn = backoff(initial_backoff=self.retry.initial_backoff, max_backoff=self.retry.max_backoff)(state)
            return max(drawn, asked or 0.0)

        def stop(state: tenacity.RetryCallState) -> bool:
            now = self.clock.monotonic()
            failing_since.append(now)
            return now + state.upcoming_sleep - failing_since[0] >= self.retry.max_elapsed

        asking = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Unwell), wait=wait, stop=stop, sleep=self.sleep, reraise=True
        )
        try:
            return asking(self._ask, path)
        except _Unwell as error:
            said = f" and asks to be left alone for {error.retry_after:.0f} s" if error.retry_after else ""
            raise ListingFailed(f"the target is unwell: {error}{said}") from None

    def has(self, path: str) -> bool:
        """Say whether the record at *path* is there; raises ListingFailed if that cannot be told."""
        try:
            self.get(path)
        except NotThere:
            return False
        except ListingFailed as problem:
            raise ListingFailed(f"a record was asked for by read.one: {problem}") from None
        return True

    def sleep(self, seconds: float) -> None:
        """Let *seconds* pass."""
        wake_at = self.clock.monotonic() + seconds
        with self._nobody:
            while (left := wake_at - self.clock.monotonic()) > 0:
                self.clock.wait(self._nobody, left)

    def _ask(self, path: str) -> Answer:
        while self.bucket is not None and (short := self.bucket.take(self.clock.monotonic())) > 0:
            self.sleep(short)
        self.requests += 1
        answer = self.client.send(HttpRequest(method="GET", path=path), key=uuid5(NAMESPACE_URL, path))
        if isinstance(answer, NoAnswer):
            raise _Unwell(answer.reason)
        status = answer.status
        if 200 <= status < 300:
            return answer
        said = excerpt(answer.body)[:200]
        reason = f"answered {status}" + (f" ({said})" if said else "")
        if status in _RETRIED or status in self.rules.retryable_status_codes:
            longest = self.rules.max_retry_after
            after = retry_after_seconds(answer.headers.get("retry-after"), now=self.clock.now(), longest=longest)
            raise _Unwell(reason, after)
        if 300 <= status < 400:
            raise ListingFailed(f"{reason}, a redirect, which is never followed; mend read.path")
        if status in (401, 403, 407):
            raise ListingFailed(f"{reason}: the credentials do not allow to read; give them that right")
        if status in (404, 410):
            raise NotThere(f"{reason}; mend read.path")
        raise (PositionLost if status in (400, 416, 422) else ListingFailed)(f"{reason}; mend read.path")


@dataclass(slots=True)
class Circles:
    """Notices a listing that goes in circles: by pages that bring nothing new, or by one that leads back."""

    known: int = 0
    """Pages that were read before this listing began, or went on: they may bring nothing new."""
    _without_news: int = 0
    _mark: str | None = None
    """The path of a page on the way. It is set anew after 1, 2, 4, 8 … pages, so that every circle comes by it."""
    _since: int = 0
    _until: int = 1

    def look(self, page: Page, *, path: str, news: int) -> None:
        """Note that *page*, asked for by *path*, brought *news* records; raises ListingFailed."""
        if page.next == path:
            raise ListingFailed("a page names itself as the next one; mend read.page")
        if page.next is not None and page.next == self._mark:
            raise ListingFailed(f"the pages lead in circles, {page.next[:200]} came before; mend read.page")
        self._since += 1
        if self._since == self._until:
            self._mark, self._since, self._until = page.next, 0, self._until * 2
        self._without_news = 0 if news or not page.records else self._without_news + 1
        if self._without_news >= _WITHOUT_NEWS + self.known:
            raise ListingFailed(
                f"{self._without_news} pages in a row had only records of earlier pages; mend read.page"
            )
