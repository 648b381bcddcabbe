"""The soak from beginning to end: write, misbehave, kill, let everything get well, wait, and judge."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psycopg

from demo import ledger_counts
from demo.processes import ROOT, ProgramFailed
from soak import processes
from soak.processes import Kind, Seen
from soak.report import CaughtUp, Course, Struck, judge
from soak.schedule import Attack, Blow, Misbehaviour, blows, misbehaviours
from soak.watch import Watch
from soak.world import ROUTES, World, set_up

_TICK = 0.1
_SAMPLE_SECONDS = 2.0
_TELL_SECONDS = 5.0
_LONGEST_START = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How long and how hard."""

    seconds: float = 600.0
    patience: float = 600.0
    """Seconds for every target to catch up once all is well."""
    per_second: float = 40.0
    """Transactions of the source."""
    outage: float | None = None
    """Seconds for which the target `away` is down; by default a fifth of the whole."""
    seed: int = 1
    folder: Path = ROOT / ".data" / "soak"
    """For logs and numbers."""
    name: str = "soak"
    """Names the databases."""


@dataclass(slots=True, kw_only=True)
class _Owing:
    target: str
    was: str
    since: float
    ids: str
    """What it was owed when it got well, as a multirange."""
    owed: int


def soak(options: Options, say: Callable[[str], None]) -> int:
    """Run it all and print what was found; returns 0 only if every target agrees with the source."""
    plan = misbehaviours(options.seconds, outage=options.outage)
    with set_up(options.folder, options.name, say) as world, world.connect() as source:
        run = _Soak(options=options, plan=plan, say=say, world=world, source=source)
        run.go()
        return judge(world, source, run.course(caught_up_in=run.wait_until_caught_up()), say)


