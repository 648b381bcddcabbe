"""Let a drain and its lanes run one at a time, in an order that a seed decides, on a clock that only waiting moves.

The threads are the drain's own. Where one may block (a queue, the gate's condition, a request, another thread's end) it
hands its turn on; time jumps to the next deadline once all of them wait. So the same seed is the same run, to the last
request, however busy the machine: a failure can be replayed and made smaller. A run in which all wait for ever is
`Stuck`.
"""

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from queue import Empty
from random import Random
from types import ModuleType
from typing import Any
from unittest.mock import patch

from pipelines.delivery.clock import Clock

_PATIENCE = 60.0
_LONGEST_STRETCH = 64.0
_LONGEST_RUN = 1_000_000.0


class Stuck(Exception):
    """Every thread waits for another one, or one looks for days for what never comes."""


class SimulatedClock(Clock):
    """Time that passes when every thread of a simulation waits, or when a test says so."""

    def __init__(self, *, start: datetime = datetime(2025, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass."""
        self.seconds += seconds

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.seconds)

    def wait(self, condition: Any, seconds: float | None) -> None:
        condition.wait(seconds)


class _Task:
    """One thread of the simulation, and what it waits for."""

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.ready: Callable[[], bool] = _always
        self.deadline: float | None = None
        self.done = False


def _always() -> bool:
    return True


def _never() -> bool:
    return False


class Turns:
    """Whose turn it is. With seed 0 threads are taken in turn and only where they block; else as the seed says."""

    def __init__(self, clock: SimulatedClock, *, seed: int) -> None:
        self._clock, self._begun = clock, clock.seconds
        self._random = Random(seed) if seed else None
        self._mine = threading.local()
        self._tasks: deque[_Task] = deque()
        self._of_thread: dict[threading.Thread, _Task] = {}
        self._stuck = False

    def queue(self) -> "_Queue":
        """Return a queue whose readers hand their turn on."""
        return _Queue(self)

    def sleep(self, seconds: float) -> None:
        """Let the others run until *seconds* have passed."""
        self._hand_on(ready=_never, deadline=self._clock.seconds + seconds)

    def until(self, ready: Callable[[], bool], *, timeout: float | None = None) -> None:
        """Let the others run until *ready*, or *timeout* seconds at the most."""
        self._hand_on(ready=ready, deadline=None if timeout is None else self._clock.seconds + timeout)

    def perhaps(self) -> None:
        """Let another thread come first, now and then: a machine may stop a thread anywhere."""
        if self._random is not None and self._random.random() < 0.3:
            self._hand_on(ready=_always, deadline=None)

    def _hand_on(self, *, ready: Callable[[], bool], deadline: float | None) -> None:
        me: _Task = self._mine.task
        me.ready, me.deadline = ready, deadline
        following = self._choose()
        if following is not me:
            following.wake.release()
            if not me.wake.acquire(timeout=_PATIENCE):
                raise Stuck(f"a thread did not get its turn within {_PATIENCE:g} real seconds")
        if self._stuck:
            raise Stuck("nothing happens any more: every thread waits for another one, or for what never comes")

    def _choose(self) -> _Task:
        while True:
            now = self._clock.seconds
            able = [
                task for task in self._tasks if task.ready() or (task.deadline is not None and task.deadline <= now)
            ]
            if able:
                chosen = able[0] if self._random is None else self._random.choice(able)
                self._tasks.remove(chosen)
                self._tasks.append(chosen)
                return chosen
            deadlines = [task.deadline for task in self._tasks if task.deadline is not None]
            if not deadlines or now > self._begun + _LONGEST_RUN:
                self._stuck = True
                return self._tasks[0]  # each is woken to raise it, and leaves
            self._clock.seconds = min(deadlines)

    # --- threads -----------------------------------------------------------------------------------------------------

    def join_in(self) -> None:
        """Take the first turn."""
        self._mine.task = _Task()
        self._tasks.append(self._mine.task)

    @property
    def taking_part(self) -> bool:
        """Whether the thread that asks is one of the simulation's."""
        return hasattr(self._mine, "task")

    def adopt(self, thread: threading.Thread) -> None:
        """Take in a thread that is about to be started."""
        task = self._of_thread[thread] = _Task()
        self._tasks.append(task)
        run = thread.run

        def run_in_turn() -> None:
            self._mine.task = task
            task.wake.acquire()
            try:
                run()
            finally:
                task.done = True
                self._tasks.remove(task)
                if self._tasks and not self._stuck:
                    self._choose().wake.release()

        thread.run = run_in_turn  # type: ignore[method-assign]

    def break_up(self) -> None:
        """End whoever still waits; there is nobody after a run that was not stuck."""
        for task in list(self._tasks):
            self._stuck = True
            if task is not self._mine.task:
                task.wake.release()

    def end_of(self, thread: threading.Thread) -> None:
        """Let the others run until *thread* has ended."""
        if thread in self._of_thread:
            self.until(lambda: self._of_thread[thread].done)


class _Queue:
    """A `SimpleQueue` whose readers hand their turn on."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._items: deque[object] = deque()
        self._stretch = 1.0

    def put(self, item: object) -> None:
        self._items.append(item)
        self._turns.perhaps()

    def get(self, *, timeout: float | None = None) -> object:
        if not self._items:
            # Who looks again and again in vain is slow about it: an hour's `Retry-After` would be many looks.
            wait = None if timeout is None else timeout * self._stretch
            self._turns.until(lambda: bool(self._items), timeout=wait)
        if not self._items:
            self._stretch = min(2 * self._stretch, _LONGEST_STRETCH)
            raise Empty
        self._stretch = 1.0
        return self._items.popleft()

    def get_nowait(self) -> object:
        if not self._items:
            raise Empty
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class _Lock:
    """An `RLock` whose waiters hand their turn on, and which is a point where others may come first."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._holder != me:
            if self._turns.taking_part:
                self._turns.perhaps()
            if self._holder is not None:
                self._turns.until(self.is_free)
            self._holder = me
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None

    def is_free(self) -> bool:
        return self._holder is None

    def let_go(self) -> tuple[int | None, int]:
        """Release it whole; return what `take_back` wants."""
        held = self._holder, self._depth
        self._holder, self._depth = None, 0
        return held

    def take_back(self, held: tuple[int | None, int]) -> None:
        """Hold it as before. It has to be free, but at the end of a run that was stuck."""
        self._holder, self._depth = held


class _Condition:
    """A `Condition` whose waiters hand their turn on. Who enters it holds its lock."""

    def __init__(self, turns: Turns, lock: _Lock | None = None) -> None:
        self._turns = turns
        self._lock = lock or _Lock(turns)
        self._notified = 0

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__()

    def wait(self, timeout: float | None = None) -> None:
        before = self._notified
        held = self._lock.let_go()
        try:
            self._turns.until(lambda: self._notified != before and self._lock.is_free(), timeout=timeout)
            if not self._lock.is_free():
                self._turns.until(self._lock.is_free)
        finally:
            self._lock.take_back(held)

    def notify(self, _: int = 1) -> None:
        self._notified += 1

    notify_all = notify


def _make_take_turns(module: ModuleType, turns: Turns, stack: ExitStack) -> None:
    """Have *module* make queues, locks and conditions of ours, also where a dataclass makes one for a field."""
    doubles: dict[object, Callable[..., object]] = {
        queue.SimpleQueue: partial(_Queue, turns),
        threading.RLock: partial(_Lock, turns),
        threading.Condition: partial(_Condition, turns),
    }
    for name, value in list(vars(module).items()):
        if callable(value) and isinstance(value, Hashable) and value in doubles:
            stack.enter_context(patch.object(module, name, doubles[value]))
        elif isinstance(value, type) and is_dataclass(value) and value.__module__ == module.__name__:
            made = {one.name: doubles[one.default_factory] for one in fields(value) if one.default_factory in doubles}
            if made:
                stack.enter_context(patch.object(value, "__init__", _giving(value.__init__, made)))


def _giving(init: Callable[..., None], made: Mapping[str, Callable[[], object]]) -> Callable[..., None]:
    def init_with_doubles(self: object, *values: object, **named: object) -> None:
        init(self, *values, **{name: make() for name, make in made.items()}, **named)

    return init_with_doubles


@contextmanager
def simulation(clock: SimulatedClock, *, seed: int) -> Iterator[Turns]:
    """Have what this thread calls of `pipelines.delivery`, and every thread started by it, take turns."""
    turns = Turns(clock, seed=seed)
    start, join = threading.Thread.start, threading.Thread.join

    def start_in_turn(thread: threading.Thread) -> None:
        if turns.taking_part:
            turns.adopt(thread)
        start(thread)

    def join_in_turn(thread: threading.Thread, timeout: float | None = None) -> None:
        if turns.taking_part:
            turns.end_of(thread)
        join(thread, timeout)

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("pipelines.delivery."):
                _make_take_turns(module, turns, stack)
        stack.enter_context(patch.object(threading.Thread, "start", start_in_turn))
        stack.enter_context(patch.object(threading.Thread, "join", join_in_turn))
        turns.join_in()
        try:
            yield turns
        finally:
            turns.break_up()
