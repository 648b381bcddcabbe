"""A drain's lanes: each sends its batches one after another, beside the others.

What goes well needs no thread of its own. Where the client has a multiplexer, one thread, the *express*, makes the
first attempt of every lane's batches: threads that take turns at Python's lock for each request cost more than all else
that is done with a batch. Whatever has to wait (a connection, a rate limit, a retry) or is not plainly accepted is left
to the lane's own thread, and the lane is the express's again when that is through. Without a multiplexer the lanes' own
threads do everything.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from uuid import UUID

import msgspec

from pipelines.changes.record import payloads
from pipelines.changes.texts import total_bytes
from pipelines.delivery.batching import Batch
from pipelines.delivery.clock import Clock
from pipelines.delivery.ledger import Settlement
from pipelines.delivery.sending import Sender, Sent
from pipelines.delivery.target import Answer, Multiplexer, NoAnswer, TargetClient

_TOLD_AFTER = 0.005
"""Seconds after which the drain is told what came of requests, all together: it need not be woken for each."""


class Work(msgspec.Struct, eq=False):
    """A claimed batch on its way to a lane."""

    batch_id: int
    batch: Batch
    key: UUID
    """Under which it goes out."""
    set_aside: int = 0
    """Runs that set it aside before."""
    claimed_as: int = 0
    """The batch that it was when this drain found it claimed; its own id, if it has not been split since."""
    bytes: int = 0
    """By which it counts towards the window."""

    def __post_init__(self) -> None:
        """Count the bytes."""
        self.bytes = total_bytes(payloads(self.batch.changes))


class Told(msgspec.Struct, frozen=True, eq=False):
    """What a lane knows: of a batch that is done, or of a part of one that is still out."""

    settlement: Settlement
    done: tuple[Work, Sent] | None = None
    written: SimpleQueue[None] | None = None
    """Given something once the settlement is in the ledger, where somebody waits for that."""


class Lane(threading.Thread):
    """Sends one lane's batches one after another, as far as nobody else does."""

    def __init__(
        self,
        number: int,
        sender: Callable[[], tuple[Sender, TargetClient]],
        tell: Callable[[Told], None],
        broke: Callable[[BaseException], None],
        free: Callable[[int], None] | None,
    ) -> None:
        super().__init__(name=f"lane-{number}", daemon=True)
        self.work: SimpleQueue[tuple[Work, bool, Answer | NoAnswer | None] | None] = SimpleQueue()
        """Each with whether a first attempt was made, and what that came to, if it is known."""
        self.sends: tuple[Sender, TargetClient] | None = None
        """By what it sends, once that is made."""
        self.ended = False
        self._number, self._make, self._tell, self._broke, self._free = number, sender, tell, broke, free

    def run(self) -> None:
        """Send until there is no more."""
        try:
            sender, client = self.sends = self._make()
            try:
                while (task := self.work.get()) is not None:
                    work, out, first = task
                    sent = sender.send(
                        work.batch_id,
                        work.batch,
                        key=work.key,
                        suspect=work.set_aside > 0,
                        claimed_as=work.claimed_as or work.batch_id,
                        out=out,
                        first=first,
                    )
                    self._tell(Told(sent.settlement, done=(work, sent)))
                    self._is_free()
            finally:
                client.close()
        except BaseException as error:  # handed to the loop, which raises it
            self.ended = True
            self._is_free()
            self._broke(error)

    def _is_free(self) -> None:
        if self._free is not None:
            self._free(self._number)


class LanePool:
    """All lanes of one drain. Belongs to the drain's thread, which hands it work and hears what came of it."""

    def __init__(
        self,
        number: int,
        *,
        sender: Callable[[], tuple[Sender, TargetClient]],
        tell: Callable[[Told], None],
        tell_all: Callable[[Sequence[Told]], None],
        broke: Callable[[BaseException], None],
        clock: Clock,
    ) -> None:
        """Start *number* lanes. Each makes what it sends by with *sender*, and tells with *tell*, which may wait.

        What went well is told with *tell_all*, many at a time. *broke* is given what ends a thread.
        """
        first = sender()
        multiplexer = first[1].multiplexer()
        self._express: _Express | None = None
        free: Callable[[int], None] | None = None
        if multiplexer is not None:
            self._express = _Express(multiplexer, tell_all=tell_all, broke=broke, clock=clock)
            free = self._express.put
        self._lanes = [Lane(place, sender if place else lambda: first, tell, broke, free) for place in range(number)]
        for lane in self._lanes:
            lane.start()
        if self._express is not None:
            self._express.begin(self._lanes)

    def put(self, work: Work) -> None:
        """Have *work* sent after all else that its lane was given."""
        if self._express is not None:
            self._express.put(work)
        else:
            self._lanes[work.batch.lane % len(self._lanes)].work.put((work, False, None))

    def close(self) -> None:
        """Wait until all is sent that was given, then let go of the connections."""
        if self._express is not None:
            self._express.put(None)
            self._express.join()
        for lane in self._lanes:
            lane.work.put(None)
        for lane in self._lanes:
            lane.join()


