"""The system under test and all that surrounds it: a source, targets that misbehave as told, drains that die as told.

What is seen on the way (requests, answers, commits) is held against `model` at once: a wrong step fails where it is
taken.
"""

import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from email.utils import format_datetime
from functools import lru_cache
from queue import Empty
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

from pipelines.changes.record import Operation
from pipelines.delivery.drain import DrainLimits, DrainPolicy, StopRequest, drain
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.ledger import (
    Claim,
    Leftover,
    PendingWindow,
    Settlement,
    Start,
    Status,
    TargetLedger,
    TargetState,
    Window,
)
from pipelines.delivery.outcome import DeadRecord
from pipelines.delivery.report import DrainReport
from pipelines.delivery.routing import HttpRequest, Route
from pipelines.delivery.sending import RetryPolicy
from pipelines.delivery.target import Answer, Multiplexer, NoAnswer, TargetClient
from pipelines_tests.contracts.ledgers import FakeSubject, PostgresSubject, Writer
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.target import routes_of
from pipelines_tests.model.model import (
    Asked,
    Book,
    Change,
    Fate,
    Meaning,
    Nature,
    Row,
    Source,
    Transaction,
    meaning_of_status,
    meanings,
)
from pipelines_tests.model.simulation import SimulatedClock, Turns, simulation

Mode = Literal["state", "event"]
Verbs = Literal["upsert", "upsert delete", "insert", "insert update delete"]
Results = Literal["none", "items", "errors"]
OnDead = Literal["continue", "block", "supersede"]


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec:
    """One stream's route, as a target's file might have it."""

    mode: Mode = "state"
    verbs: Verbs = "upsert delete"
    batch: int = 0
    """Records in a request; 0 is a route of single records."""
    results: Results = "none"
    falls_back: bool = False
    on_dead: OnDead = "continue"
    version: int = 1

    @property
    def mapping(self) -> tuple[object, ...]:
        """What the bytes of a request and the cut of a claim follow from."""
        return self.verbs, self.batch > 0, self.results, self.version

    def wants(self, change: Change) -> bool:
        if change.operation == "delete":
            return "delete" in self.verbs
        return change.operation != "update" or self.verbs != "insert"

    def batched(self, kind: str) -> bool:
        # Without results only a path can say that a record is missing, and that path names one.
        return self.batch > 0 and (kind != "update" or self.results != "none")

    def written(self, stream: str) -> dict[str, Any]:
        """Return the route as it stands in a file."""
        record = {"id": "$_key", "change": "$_change_id", "v": self.version, "name": "$name"}
        route: dict[str, Any] = {"mode": self.mode, "record": record, "on_dead": self.on_dead}
        for kind in self.verbs.split():
            operation = route[kind] = {"path": f"/{stream}/{kind}"}
            if self.batched(kind):
                operation["batch"] = {"max_records": self.batch}
                if self.results == "items":
                    operation["results"] = {"items": "$.results", "id": "id", "status": "status"}
                elif self.results == "errors":
                    operation["results"] = {"errors": "$.errors", "index": "index", "status": "status"}
                if kind == "delete":
                    operation["method"] = "POST"
                    operation["record"] = {"id": "$_key", "change": "$_change_id", "v": self.version}
            elif kind == "update":
                operation["path"] += "/${_key}"
            elif kind == "delete":
                operation["path"] += f"/${{_key}}?change=${{_change_id}}&v={self.version}"
            if self.falls_back and kind == "insert" and "update" in self.verbs:
                operation["on_conflict"] = "update"
            if self.falls_back and kind == "update":
                operation["on_missing"] = "insert"
        return route


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How one target is configured."""

    people: RouteSpec | None = RouteSpec()
    visits: RouteSpec | None = RouteSpec(mode="event", batch=3)
    lanes: int = 2
    window_records: int = 6
    window_bytes: int = 1_000_000
    failure_threshold: int = 3
    dead_letter_guard: float = 0.5
    rules: JudgingRules = JudgingRules()  # noqa: RUF009 - frozen

    def route(self, stream: str) -> RouteSpec | None:
        return {"people": self.people, "visits": self.visits}[stream]

    @property
    def streams(self) -> dict[str, RouteSpec]:
        both = {"people": self.people, "visits": self.visits}
        return {stream: spec for stream, spec in both.items() if spec is not None}


@lru_cache(maxsize=1000)
def _compiled(people: RouteSpec | None, visits: RouteSpec | None) -> Mapping[str, Route]:
    written = {stream: spec.written(stream) for stream, spec in Setup(people=people, visits=visits).streams.items()}
    return routes_of(**written, others=RouteSpec().written("others"))


# --- what may go wrong ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What becomes of one request. *applied* says how much of it the target does before the answer is lost."""

    kind: Literal["none", "status", "no answer", "items", "garbled"] = "none"
    status: int = 500
    retry_after: str | None = None
    """As the header; `date:20` is the date in 20 seconds."""
    applied: Literal["nothing", "half", "all"] = "nothing"
    may_have_arrived: bool = True
    items: tuple[int | None, ...] = ()
    """By position: a status in place of what the target thinks of the record, 0 for none, None to pass it over."""
    seconds: float = 0.01


FINE = Trouble()

