"""The port to a target API: one request out, one answer or none back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from pipelines.delivery.routing import HttpRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the target said. Header names are in lower case; the body may have been cut at the client's limit."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
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
    """Sends one lane's requests to one target. Belongs to one thread."""

    @abstractmethod
    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        """Send *request* once under *key*; follow no redirect, raise nothing for what the network does."""

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""