class _Express(threading.Thread):
    """Makes the first attempt for all lanes, and hands what is not accepted by it to the lane's own thread."""

    def __init__(
        self,
        multiplexer: Multiplexer,
        *,
        tell_all: Callable[[Sequence[Told]], None],
        broke: Callable[[BaseException], None],
        clock: Clock,
    ) -> None:
        super().__init__(name="express", daemon=True)
        self._multiplexer, self._tell_all, self._broke, self._clock = multiplexer, tell_all, broke, clock
        self._lanes: Sequence[Lane] = ()
        self._inbox: deque[Work | int | None] = deque()  # work; a lane that is free again; None in the end
        self._asleep = self._closing = False
        self._waiting: list[deque[Work]] = []
        self._with_thread: set[int] = set()
        self._out: dict[int, Work] = {}
        self._told: list[Told] = []
        self._tell_at = 0.0

    def begin(self, lanes: Sequence[Lane]) -> None:
        """Start, for *lanes*."""
        self._lanes = lanes
        self._waiting = [deque() for _ in lanes]
        self.start()

    def put(self, item: Work | int | None) -> None:
        """Take work; a lane's number, when its thread is through with what it was handed; None, to end after all."""
        self._inbox.append(item)
        if self._asleep:  # it looks again after it has said so, and before it sleeps
            self._asleep = False
            self._multiplexer.wake()

    def run(self) -> None:
        """Send until there is no more."""
        try:
            while self._take_in():
                for number, answer in self._wait():
                    self._end(number, answer)
            self._tell()
        except BaseException as error:  # handed to the loop, which raises it
            self._tell()  # later changes of the same keys may be out: this must not be sent after them
            self._broke(error)
        finally:
            self._asleep = False
            self._multiplexer.close()

    def _take_in(self) -> bool:
        """Take what was put; say whether there is, or will be, anything to wait for."""
        while self._inbox:
            item = self._inbox.popleft()
            if item is None:
                self._closing = True
            elif isinstance(item, int):
                self._with_thread.discard(item)
                self._go_on(item)
            else:
                number = item.batch.lane % len(self._lanes)
                self._waiting[number].append(item)
                if number not in self._out and number not in self._with_thread:
                    self._go_on(number)
        return not self._closing or bool(self._out or self._with_thread)

    def _wait(self) -> Sequence[tuple[int, Answer | NoAnswer | None]]:
        seconds: float | None = None
        if self._told:
            seconds = self._tell_at - self._clock.monotonic() if self._out else 0.0
            if seconds <= 0:
                self._tell()
                seconds = None
        self._asleep = True
        if self._inbox:
            seconds = 0.0
        ended = self._multiplexer.ended(seconds)
        self._asleep = False
        return ended

    def _go_on(self, number: int) -> None:
        """Send a free lane's next batch."""
        lane, waiting = self._lanes[number], self._waiting[number]
        if lane.ended:
            waiting.clear()  # the drain fails; what was not sent stays claimed
        if not waiting:
            return
        work = waiting.popleft()
        if lane.sends is not None and not work.set_aside:
            sender, client = lane.sends
            request = sender.begin(work.batch)
            if request is not None and self._multiplexer.begin(number, client, request, key=work.key):
                self._out[number] = work
                return
        self._hand_over(number, work)

    def _end(self, number: int, answer: Answer | NoAnswer | None) -> None:
        work = self._out.pop(number)
        sends = self._lanes[number].sends
        assert sends is not None  # it was sent by them
        sent = None if answer is None else sends[0].end(work.batch_id, work.batch, answer)
        if sent is None:
            self._hand_over(number, work, out=True, first=answer)
            return
        if not self._told:
            self._tell_at = self._clock.monotonic() + _TOLD_AFTER
        self._told.append(Told(sent.settlement, done=(work, sent)))
        self._go_on(number)

    def _hand_over(self, number: int, work: Work, *, out: bool = False, first: Answer | NoAnswer | None = None) -> None:
        """Leave *work* to the lane's own thread; what came before it is told before it."""
        self._tell()
        self._with_thread.add(number)
        self._lanes[number].work.put((work, out, first))

    def _tell(self) -> None:
        if self._told:
            told, self._told = self._told, []
            self._tell_all(told)
