"""A target API without a network: it answers from a script and remembers what it was sent."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any, ClassVar
from uuid import UUID

from pipelines.changes.record import ChangeRecord, Operation, instant_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.routing import HttpRequest, Route, compile_routes
from pipelines.delivery.target import Answer, Multiplexer, NoAnswer, TargetClient

Step = int | Answer | NoAnswer | BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class SentRequest:
    """One request, in the order in which they came."""

    number: int
    request: HttpRequest
    key: UUID
    lane: str
    """The name of the thread that sent it."""

    @property
    def path(self) -> str:
        """Return the request's path."""
        return self.request.path

    @property
    def body(self) -> bytes:
        """Return the request's body, empty if it has none."""
        return self.request.body or b""


class ScriptedTarget:
    """Answers with the steps of *script*, then with *then*; or, if *script* is a function, with what it returns.

    A step is a status, an answer, no answer, or an exception to raise. `connect` makes one lane's client; all of them
    share the script. Thread-safe; a function is called without a lock, so it may block.
    """

    def __init__(self, script: Iterable[Step] | Callable[[SentRequest], Step] = (), *, then: Step = 200) -> None:
        self._function = script if callable(script) else None
        self._steps = iter(()) if callable(script) else iter(script)
        self._then = then
        self._lock = threading.Lock()
        self._sent: list[SentRequest] = []
        self.connected = 0
        self.closed = 0

    multiplexed: ClassVar[bool] = False
    """Whether the clients have a multiplexer. All that a drain does must come out the same; see `both_ways`."""

    def connect(self) -> TargetClient:
        """Return a client for one lane."""
        with self._lock:
            self.connected += 1
        return _Client(self)

    @property
    def sent(self) -> list[SentRequest]:
        """Return the requests so far."""
        with self._lock:
            return list(self._sent)

    @property
    def keys(self) -> list[UUID]:
        """Return the idempotency keys so far."""
        return [request.key for request in self.sent]

    def _answer(self, request: HttpRequest, key: UUID) -> Answer | NoAnswer:
        with self._lock:
            sent = SentRequest(number=len(self._sent), request=request, key=key, lane=threading.current_thread().name)
            self._sent.append(sent)
            step = None if self._function else next(self._steps, self._then)
        if self._function is not None:
            step = self._function(sent)
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, int):
            return answer(step)
        assert step is not None
        return step

    def _close(self) -> None:
        with self._lock:
            self.closed += 1


class _Client(TargetClient):
    def __init__(self, target: ScriptedTarget) -> None:
        self._target = target
        self.connected = False

    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        self.connected = True
        return self._target._answer(request, key)

    def multiplexer(self) -> Multiplexer | None:
        return ThreadedMultiplexer() if self._target.multiplexed else None

    def close(self) -> None:
        self._target._close()


class ThreadedMultiplexer(Multiplexer):
    """Has each request sent by its client in a thread; refuses those of a client that has not sent one itself yet."""

    def __init__(self) -> None:
        self._ended = SimpleQueue[tuple[int, Answer | NoAnswer | BaseException] | None]()

    def begin(self, lane: int, client: TargetClient, request: HttpRequest, *, key: UUID) -> bool:
        assert isinstance(client, _Client)
        if not client.connected:
            return False

        def send() -> None:
            try:
                self._ended.put((lane, client.send(request, key=key)))
            except BaseException as error:
                self._ended.put((lane, error))

        threading.Thread(target=send, name=f"lane-{lane}", daemon=True).start()
        return True

    def ended(self, seconds: float | None) -> Sequence[tuple[int, Answer | NoAnswer | None]]:
        try:
            one = self._ended.get(timeout=seconds)
        except Empty:
            return []
        if one is None:
            return []
        if isinstance(one[1], BaseException):
            raise one[1]
        return [(one[0], one[1])]

    def wake(self) -> None:
        self._ended.put(None)

    def close(self) -> None: ...


def answer(status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an answer that took a hundredth of a second."""
    return Answer(status=status, headers=headers or {}, body=body, seconds=0.01)


def no_answer(reason: str = "the connection broke", *, may_have_arrived: bool = True) -> NoAnswer:
    """Return a request's failure."""
    return NoAnswer(reason=reason, may_have_arrived=may_have_arrived)


def routes_of(**routes: Any) -> dict[str, Route]:
    """Compile *routes*, by stream, as a target's file writes them."""
    return compile_routes(TargetConfig.model_validate({"name": "api", "base_url": "http://api.test", "routes": routes}))


def change(
    change_id: int,
    key: str | None = None,
    *,
    stream: str = "customers",
    operation: Operation = "update",
    payload: bytes | None = None,
) -> ChangeRecord:
    """Return a change of a row with nothing but an `id`, its key; by default the key is the change's id."""
    key = str(change_id) if key is None else key
    if payload is None:
        payload = b'{"id": "%b", "change": %d}' % (key.encode(), change_id)
    return ChangeRecord(change_id, stream, key, operation, payload, instant_of(datetime(2025, 1, 1, tzinfo=UTC)))