CrashPoint = Literal[
    "leftovers",
    "pending",
    "claim",
    "claimed",
    "split",
    "split up",
    "settle",
    "settled",
    "hold",
    "resume",
    "send",
    "sent",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """Where a drain fails: the *nth* time that it comes to *point*. The process *dies*, or that one call raises."""

    point: CrashPoint
    nth: int = 1
    dies: bool = True
    arrives: bool = False
    """What other lanes had under way when the process died reaches the target all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """All that happens to one drain. Requests are counted from 1 in the order in which they leave."""

    seed: int = 0
    multiplexed: bool = False
    """Lanes have their requests carried by one thread, so far as that takes no waiting."""
    troubles: tuple[Trouble, ...] = ()
    afterwards: Trouble = FINE
    crash: Crash | None = None
    stop_at: int | None = None
    max_seconds: float | None = None
    linger_seconds: float = 0.0
    meanwhile: tuple[tuple[int, Any], ...] = ()
    """What others do when a request leaves: its number, and a function of the world."""


class Crashed(Exception):
    """The process died, or the database said no."""


# --- a target ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer before it is bytes. *items* is None if the answer has no list, or one that nobody can read."""

    status: int
    items: tuple[int | None, ...] | None = None
    garbled: bool = False
    retry_after: str | None = None


class Api:
    """A target that applies what it is sent, and remembers what it did. It may honour idempotency keys or not."""

    def __init__(self, name: str, *, honours_keys: bool) -> None:
        self.name, self.honours_keys = name, honours_keys
        self.there: dict[Row, bool] = {}
        self.newest: dict[Row, int] = {}
        """The change that each row was last changed by."""
        self.applied: dict[Row, set[int]] = defaultdict(set)
        self._stored: dict[UUID, Reply] = {}
        self._touched: set[UUID] = set()

    def take(
        self,
        key: UUID,
        members: Sequence[Change],
        asked: Asked,
        trouble: Trouble,
        rules: JudgingRules,
        apply: Callable[[Change], None],
    ) -> Reply | None:
        """Do what the request asks, as far as *trouble* lets it, and return the answer, None if it is lost."""
        match trouble.kind:
            case "no answer":
                self._do_some(key, members, asked, trouble, apply)
                return None
            case "status" if self._may_say(trouble.status, key, asked, rules):
                if meaning_of_status(trouble.status, asked, rules) == "fault" and trouble.status not in (425, 429, 503):
                    self._do_some(key, members, asked, trouble, apply)
                return Reply(status=trouble.status, retry_after=trouble.retry_after)
            case "garbled" if asked.results != "none":
                self._do(key, members, asked, (), apply)
                return Reply(status=200, garbled=True)
            case "items" if asked.results != "none":
                return self._do(key, members, asked, trouble.items, apply)
            case _:
                return self._do(key, members, asked, (), apply)

    def _may_say(self, status: int, key: UUID, asked: Asked, rules: JudgingRules) -> bool:
        """No target says that a record is gone which is not, or refuses a request that it has begun to apply."""
        if status in (404, 410) and asked.names_record:
            return False
        meaning = meaning_of_status(status, asked, rules)
        if meaning == "results":
            return False
        return meaning in ("fault", "credentials", "configuration", "gone") or key not in self._touched

    def _do_some(
        self, key: UUID, members: Sequence[Change], asked: Asked, trouble: Trouble, apply: Callable[[Change], None]
    ) -> None:
        if trouble.applied == "all":
            self._do(key, members, asked, (), apply)
        elif trouble.applied == "half" and key not in self._stored:
            half = members[: (len(members) + 1) // 2]
            if all(self._opinion(one, asked.kind) < 300 for one in half):
                for one in half:
                    apply(one)
                self._touched.add(key)

    def _opinion(self, change: Change, kind: str) -> int:
        there = self.there.get(change.row, False)
        if change.nature == "refused":
            return 422
        if kind == "insert" and there:
            return 409
        if kind in ("update", "delete") and not there:
            return 404
        return 200

    def _do(
        self,
        key: UUID,
        members: Sequence[Change],
        asked: Asked,
        items: tuple[int | None, ...],
        apply: Callable[[Change], None],
    ) -> Reply:
        if self.honours_keys and key in self._stored:
            stored = self._stored[key]
            if asked.results != "none" and stored.items is None:  # the route did not read them then
                return replace(stored, status=200, items=(200,) * len(members))
            return stored
        # One after another: a batch may hold a row's insert and its update.
        there = dict(self.there)
        said: list[int | None] = []
        for position, one in enumerate(members):
            item = items[position] if position < len(items) else 0
            opinion = self._opinion(one, asked.kind)
            if item == 0:
                item = opinion
                if opinion < 300 or (opinion == 404 and asked.kind == "delete"):
                    self.there[one.row] = asked.kind != "delete"
            said.append(item)
        self.there = there
        fine = [item is not None and (item < 300 or (item == 404 and asked.kind == "delete")) for item in said]
        if asked.results == "none" and not all(fine):
            worst = next(item for item, good in zip(said, fine, strict=True) if not good)
            return Reply(status=worst if asked.alone and worst is not None else 422)
        for one, good in zip(members, fine, strict=True):
            if good:
                apply(one)
        if asked.results != "none":
            reply = Reply(status=200, items=tuple(said))
        else:
            reply = Reply(status=404 if asked.alone and said[0] == 404 and asked.names_record else 200)
        if any(fine):
            self._touched.add(key)
            self._stored[key] = reply
        return reply


def _body_of(reply: Reply, asked: Asked, members: Sequence[Change]) -> bytes:
    if reply.garbled:
        return b"<html>it works</html>"
    if reply.items is None:
        return b""
    listed = [
        (i, one.row[1], item)
        for i, (one, item) in enumerate(zip(members, reply.items, strict=True))
        if item is not None
    ]
    if asked.results == "items":
        return json.dumps({"results": [{"id": key, "status": item} for _, key, item in listed]}).encode()
    bad = [{"index": i, "status": item} for i, _, item in listed if item >= 300]
    return json.dumps({"errors": bad} if bad else {}).encode()


# --- one drain --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _InDoubt:
    """A change was sent and may have been applied; it must be sent again under *key* unless the mapping is another."""

    key: UUID
    mapping: object


@dataclass(slots=True)
class Place:
    """One target with all that is known of it."""

    api: Api
    book: Book
    setup: Setup
    acknowledged: set[int] = field(default_factory=set)
    """Changes that the target said it took."""
    believed: set[int] = field(default_factory=set)
    """Acknowledged by a status that only this configuration calls a success."""
    refused: set[int] = field(default_factory=set)
    """Changes that the target refused by name."""
    in_doubt: dict[int, _InDoubt] = field(default_factory=dict)
    mappings: dict[str, int] = field(default_factory=lambda: {"people": 0, "visits": 0})
    """How often each stream's mapping was changed."""
    bytes_of: dict[UUID, tuple[object, ...]] = field(default_factory=dict)
    key_of: dict[tuple[object, ...], UUID] = field(default_factory=dict)
    excused: set[int] = field(default_factory=set)
    """Superseded changes that no route wanted anyhow."""


class Run:
    """One drain under way: what it does is watched, what happens to it is in its course."""

    def __init__(self, world: "World", place: Place, course: Course, turns: Turns) -> None:
        self.world, self.place, self.course, self.turns = world, place, course, turns
        self.stop = StopRequest()
        self.dead = False
        self.crashed = False
        self.requests = 0
        self.rows_aside: set[Row] = set()
        """Rows of which nothing is sent for now, for a change of theirs was set aside."""
        self.decided: dict[int, UUID] = {}
        self.dying: set[int] = set()
        self.closed_before = frozenset(place.book.closed)
        self.batches: dict[int, Sequence[int]] = {}
        """The members of the batches that the drain has in memory."""
        self.seen: Counter[str] = Counter()
        self._under_way: set[Row] = set()
        self._visits: Counter[str] = Counter()
        self._leave_alone: tuple[float, float] = (0.0, 0.0)

    def reach(self, point: CrashPoint) -> None:
        """Fail here if the course says so; a dead process does nothing more."""
        if self.dead:
            raise Crashed("the process is dead")
        self._visits[point] += 1
        crash = self.course.crash
        if crash is not None and crash.point == point and crash.nth == self._visits[point]:
            self.crashed = True
            self.dead = crash.dies
            raise Crashed(f"{point}, call {crash.nth}")

    # --- requests ----------------------------------------------------------------------------------------------------

    def exchange(self, request: HttpRequest, key: UUID) -> Answer | NoAnswer:
        if self.dead:
            raise Crashed("the process is dead")
        self.requests += 1
        number, course = self.requests, self.course
        for at, happens in course.meanwhile:
            if at == number:
                happens(self.world)
        if course.stop_at == number:
            self.stop.set()
        trouble = course.troubles[number - 1] if number <= len(course.troubles) else course.afterwards
        asked, members, mapping = self._read(request)
        self._check_leaving(request, key, asked, members, mapping)
        before = {one.change_id: self.place.in_doubt.get(one.change_id) for one in members}
        rows = {one.row for one in members}
        assert not rows & self._under_way, f"{rows & self._under_way} are under way twice"
        self._under_way |= rows
        try:
            self.reach("send")
            for one in members:
                self.place.in_doubt[one.change_id] = _InDoubt(key, mapping)
            self.turns.sleep(trouble.seconds / 2)
            if self.dead and not (course.crash and course.crash.arrives):
                raise Crashed("the process is dead")
            rules = self.place.setup.rules
            reply = self.place.api.take(key, members, asked, trouble, rules, self._apply(key))
            self.reach("sent")
            self.turns.sleep(trouble.seconds / 2)
            if self.dead:
                raise Crashed("the process is dead")
        finally:
            self._under_way -= rows
        if reply is None:
            arrived = trouble.may_have_arrived or trouble.applied != "nothing"
            self.seen["fault"] += 1
            if not arrived:
                self._no_longer_in_doubt(before)
            return NoAnswer(reason="the connection broke", may_have_arrived=arrived)
        headers = {} if reply.retry_after is None else {"retry-after": self._header(reply.retry_after)}
        self._learn(reply, key, asked, members, before)
        return Answer(
            status=reply.status, headers=headers, body=_body_of(reply, asked, members), seconds=trouble.seconds
        )

    def _header(self, text: str) -> str:
        if not text.startswith("date:"):
            return text
        return format_datetime(self._date(text), usegmt=True)

    def _date(self, text: str) -> datetime:
        """Return the date, which in a header has whole seconds."""
        return (self.world.clock.now() + timedelta(seconds=int(text.removeprefix("date:")))).replace(microsecond=0)

    def _read(self, request: HttpRequest) -> tuple[Asked, list[Change], object]:
        url = urlsplit(request.path)
        _, stream, kind, *rest = url.path.split("/")
        spec = self.place.setup.route(stream)
        assert spec is not None, f"{stream} has no route"
        if request.body is None:
            ids = [(unquote(rest[0]), int(parse_qs(url.query)["change"][0]))]
        else:
            document = json.loads(request.body)
            ids = [(one["id"], one["change"]) for one in (document if isinstance(document, list) else [document])]
        members = [self.world.source.committed[change_id] for _, change_id in ids]
        assert [(stream, key) for key, _ in ids] == [one.row for one in members]
        asked = Asked(
            kind=kind,
            alone=len(members) == 1,
            names_record=bool(rest),
            results=spec.results if spec.batched(kind) else "none",
            falls_back=spec.falls_back and (kind != "insert" or "update" in spec.verbs),
        )
        return asked, members, (kind, self.place.mappings[stream])

    def _aliases(self, change: Change) -> list[int]:
        """Return the change itself and its replays: a target cannot tell them apart, and nor can its requests."""
        return [change.change_id, *self.world.source.replays_of(change.change_id, self.place.api.name)]

    def _check_leaving(
        self, request: HttpRequest, key: UUID, asked: Asked, members: Sequence[Change], mapping: object
    ) -> None:
        place, now = self.place, self.world.clock.seconds
        told_at, until = self._leave_alone
        assert not told_at < now < until - 1e-6, (
            f"a request left at {now:g}; the target asked for none before {until:g}"
        )
        what = (request.method, request.path, request.body, request.content_type)
        assert place.bytes_of.setdefault(key, what) == what, f"the key {key} came with another body"
        if request.body is not None:
            assert place.key_of.setdefault(what, key) == key, f"the same bytes came under another key: {request.body!r}"
        for one in members:
            aliases = self._aliases(one)
            spec = place.setup.route(one.row[0])
            if spec is not None and spec.on_dead == "block":
                behind = self._dead_before(one)
                assert not behind, f"{one} was sent although {behind} are dead and block it"
            assert any(alias in place.book.claimed for alias in aliases), f"{one} was sent, but it is not claimed"
            if len(aliases) > 1:
                continue
            assert one.change_id not in self.decided, f"{one} was sent again after its fate was known"
            doubt = place.in_doubt.get(one.change_id)
            assert doubt is None or doubt.key == key or doubt.mapping != mapping, (
                f"{one} may have been applied under {doubt and doubt.key}; it came again under {key}"
            )

    def _dead_before(self, change: Change) -> set[int]:
        """Return the open dead letters of the row, or what will be one, that came before *change* and its replays."""
        known = self.place.book.open_dead() | (self.dying - set(self.place.book.fates))
        last = max(alias for alias in self._aliases(change) if alias in self.place.book.claimed)
        return {one for one in known if self.world.source.committed[one].row == change.row and one < last}

    def _apply(self, key: UUID) -> Callable[[Change], None]:
        api, book = self.place.api, self.place.book

        def apply(change: Change) -> None:
            row, change_id = change.row, change.change_id
            if len(self._aliases(change)) == 1:
                applied = api.applied[row]
                settled = [one for one in applied if book.fates.get(one) == "accepted" or one in self.decided]
                assert change_id >= max(settled, default=0), f"{row} has {max(settled)} for good, now comes {change_id}"
                assert change_id in applied or change_id > max(applied, default=0), (
                    f"{change_id} was overtaken: {applied}"
                )
            api.applied[row].add(change_id)
            api.newest[row] = change_id
            api.there[row] = change.operation != "delete"

        return apply

    def _learn(
        self, reply: Reply, key: UUID, asked: Asked, members: Sequence[Change], before: Mapping[int, _InDoubt | None]
    ) -> None:
        rules = self.place.setup.rules
        whole, each = meanings(reply.status, None if reply.garbled else reply.items, asked, rules)
        self.seen[whole] += 1
        if whole == "fault":
            if reply.status in (425, 429, 503):
                self._no_longer_in_doubt(before)
            self._note_retry_after(reply.retry_after)
        elif whole in ("credentials", "configuration", "gone"):
            self._no_longer_in_doubt(before)
        else:
            # A 409 to a repeat whose outcome is not known may mean that the target is still at it: asked again, or not.
            doubts = [before[one.change_id] for one in members]
            repeat = all(doubt is not None and doubt.key == key for doubt in doubts)
            final = bool(each) or not (repeat and reply.status == 409 and 409 not in rules.drop_on)
            for one, meaning in zip(members, each or [whole] * len(members), strict=True):
                if final or meaning != "refused":
                    self.place.in_doubt.pop(one.change_id, None)
                self.seen["fault"] += bool(each) and meaning == "fault"
                self._decide(one, meaning, key, final=final)
                if meaning == "accepted" and one.change_id not in self.place.api.applied[one.row]:
                    self.place.believed.update(self._aliases(one))

    def _decide(self, change: Change, meaning: Meaning, key: UUID, *, final: bool) -> None:
        ids = [alias for alias in self._aliases(change) if alias in self.place.book.claimed]
        if meaning == "accepted":
            self.place.acknowledged.update(ids)
        # An update that falls back on an insert, and the other way round, is refused for good by the second.
        if meaning in ("refused", "fallback"):
            self.place.refused.update(ids)
        if meaning in ("accepted", "refused") and ids == [change.change_id] and (final or meaning == "accepted"):
            self.decided[change.change_id] = key
            if meaning == "refused":
                self.dying.add(change.change_id)

    def _no_longer_in_doubt(self, before: Mapping[int, _InDoubt | None]) -> None:
        for change_id, doubt in before.items():
            if doubt is None:
                self.place.in_doubt.pop(change_id, None)
            else:
                self.place.in_doubt[change_id] = doubt

    def _note_retry_after(self, text: str | None) -> None:
        if text is None:
            return
        if text.startswith("date:"):
            asked = (self._date(text) - self.world.clock.now()).total_seconds()
        elif text.isdigit():
            asked = float(text)
        else:
            return
        now = self.world.clock.seconds
        until = now + min(asked, self.place.setup.rules.max_retry_after)
        if until > self._leave_alone[1]:
            self._leave_alone = (now, until)

    @property
    def leave_alone_until(self) -> float:
        return self._leave_alone[1]


class _Client(TargetClient):
    def __init__(self, run: Run) -> None:
        self._run = run
        self.connected = False

    def send(self, request: HttpRequest, *, key: UUID) -> Answer | NoAnswer:
        answer = self._run.exchange(request, key)
        self.connected = isinstance(answer, Answer)
        return answer

    def multiplexer(self) -> Multiplexer | None:
        return _Multiplexer(self._run) if self._run.course.multiplexed else None

    def close(self) -> None: ...


class _Multiplexer(Multiplexer):
    """Carries requests where a connection is open; of one that broke, the client has to send the same once more."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ended = run.turns.queue()

    def begin(self, lane: int, client: TargetClient, request: HttpRequest, *, key: UUID) -> bool:
        assert isinstance(client, _Client)
        if not client.connected:
            return False

        def carry() -> None:
            try:
                answer: object = client.send(request, key=key)
            except BaseException as error:
                answer = error
            self._ended.put((lane, answer))

        threading.Thread(target=carry, daemon=True).start()
        return True

    def ended(self, seconds: float | None) -> Sequence[tuple[int, Answer | NoAnswer | None]]:
        try:
            one: Any = self._ended.get(timeout=seconds)
        except Empty:
            return []
        if one is None:
            return []
        lane, answer = one
        if isinstance(answer, BaseException):
            raise answer
        return [(lane, None if isinstance(answer, NoAnswer) and answer.may_have_arrived else answer)]

    def wake(self) -> None:
        self._ended.put(None)

    def close(self) -> None: ...


class WatchedLedger(TargetLedger):
    """A target's ledger in which calls fail where the course says so, and whose commits the model hears of."""

    def __init__(self, inner: TargetLedger, run: Run) -> None:
        self._inner, self._run = inner, run
        self._book = run.place.book

    def state(self) -> TargetState:
        return self._inner.state()

    def leftovers(self, *, max_records: int, max_bytes: int) -> Iterator[Sequence[Leftover]]:
        self._run.reach("leftovers")
        state = self._inner.state()
        unwell = (state.failed_runs > 0 or state.status != "active") and not self._run.requests
        self._run.batches, self._run.rows_aside = {}, set()
        found: list[int] = []
        claimed = sorted(self._book.claimed)
        for part in self._inner.leftovers(max_records=max_records, max_bytes=max_bytes):
            ids = [change.change_id for left in part for change in left.changes]
            assert len(ids) <= max_records or len(part) == 1
            found += ids
            # A target that was left unwell is first tried with what was not set aside.
            later = [left for left in part if left.set_aside and unwell]
            self._run.rows_aside |= {(change.stream, change.key) for left in later for change in left.changes}
            self._run.batches |= {left.batch_id: [change.change_id for change in left.changes] for left in part}
            self._check_memory()
            yield part
            self._run.reach("leftovers")
        assert sorted(found) == claimed, f"claimed are {claimed}, left over {found}"

    def blocked(self, keys: Collection[Row]) -> Mapping[Row, int]:
        return self._inner.blocked(keys)

    def _check_memory(self) -> None:
        """What a drain holds in memory has a bound; of what was set aside it keeps nothing but the keys."""
        rows = self._run.world.source.committed
        under_way = {one for batch in self._run.batches.values() for one in batch} & self._book.claimed
        held = [one for one in under_way if rows[one].row not in self._run.rows_aside]
        most = self._run.world.largest_window + max(
            [1, *(spec.batch for spec in self._run.place.setup.streams.values())]
        )
        assert len(held) <= most, f"{len(held)} records are held, not {most}"

    def pending(self, *, max_records: int, max_bytes: int) -> PendingWindow:
        self._run.reach("pending")
        found = self._inner.pending(max_records=max_records, max_bytes=max_bytes)
        assert len(found.records) <= max_records
        return found

    def claim(self, window: Window) -> Sequence[int]:
        self._run.reach("claim")
        batch_ids = self._inner.claim(window)
        for batch_id, claim in zip(batch_ids, window.claims, strict=True):
            self._run.batches[batch_id] = [change.change_id for change in claim.changes]
            self._book.claimed.update(change.change_id for change in claim.changes)
        self._settle("superseded", [change.change_id for change in window.superseded])
        self._settle("filtered", [change.change_id for change in window.filtered])
        self._bury(window.dead)
        self._check_memory()
        self._run.reach("claimed")
        return batch_ids

    def split(self, batch_id: int, parts: Sequence[Claim]) -> Sequence[int]:
        self._run.reach("split")
        batch_ids = self._inner.split(batch_id, parts)
        whole = self._run.batches.pop(batch_id)
        assert [one for part in parts for one in part.changes], "a part of nothing"
        assert self._book.claimed.intersection(whole) == {one.change_id for part in parts for one in part.changes}
        for part_id, part in zip(batch_ids, parts, strict=True):
            self._run.batches[part_id] = [change.change_id for change in part.changes]
        self._run.reach("split up")
        return batch_ids

    def settle(self, settlements: Sequence[Settlement]) -> None:
        self._run.reach("settle")
        self._inner.settle(settlements)
        for settlement in settlements:
            self._settle("accepted", [change.change_id for change in settlement.accepted])
            self._settle("filtered", [change.change_id for change in settlement.filtered])
            # It was claimed when it was wanted, and superseded others then.
            self._book.no_longer_wanted.update(change.change_id for change in settlement.filtered)
            self._bury(settlement.dead)
            if settlement.set_aside:
                still = self._book.claimed.intersection(self._run.batches[settlement.batch_id])
                self._run.rows_aside |= {self._run.world.source.committed[one].row for one in still}
            for change in settlement.accepted:
                spec = self._run.place.setup.route(change.stream)
                if spec is not None and spec.on_dead == "supersede":
                    older = {one for one in self._book.open_dead() if one < change.change_id}
                    rows = self._run.world.source.committed
                    self._book.closed |= {one for one in older if rows[one].row == (change.stream, change.key)}
        self._run.reach("settled")

    def _bury(self, dead: Sequence[DeadRecord]) -> None:
        for record in dead:
            change_id, behind = record.change.change_id, record.blocked_by
            if behind is not None:
                before = self._run.closed_before
                self._run.world.check_block(self._run.place, change_id, behind, dead, closed_before=before)
            self._settle("dead", [change_id], blocked=behind is not None)

    def _settle(self, fate: Fate, change_ids: Sequence[int], *, blocked: bool = False) -> None:
        for change_id in change_ids:
            assert change_id not in self._book.fates, f"{change_id} is {self._book.fates[change_id]}, and now {fate}"
            if not blocked:
                self._run.world.check_fate(self._run.place, change_id, fate)
            self._book.fates[change_id] = fate
            if change_id in self._book.claimed:
                self._book.claimed.remove(change_id)

    def check(self) -> None:
        self._inner.check()

    def hold(self, *, status: Status, reason: str, failed_runs: int, retry_in: float | None) -> None:
        self._run.reach("hold")
        asked = self._run.leave_alone_until - self._run.world.clock.seconds
        assert retry_in is None or retry_in >= asked - 1e-3, f"back in {retry_in}; the target asked for {asked}"
        self._inner.hold(status=status, reason=reason, failed_runs=failed_runs, retry_in=retry_in)

    def resume(self) -> None:
        self._run.reach("resume")
        self._inner.resume()


# --- the whole --------------------------------------------------------------------------------------------------------


class SimulatedFake(FakeSubject):
    """A ledger and source in plain Python."""

    def __init__(self, clock: SimulatedClock, _: ExitStack) -> None:
        self.ledger = self._fake = FakeLedger(clock=clock)

    def close_dead_letter(self, target: str, change_id: int) -> None:
        self._fake.close_dead_letter(target, change_id)


class EmptiedPostgres(PostgresSubject):
    """The real ones, in a database that is emptied first: a fresh one each time would take longer than the test."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        super().__init__(url, stack)
        self._reader.execute("truncate distributary.change_log, distributary.target_state restart identity cascade")

    def close_dead_letter(self, target: str, change_id: int) -> None:
        self._reader.execute(
            "update distributary.dead_letter set state = 'redriven' where target = %s and change_id = %s",
            [target, change_id],
        )


@contextmanager
def _jitter(seed: int) -> Iterator[None]:
    """Have the waits between attempts drawn from *seed*."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


@dataclass(slots=True, eq=False)
class OpenTransaction:
    """A transaction of the source, in the model and in the system."""

    expected: Transaction
    writer: Writer


class World:
    """A source, a ledger, and targets."""

    def __init__(self, make_subject: Callable[[SimulatedClock, ExitStack], SimulatedFake | EmptiedPostgres]) -> None:
        self._stack = ExitStack()
        self.clock = SimulatedClock()
        self.subject = make_subject(self.clock, self._stack)
        self.source = Source()
        self.places: dict[str, Place] = {}
        self.open: list[OpenTransaction] = []
        self.drained: str | None = None
        self.largest_window = 0
        self.sound = True
        """Whether all that was checked so far held."""

    def close(self) -> None:
        for transaction in list(self.open):
            self.roll_back(transaction)
        self._stack.close()

    # --- the source --------------------------------------------------------------------------------------------------

    def begin(self) -> OpenTransaction:
        transaction = OpenTransaction(self.source.begin(), self.subject.begin())
        self.open.append(transaction)
        return transaction

    def commit(self, transaction: OpenTransaction) -> None:
        self.open.remove(transaction)
        transaction.writer.commit()
        self.source.commit(transaction.expected)

    def roll_back(self, transaction: OpenTransaction) -> None:
        self.open.remove(transaction)
        transaction.writer.rollback()
        self.source.rollback(transaction.expected)

    def write(self, transaction: OpenTransaction, row: Row, *, gone: bool = False, nature: Nature = "sound") -> None:
        """Change *row*, or delete it; nothing comes of it if it is not there to delete, or another has it locked."""
        there = self.source.there(row, transaction.expected)
        if self.source.locked(row, against=transaction.expected) or (gone and not there):
            return
        operation: Operation = "delete" if gone else "update" if there else "insert"
        self._append(transaction, row, operation, nature, there=not gone)

    def repair(self, transaction: OpenTransaction, row: Row, target: str) -> None:
        """Address what *row* holds now to *target*, as an initial load or a repair does."""
        there = self.source.there(row, transaction.expected)
        if there and not self.source.locked(row, against=transaction.expected):
            self._append(transaction, row, "snapshot", "sound", there=True, target=target)

    def replay(self, transaction: OpenTransaction, original: Change, target: str) -> None:
        """Address a committed change to *target* once more, under its original's key."""
        row = original.row
        there = self.source.there(row, transaction.expected)
        if not self.source.locked(row, against=transaction.expected):
            self._append(
                transaction,
                row,
                original.operation,
                original.nature,
                there=there,
                target=target,
                replays=original.change_id,
            )

    def _append(
        self,
        transaction: OpenTransaction,
        row: Row,
        operation: Operation,
        nature: Nature,
        *,
        there: bool,
        target: str | None = None,
        replays: int | None = None,
    ) -> None:
        stream, key = row
        payload: dict[str, Any] = {"id": key}
        if nature != "unrenderable":
            payload["name"] = nature
        change_id = transaction.writer.append(
            stream, key, operation=operation, payload=json.dumps(payload).encode(), target=target, replays=replays
        )
        change = Change(
            change_id=change_id, row=row, operation=operation, nature=nature, target=target, replays=replays
        )
        self.source.note(transaction.expected, change, there=there)

    def redrive(self, name: str, change_id: int) -> None:
        """Close a dead letter and address to its target what it was about: the event again, or the row as it is now."""
        change = self.source.committed[change_id]
        if any(change.row in other.expected.rows for other in self.open):
            return
        self.subject.close_dead_letter(name, change_id)
        self.places[name].book.closed.add(change_id)
        transaction = self.begin()
        if change.row[0] == "visits":
            self.replay(transaction, replace(change, change_id=change.original_id), name)
        else:
            self.repair(transaction, change.row, name)
        self.commit(transaction)

    # --- targets -----------------------------------------------------------------------------------------------------

    def register(self, name: str, *, start: Start, honours_keys: bool, setup: Setup) -> None:
        self.subject.ledger.register({name: start})
        everyones = [one.change_id for one in self.source.committed.values() if one.target is None]
        book = Book(name, before_start=frozenset(everyones if start == "now" else ()))
        self.places[name] = Place(Api(name, honours_keys=honours_keys), book, setup)

    def configure(self, name: str, field: str, value: Any) -> None:
        """Change one thing of how a target is configured."""
        place = self.places[name]
        before = getattr(place.setup, field)
        if field in place.mappings and (before and before.mapping) != (value and value.mapping):
            place.mappings[field] += 1
        place.setup = replace(place.setup, **{field: value})

    def finish(self) -> None:
        """Let every writer be done and every target settle."""
        for transaction in list(self.open):
            self.commit(transaction)
        for name in self.places:
            self.settle_down(name)

    def drain(self, name: str, course: Course) -> DrainReport | None:
        """Drain once; None if the drain crashed."""
        place = self.places[name]
        setup = place.setup
        report: DrainReport | None = None
        self.sound = False
        self.drained = name
        self.largest_window = max(self.largest_window, setup.window_records)
        with self.subject.open(name) as inner, _jitter(course.seed), simulation(self.clock, seed=course.seed) as turns:
            run = Run(self, place, course, turns)
            try:
                report = drain(
                    policy=DrainPolicy(
                        target=name,
                        max_in_flight=setup.lanes,
                        retry=RetryPolicy(initial_backoff=0.5, max_backoff=4.0, max_elapsed=10.0),
                        failure_threshold=setup.failure_threshold,
                        error_timeout=5.0,
                        dead_letter_guard=setup.dead_letter_guard,
                        rules=setup.rules,
                    ),
                    routes=_compiled(setup.people, setup.visits),
                    ledger=WatchedLedger(inner, run),
                    connect=lambda: _Client(run),
                    clock=self.clock,
                    limits=DrainLimits(
                        window_records=setup.window_records,
                        window_bytes=setup.window_bytes,
                        max_seconds=course.max_seconds,
                        linger_seconds=course.linger_seconds,
                    ),
                    stop=run.stop,
                )
            except Crashed:
                assert run.crashed
                self.sound = True
                return None
            self._check_end(run, report, inner.state())
        self.sound = True
        return report

    def rival(self) -> None:
        """Try to drain the target that is being drained."""
        name = self.drained
        assert name is not None
        with self.subject.ledger.open_target(name, run_id="rival") as ledger:
            assert ledger is None, f"two drains of {name} at once"

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check_fate(self, place: Place, change_id: int, fate: Fate) -> None:
        """A fate has its reason in what the target said, or in the configuration that the drain went by."""
        change = self.source.committed.get(change_id)
        assert change is not None, f"{change_id} was never committed"
        assert change.is_for(place.api.name), f"{change_id} is none of {place.api.name}'s"
        spec = place.setup.route(change.row[0])
        match fate:
            case "accepted":
                assert change_id in place.acknowledged, f"{change} is accepted, but the target never said so"
            case "dead":
                unrenderable = change.nature == "unrenderable" and change.operation != "delete"
                assert change_id in place.refused or unrenderable, f"{change} is dead, but the target never refused it"
            case "filtered":
                assert spec is None or not spec.wants(change), f"{change} is filtered, but {spec} wants it"
            case "superseded":
                assert spec is not None, f"{change} is superseded where there is no route"
                assert spec.mode == "state", f"{change} is superseded on {spec}"
                if not spec.wants(change):
                    place.excused.add(change_id)

    def check_block(
        self, place: Place, change_id: int, behind: int, others: Sequence[DeadRecord], *, closed_before: Set[int]
    ) -> None:
        """What is dead without having been sent has a dead change of its row before it."""
        change = self.source.committed[change_id]
        spec = place.setup.route(change.row[0])
        assert spec is not None
        assert spec.on_dead == "block", f"{change} is blocked on {spec}"
        # One that was closed while the drain was at work may still have been open when it was looked for.
        dead = place.book.ids_with("dead") - closed_before | {
            record.change.change_id for record in others if record.blocked_by is None
        }
        assert behind in dead, f"{change} is blocked by {behind}, which is not dead"
        assert behind < change_id
        assert self.source.committed[behind].row == change.row

    def _check_end(self, run: Run, report: DrainReport, state: TargetState) -> None:
        place, seen = run.place, run.seen
        lost = set(run.decided) - set(place.book.fates)
        assert not lost, f"the fate of {lost} was known and not written down"
        pauses = seen["credentials"] + seen["configuration"] + seen["gone"]
        many_dead = sum(report.refusals.values()) >= 20
        match report.end:
            case "caught_up":
                pending = place.book.pending(self.source)
                assert not pending, f"caught up with {pending} pending"
                assert not place.book.claimed, f"caught up with {place.book.claimed} claimed"
                assert not pauses, f"caught up, but the target said {seen}"
            case "deferred":
                assert seen["fault"], f"deferred without a fault: {report.reason}"
                assert state.retry_at is not None
            case "paused":
                assert pauses or many_dead, f"paused without a reason: {report.reason}"
                assert state.status in ("paused", "disabled")
            case "stopped":
                assert run.stop.is_set() or run.course.max_seconds is not None

    def check(self) -> None:
        """Hold everything that is written against the model."""
        self.sound = False
        dead_letters: dict[str, list[int]] = defaultdict(list)
        for letter in self.subject.dead_letters():
            dead_letters[letter.target].append(letter.change_id)
        owed = {
            state.target: state
            for state in self.subject.ledger.owed(
                {name: list(place.setup.streams) for name, place in self.places.items()}
            )
        }
        still_open: set[int] = set()
        for name, place in self.places.items():
            book = place.book
            fates, pending = Counter(book.fates.values()), book.pending(self.source)
            conservation = self.subject.ledger.conservation(name)
            assert conservation.holds, conservation
            assert (
                conservation.captured,
                conservation.accepted,
                conservation.superseded,
                conservation.filtered,
                conservation.dead,
                conservation.claimed,
                conservation.pending,
            ) == (
                len(book.owed(self.source)),
                fates["accepted"],
                fates["superseded"],
                fates["filtered"],
                fates["dead"],
                len(book.claimed),
                len(pending),
            ), f"{conservation} of {book}"
            assert sorted(dead_letters[name]) == sorted(book.ids_with("dead"))
            self._check_sets(name, place)
            self._check_target(place)
            still_open |= book.open_dead()
            book.check_superseded(self.source, place.excused)
            wanted = any(self.source.committed[one].row[0] in place.setup.streams for one in pending)
            assert owed[name].has_work or not (wanted or book.claimed), f"{name} has work, and nobody will be told"
            assert not owed[name].held
        assert set(self.subject.blocks()) == still_open
        self.sound = True

    def _check_sets(self, name: str, place: Place) -> None:
        settled = {one for first, last in self.subject.settled_ranges(name) for one in range(first, last + 1)}
        mine = set(place.book.owed(self.source))
        lost = settled & mine - set(place.book.fates)
        assert not lost, f"{name}: {lost} are settled, and nobody knows how"
        undecided = {one.change_id for transaction in self.source.open for one in transaction.changes}
        assert not settled & undecided, (
            f"{name}: the gap closed over {settled & undecided}, which are not committed yet"
        )
        assert set(place.book.fates) <= settled
        claimed = self.subject.claimed_ids(name)
        assert claimed == place.book.claimed, f"{name}: {claimed} are claimed, {place.book.claimed} should be"

    def _check_target(self, place: Place) -> None:
        """What a target has taken for good it has, or something newer."""
        api, book = place.api, place.book
        replayed = {
            one.row for one in self.source.committed.values() if one.replays is not None and one.is_for(api.name)
        }
        for change_id in book.ids_with("accepted") - place.believed:
            change = self.source.committed[change_id]
            assert change.original_id in api.applied[change.row], f"{api.name} never had {change}"
            if change.row not in replayed:
                newest = api.newest[change.row]
                assert newest >= change_id, f"{api.name} has {newest} of {change.row}, older than {change_id}"

    def settle_down(self, name: str) -> None:
        """Let all be well, drain until there is nothing to do, and ask for everything."""
        place = self.places[name]
        place.setup = replace(place.setup, rules=JudgingRules(), dead_letter_guard=1.0)
        for _ in range(4):
            report = self.drain(name, Course())
            assert report is not None
            if report.end == "caught_up":
                break
        else:
            raise AssertionError(f"{name} does not catch up: {report}")
        self.check()
        book = place.book
        assert not book.pending(self.source)
        assert not book.claimed
