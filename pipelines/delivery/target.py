"""The port to a target API: one request out, one answer or none back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec

from pipelines.delivery.routing import HttpRequest


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the target said. Header names are in lower case; the body may have been cut at the client's limit."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""
    truncated: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NoAnswer:
    """The request failed before an answer was had."""

    reason: str
    may_have_arrived: bool
    """False only if the request cannot have reached the target (DNS, connect, TLS)."""
    seconds: float = 0.0


class TargetClient(ABC):
    """Sends one lane's requests to one target. Belongs to one thread at a time."""

    @abstractmethod
    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        """Send *request* once under *key*; follow no redirect, raise nothing for what the network does."""

    def multiplexer(self) -> "Multiplexer | None":
        """Return what can carry the requests of clients like this one from one thread; None if nothing can."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""


class Multiplexer(ABC):
    """Carries requests of many lanes from one thread, so far as none has to be waited for.

    All but `wake` belongs to that thread. A client whose request is out here is nobody else's to use meanwhile.
    """

    @abstractmethod
    def begin(self, lane: int, client: TargetClient, request: HttpRequest, *, key: UUID) -> bool:
        """Start to send *request* in *client*'s place; False if the client has to do it. A lane has one out at most."""

    @abstractmethod
    def ended(self, seconds: float | None) -> Sequence[tuple[int, Answer | NoAnswer | None]]:
        """Wait until a request has ended, `wake` was called or *seconds* have passed; return each lane that is through.

        With it comes what its request came to, or None: then the client is to send it, which knows what became of it.
        """

    @abstractmethod
    def wake(self) -> None:
        """Have `ended` return, at once or when it is called next. For any thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is still out."""