@dataclass(slots=True, kw_only=True)
class _Soak:
    options: Options
    plan: Sequence[Misbehaviour]
    say: Callable[[str], None]
    world: World
    source: psycopg.Connection
    started: float = field(default_factory=time.monotonic)
    watch: Watch = field(default_factory=Watch)
    dice: Random = field(init=False)
    struck: list[Struck] = field(default_factory=list)
    mood: dict[str, str] = field(default_factory=dict)
    caught_up: list[CaughtUp] = field(default_factory=list)
    _owing: list[_Owing] = field(default_factory=list)
    _sampled_at: float = 0.0
    _told_at: float = 0.0

    def __post_init__(self) -> None:
        self.dice = Random(self.options.seed)

    @property
    def now(self) -> float:
        """Seconds since the writers began."""
        return time.monotonic() - self.started

    # The course of it ------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Write, misbehave and kill for as long as was asked."""
        self.say("Starting the writers, and waiting until every target has had something")
        self.world.start_writers(self.options.per_second)
        self._wait_for_first_deliveries()
        self.say(f"From now on targets misbehave and processes are killed, for {self.options.seconds:.0f} s")
        self.started = time.monotonic()
        moods, strikes = list(self.plan), list(blows(self.options.seconds))
        while self.now < self.options.seconds:
            while moods and moods[0].at <= self.now:
                self._behave(moods.pop(0))
            # What finds nothing to kill is tried again until it does.
            if strikes and strikes[0].at <= self.now and self._strike(strikes[0]):
                strikes.pop(0)
            self._pass_time()
        self.world.stop_writers()
        for change in moods:
            self._behave(change)
        for blow in strikes:
            self.say(f"There was nothing left to strike with: {blow.attack}")

    def _wait_for_first_deliveries(self) -> None:
        while not all(ledger_counts.progress(self.source).get(target) for target in ROUTES):
            self.world.raise_if_any_ended()
            if self.now > _LONGEST_START:
                raise ProgramFailed(
                    f"Not every target had something delivered within {_LONGEST_START:.0f} s. "
                    f"{self.world.running['daemon'].last_words()}"
                )
            time.sleep(_TICK)

    def wait_until_caught_up(self) -> float | None:
        """Wait until no target is owed anything; return the seconds that took, None if they ran out."""
        self.say("The writers have stopped and every target is well; waiting until each has everything")
        began = time.monotonic()
        while time.monotonic() - began < self.options.patience:
            self._pass_time(_SAMPLE_SECONDS / 2)
            if not any(self._owed().values()):
                counts = ledger_counts.counts(self.source)
                if not any(one.pending or one.claimed for one in counts.values()):
                    self._note_who_caught_up()
                    return time.monotonic() - began
        return None

    def course(self, *, caught_up_in: float | None) -> Course:
        """Return what happened, for the report."""
        return Course(
            seconds=self.options.seconds,
            struck=self.struck,
            caught_up=self.caught_up,
            caught_up_in=caught_up_in,
            workers=sum(one.kind == "run" for one in self._seen()),
            watch=self.watch,
        )

    def _pass_time(self, seconds: float = _TICK) -> None:
        time.sleep(seconds)
        self.world.raise_if_any_ended()
        now = self.now
        if now - self._sampled_at >= _SAMPLE_SECONDS:
            self._sampled_at = now
            self.watch.look(now, self._seen())
            self._note_who_caught_up()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            self._tell()

    def _tell(self) -> None:
        owed = self._owed()
        parts = [
            f"{target} {count:,}" + (f" ({self.mood[target]})" if self.mood.get(target) else "")
            for target, count in owed.items()
            if count or self.mood.get(target)
        ]
        drains = self.watch.samples[-1].drains if self.watch.samples else 0
        written = ledger_counts.captured(self.source)
        self.say(f"{self.now:4.0f} s: {written:,} changes, {drains} drains; owed: {', '.join(parts) or 'nothing'}")

    # Misbehaving -----------------------------------------------------------------------------------------------------

    def _behave(self, change: Misbehaviour) -> None:
        self.world.behave(change)
        was = self.mood.get(change.target, "")
        self.mood[change.target] = change.what
        if change.what:
            self.say(f"{self.now:4.0f} s: {change.target} {change.what} from now on")
            self._owing = [one for one in self._owing if one.target != change.target]
            return
        row = self.source.execute(_OWED, [change.target]).fetchone()
        ids, owed = row or ("{}", 0)
        self.say(f"{self.now:4.0f} s: {change.target} is well again, and owed {owed:,} changes")
        self._owing.append(_Owing(target=change.target, was=was, since=self.now, ids=ids, owed=owed))

    def _note_who_caught_up(self) -> None:
        for one in list(self._owing):
            if self.source.execute(_SETTLED, [one.ids, one.target]).fetchone() == (True,):
                self._owing.remove(one)
                self.caught_up.append(
                    CaughtUp(target=one.target, was=one.was, owed=one.owed, seconds=round(self.now - one.since, 1))
                )

    def _owed(self) -> Mapping[str, int]:
        captured, done = ledger_counts.captured(self.source), ledger_counts.progress(self.source)
        return {target: max(0, captured - done.get(target, 0)) for target in ROUTES}

    # Killing ---------------------------------------------------------------------------------------------------------

    def _strike(self, blow: Blow) -> bool:
        """Strike; returns whether there was anything to strike at."""
        what = self._hit(blow.attack)
        if what is None:
            return False
        self.struck.append(Struck(at=round(self.now, 1), attack=blow.attack, what=what))
        self.say(f"{self.now:4.0f} s: {what}")
        return True

    def _hit(self, attack: Attack) -> str | None:
        match attack:
            case "kill a drain" | "stop a drain":
                number = signal.SIGKILL if attack == "kill a drain" else signal.SIGTERM
                drain = self._one_of("drain")
                if drain is None or not processes.kill(drain.pid, number):
                    return None
                return f"{number.name} to the drain of {self._target_of(drain)}"
            case "cut a drain's connection":
                row = self.source.execute(_CUT).fetchone()
                return None if row is None else f"cut the database connection of {row[0].removeprefix('distributary ')}"
            case "kill a run":
                run = self._one_of("run")
                return "SIGKILL to a run's worker" if run is not None and processes.kill(run.pid) else None
            case "kill the daemon":
                self._kill("daemon")
                self.world.start_daemon()
                return "SIGKILL to the daemon, and another started"
            case "kill all":
                drains = sum(one.kind == "drain" for one in self._seen())
                self._kill("daemon", "code_server")
                self.world.start_code_server()
                self.world.start_daemon()
                return f"SIGKILL to daemon, code server, every run and {drains} drains, and all started again"

    def _kill(self, *names: str) -> None:
        programs = [self.world.running.pop(name) for name in names]
        for program in programs:
            if (group := processes.command_of(program.guard.pid)) is not None:
                processes.kill_group(group)
        for program in programs:
            program.stop()

    def _one_of(self, kind: Kind) -> Seen | None:
        # Steps that plan and conclude are drains by their looks, but speak with no target.
        found = [one for one in self._seen() if one.kind == kind and (kind != "drain" or self._target_of(one))]
        return self.dice.choice(found) if found else None

    def _target_of(self, drain: Seen) -> str:
        names = [name for name, port in self.world.ports.items() if port in drain.connected_to]
        return names[0] if names else ""

    def _seen(self) -> Sequence[Seen]:
        kinds: Mapping[str, Kind] = {"daemon": "daemon", "code_server": "code server"}
        groups = {}
        for name, kind in kinds.items():
            program = self.world.running.get(name)
            if program is not None and (group := processes.command_of(program.guard.pid)) is not None:
                groups[group] = kind
        return processes.seen_in(groups)


_CUT = """
select application_name from (
    select application_name, pid from pg_stat_activity
    where datname = current_database() and application_name like 'distributary drain %'
    order by random() limit 1
) one where pg_terminate_backend(pid)
"""
_OWED = """
select coalesce(range_agg(int8range(l.change_id, l.change_id, '[]')), '{}')::text, count(*)
from distributary.change_log l, distributary.target_state s
where s.target = %s and not s.settled @> l.change_id
"""
_SETTLED = "select settled @> %s::int8multirange from distributary.target_state where target = %s"
