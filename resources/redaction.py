"""Keep secrets out of what others say: an answer that echoes one is stored, logged and shown without it."""

import json
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

_REDACTED = b"[redacted]"
_SHORTEST_SECRET = 4


def spellings(secrets: Iterable[str]) -> tuple[bytes, ...]:
    """Return *secrets* as they may be echoed: as they are, percent-encoded, in JSON with slashes escaped or not."""
    found: set[str] = set()
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            as_json = json.dumps(secret)[1:-1]
            found |= {secret, quote(secret, safe=""), quote_plus(secret), as_json, as_json.replace("/", "\\/")}
    return tuple(sorted((one.encode() for one in found), key=len, reverse=True))


def redact(text: bytes, secrets: Iterable[bytes]) -> bytes:
    """Return *text* without any of *secrets*, which are spelled out already."""
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, _REDACTED)
    return text


def redact_text(text: str, secrets: Iterable[bytes]) -> str:
    """Do the same for what is text already; what it holds of broken characters becomes question marks."""
    return redact(text.encode("utf-8", "surrogateescape"), secrets).decode("utf-8", "replace")
