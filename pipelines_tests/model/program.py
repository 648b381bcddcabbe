"""What a test of the model does, step by step, as values: so that a failure can be cut down and written into a test."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from pipelines.delivery.ledger import Start
from pipelines_tests.model.model import Nature, Row
from pipelines_tests.model.simulation import SimulatedClock
from pipelines_tests.model.world import Course, EmptiedPostgres, OpenTransaction, Setup, SimulatedFake, World


@dataclass(frozen=True, slots=True)
class Write:
    """One statement of a writer."""

    row: Row
    gone: bool = False
    nature: Nature = "sound"

    def within(self, world: World, transaction: OpenTransaction) -> None:
        world.write(transaction, self.row, gone=self.gone, nature=self.nature)


def _write(world: World, writes: Sequence[Write]) -> OpenTransaction:
    transaction = world.begin()
    for one in writes:
        one.within(world, transaction)
    return transaction


def _known(world: World, name: str) -> str:
    return name if name in world.places else "api"


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """A target becomes known."""

    name: str = "api"
    start: Start = "beginning"
    honours_keys: bool = False
    setup: Setup = Setup()  # noqa: RUF009 - frozen

    def __call__(self, world: World) -> None:
        if self.name not in world.places:
            world.register(self.name, start=self.start, honours_keys=self.honours_keys, setup=self.setup)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A writer begins, and is not done."""

    writes: tuple[Write, ...] = ()

    def __call__(self, world: World) -> None:
        if len(world.open) < 3:
            _write(world, self.writes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue:
    """A writer that is not done goes on, and may be done then."""

    index: int = 0
    writes: tuple[Write, ...] = ()
    then: Literal["wait", "commit", "roll back"] = "wait"

    def __call__(self, world: World) -> None:
        if not world.open:
            return
        transaction = world.open[self.index % len(world.open)]
        for one in self.writes:
            one.within(world, transaction)
        if self.then == "commit":
            world.commit(transaction)
        elif self.then == "roll back":
            world.roll_back(transaction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A writer is done at once."""

    writes: tuple[Write, ...] = ()

    def __call__(self, world: World) -> None:
        world.commit(_write(world, self.writes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a row holds now is addressed to a target, as by an initial load or a repair."""

    name: str = "api"
    key: str = "a"

    def __call__(self, world: World) -> None:
        transaction = world.begin()
        world.repair(transaction, ("people", self.key), _known(world, self.name))
        world.commit(transaction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """Some events are addressed to a target once more, as by a backfill."""

    name: str = "api"
    first: int = 0
    count: int = 1

    def __call__(self, world: World) -> None:
        events = [one for one in world.source.committed.values() if one.row[0] == "visits" and one.target is None]
        transaction = world.begin()
        for change in sorted(events, key=lambda one: one.change_id)[self.first : self.first + self.count]:
            world.replay(transaction, change, _known(world, self.name))
        world.commit(transaction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redrive:
    """A dead letter is closed, and what it was about is sent once more."""

    name: str = "api"
    index: int = 0

    def __call__(self, world: World) -> None:
        name = _known(world, self.name)
        letters = sorted(world.places[name].book.open_dead())
        if letters:
            world.redrive(name, letters[self.index % len(letters)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Time passes, a target's configuration changes, somebody writes, and the target is drained."""

    name: str = "api"
    seconds: float = 0.0
    configure: tuple[tuple[str, Any], ...] = ()
    writes: tuple[Write, ...] = ()
    course: Course = Course()  # noqa: RUF009 - frozen

    def __call__(self, world: World) -> None:
        name = _known(world, self.name)
        for field, value in self.configure:
            world.configure(name, field, value)
        world.clock.advance(self.seconds)
        world.commit(_write(world, self.writes))
        world.drain(name, self.course)


@dataclass(frozen=True, slots=True)
class Rival:
    """A second drain of the target that is being drained is begun."""

    def __call__(self, world: World) -> None:
        world.rival()


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleDown:
    """All is well for a while."""

    name: str = "api"

    def __call__(self, world: World) -> None:
        world.settle_down(_known(world, self.name))


Step = Register | Begin | Continue | Commit | Repair | Backfill | Redrive | Drain | Rival | SettleDown
MakeSubject = Callable[[SimulatedClock, ExitStack], SimulatedFake | EmptiedPostgres]


def run(make_subject: MakeSubject, program: Sequence[Step]) -> None:
    """Take the steps of *program*, hold all against the model after each, and let all settle at the end."""
    world = World(make_subject)
    with ExitStack() as stack:
        stack.callback(world.close)
        for step in program:
            step(world)
            world.check()
        world.finish()


# --- making a failure smaller -----------------------------------------------------------------------------------------


def reduced(make_subject: MakeSubject, program: Sequence[Step], *, most_runs: int = 3000) -> tuple[Sequence[Step], str]:
    """Return a program that fails in the same place and from which nothing can be left out, and how it fails.

    Hypothesis cuts single values well, but hardly ever drops a step as large as one of ours.
    """
    place, words = _failure(make_subject, program)
    runs = 0

    def fails_too(candidate: Sequence[Step]) -> bool:
        nonlocal program, words, runs
        runs += 1
        if place is None or runs > most_runs:
            return False
        found, said = _failure(make_subject, candidate)
        if found == place:
            program, words = candidate, said
        return found == place

    before: Sequence[Step] = ()
    while program != before:
        before = program
        size = len(program)
        while size := size // 2:
            for start in range(len(program) - size, -1, -size):
                fails_too([*program[:start], *program[start + size :]])
        for position in range(len(program) - 1, -1, -1):
            while any(
                fails_too([*program[:position], less, *program[position + 1 :]]) for less in _smaller(program[position])
            ):
                pass
    return program, words


def _failure(make_subject: MakeSubject, program: Sequence[Step]) -> tuple[object, str]:
    """Return where and how *program* fails; None if it does not."""
    try:
        run(make_subject, program)
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        assert trace is not None
        return (type(error), trace.tb_frame.f_code.co_name, trace.tb_lineno), f"{type(error).__name__}: {error}"
    return None, ""


def _smaller(value: Any) -> Iterator[Any]:
    """Return values that say less than *value*."""
    if isinstance(value, tuple):
        size = len(value)
        while size:
            for start in range(0, len(value), size):
                yield (*value[:start], *value[start + size :])
            size //= 2
        for position, item in enumerate(value):
            for less in _smaller(item):
                yield (*value[:position], less, *value[position + 1 :])
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            now = getattr(value, field.name)
            if field.default is not MISSING and now != field.default:
                yield replace(value, **{field.name: field.default})
            for less in _smaller(now):
                yield replace(value, **{field.name: less})
    elif isinstance(value, int) and not isinstance(value, bool) and 1 < value < 50:
        yield value - 1


def written(program: Sequence[Step]) -> str:
    """Return *program* as code, what is as by default left out."""
    return "[\n" + "".join(f"    {_written(step)},\n" for step in program) + "]"


def _written(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        given = [
            f"{field.name}={_written(getattr(value, field.name))}"
            for field in fields(value)
            if getattr(value, field.name) != field.default
        ]
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_written(item)}, " for item in value).strip() + ")"
    return repr(value)
