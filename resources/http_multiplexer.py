"""Requests of many lanes at once, from one thread: each on its client's kept connection, none waited for.

Connecting, tokens, proxies and sending again are the clients' own. Here bytes go out on connections that are open, and
answers are read as they come: a sixth of the CPU that a thread for each lane needs, for nobody waits for Python's lock.
"""

import selectors
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import UUID

import httpcore

from pipelines.delivery.routing import HttpRequest
from pipelines.delivery.target import Answer, Multiplexer, NoAnswer, TargetClient
from resources.http_answer import AT_ONCE, Reading, answer_of
from resources.http_direct import NOT_YET, DirectConnection
from resources.redaction import redact_text

_LOOK_AFTER = 0.05
"""Seconds after which it is looked at whose time is over."""
_READS_AT_ONCE = 16
"""Reads of one flight before it is the others' turn: some targets never stop talking. Each takes all of a TLS record,
so that what is left shows at the socket."""

Ended = Answer | NoAnswer | None


class StillOut:
    """A request whose answer is not there yet."""


STILL_OUT = StillOut()


class Flight:
    """One request that is out on a kept connection."""

    def __init__(
        self,
        direct: DirectConnection,
        kept: socket.socket,
        data: bytes,
        *,
        secrets: tuple[bytes, ...],
        timeout_seconds: float,
        limit: int,
        refuses: Callable[[int], bool],
        arrived: Callable[[Ended], Ended],
    ) -> None:
        """Have *data* sent on *kept*, *direct*'s socket. *arrived* is given what came of it, and says what that means.

        It is given None if the connection broke without a word, and returns None if the client is to send all again.
        A status that *refuses* may cut the request short; after any other, all of it is sent (RFC 9110 §7.5).
        """
        self._direct, self.socket, self._unsent = direct, kept, memoryview(data)
        self._secrets, self._timeout, self._refuses, self._arrived = secrets, timeout_seconds, refuses, arrived
        self._early: tuple[Answer, bool] | None = None
        """What was answered before all was sent, and whether the connection may be used again."""
        self._reading = Reading(limit)
        self._heard = self._deaf = False
        self._started = time.monotonic()
        self.give_up_at = self._started + timeout_seconds
        """In monotonic seconds: from then on `expire` is due."""

    @property
    def events(self) -> int:
        """What is waited for."""
        if self._early is not None:
            return selectors.EVENT_WRITE
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def send(self) -> None:
        """Send what the socket takes."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except NOT_YET:
            pass
        except OSError:
            # It may have answered before it had read it all, and closed its ear.
            self._unsent, self._deaf = memoryview(b""), True

    def read(self) -> Ended | StillOut:
        """Read what there is, or so much that the others should have their turn."""
        if self._early is not None:
            return STILL_OUT if self._unsent else self._finished()
        try:
            for _ in range(_READS_AT_ONCE):
                data = self.socket.recv(AT_ONCE)
                self._heard |= bool(data)
                if self._reading.take(data):
                    return self._answered()
        except NOT_YET:
            pass
        except (OSError, httpcore.RemoteProtocolError) as error:
            return self._broke(error)
        return STILL_OUT

    def expire(self) -> Ended:
        """Give it up, for its time is over."""
        if not self._unsent and self._reading.break_off():
            found = self._answered()
            assert not isinstance(found, StillOut)  # all is sent
            return found
        self.drop()
        return self._arrived(self._no_answer(f"no answer within {self._timeout:g} s"))

    def drop(self) -> None:
        """Let go of it and its connection."""
        self._reading.close()
        self._direct.ended(reusable=False)

    def _answered(self) -> Ended | StillOut:
        """Take the answer, which is over; it counts once all is sent, unless it is a refusal."""
        reply, reusable = self._reading.reply()
        self._early = answer_of(reply, self._secrets, self._started), reusable
        return STILL_OUT if self._unsent and not self._refuses(reply.status) else self._finished()

    def _finished(self) -> Ended:
        assert self._early is not None
        answer, reusable = self._early
        self._reading.close()
        self._direct.ended(reusable=reusable and not self._unsent and not self._deaf)
        return self._arrived(answer)

    def _broke(self, error: Exception) -> Ended | StillOut:
        if self._reading.break_off():
            return self._answered()
        self.drop()
        if not self._heard:
            # Most likely the target had closed the connection before the request was there (RFC 9112 §9.3.1).
            return self._arrived(None)
        said = redact_text(str(error), self._secrets)[:200] or type(error).__name__
        return self._arrived(self._no_answer(f"the connection broke: {said}"))

    def _no_answer(self, reason: str) -> NoAnswer:
        return NoAnswer(reason=reason, may_have_arrived=True, seconds=time.monotonic() - self._started)


class FlyingClient(TargetClient):
    """A client whose requests can go without it."""

    @abstractmethod
    def depart(self, request: HttpRequest, *, key: UUID) -> Flight | None:
        """Return *request*, about to be sent on the kept connection; None if the client has to `send` it."""


class HttpMultiplexer(Multiplexer):
    """Flights of one drain's lanes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._ear, self._mouth = socket.socketpair()
        self._mouth_held = threading.Lock()  # its number may be another connection's once it is closed
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._flights: dict[int, tuple[int, Flight]] = {}  # by their sockets' numbers, with their lanes
        self._watched: dict[int, tuple[socket.socket, int]] = {}  # by number, too: which socket that is, and for what
        self._look_at = 0.0

    def begin(self, lane: int, client: TargetClient, request: HttpRequest, *, key: UUID) -> bool:
        assert isinstance(client, FlyingClient)
        flight = client.depart(request, key=key)
        if flight is None:
            return False
        flight.send()
        self._flights[flight.socket.fileno()] = (lane, flight)
        self._watch(flight)
        return True

    def ended(self, seconds: float | None) -> Sequence[tuple[int, Ended]]:
        if self._flights:
            seconds = _LOOK_AFTER if seconds is None else min(seconds, _LOOK_AFTER)
        found: list[tuple[int, Ended]] = []
        for key, events in self._selector.select(seconds):
            if key.fileobj is self._ear:
                with suppress(BlockingIOError):
                    self._ear.recv(1024)
                continue
            one = self._flights.get(key.fd)
            if one is None:
                self._forget(key.fd)  # its client is at it, or will see what came
                continue
            lane, flight = one
            if events & selectors.EVENT_WRITE:
                flight.send()
            what = flight.read()
            if isinstance(what, StillOut):
                self._watch(flight)
            else:
                del self._flights[key.fd]
                found.append((lane, what))
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_AFTER
            found += self._expired(now)
        return found

    def _expired(self, now: float) -> list[tuple[int, Ended]]:
        late = [number for number, (_, flight) in self._flights.items() if now >= flight.give_up_at]
        return [(lane, flight.expire()) for lane, flight in map(self._flights.pop, late)]

    def _watch(self, flight: Flight) -> None:
        """Wait for what *flight* waits for. A connection is watched until it is closed: more flights follow on it."""
        number, events = flight.socket.fileno(), flight.events
        watched, what = self._watched.get(number, (None, 0))
        if watched is not flight.socket:
            if watched is not None:
                self._forget(number)  # it was closed, and its number is another's now
            self._selector.register(flight.socket, events)
        elif what != events:
            self._selector.modify(flight.socket, events)
        else:
            return
        self._watched[number] = (flight.socket, events)

    def _forget(self, number: int) -> None:
        watched, _ = self._watched.pop(number)
        self._selector.unregister(watched)

    def wake(self) -> None:
        with self._mouth_held:
            if self._mouth.fileno() != -1:  # else it ended while it was being found asleep
                with suppress(BlockingIOError):  # it is about to wake as it is
                    self._mouth.send(b"\0")

    def close(self) -> None:
        for _, flight in self._flights.values():
            flight.drop()
        self._flights.clear()
        self._selector.close()
        self._ear.close()
        with self._mouth_held:
            self._mouth.close()
