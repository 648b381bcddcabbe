"""A target API that misbehaves by chance, and the same way whenever it is asked the same: what a drain must survive.

    with FaultyApi(seed=7, chance={"drop_after": 0.2, "status_500": 0.1}) as api:
        ...                     # drain
        api.misbehave({})       # it is well again
        ...                     # drain what is left
        assert not api.history.findings({"ada": 7}).broken

What it does is drawn from the seed, from what a request says, and from how often its idempotency key came before: not
from the clock, and not from which thread came first. It takes every request as new, as a careless target would; but
what it has taken under an idempotency key it does not refuse under the same key.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from email.utils import formatdate
from hashlib import blake2b
from random import Random
from time import time
from types import MappingProxyType
from typing import Any

from pipelines_tests.fakes.history import History, Read, versions_in
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request

TOKEN_PATH = "/token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Request):
    """A request, and what its answer hangs on."""

    attempt: int
    """How often its idempotency key came before."""
    is_batch: bool
    """It carries a list of records, be it of one."""
    ids: tuple[str, ...]
    """Its records' keys."""
    bad: frozenset[int]
    """Positions of records that the target never takes."""
    taken: frozenset[int]
    """Positions that it took under this idempotency key before."""
    patience: float
    """The client's time-out in seconds, which what is late or slow overruns."""
    well: Reply
    """What the target answers when it is well."""

    def listing(self, statuses: Mapping[int, int], *, status: int = 200) -> Reply:
        """Return an answer that speaks of the records at some positions, and takes those with a 2xx."""
        results = [{"id": self.ids[position], "status": of} for position, of in statuses.items()]
        taken = [position for position, of in statuses.items() if 200 <= of < 300]
        return Reply.json({"results": results}, status=status, applies=bool(taken), applies_to=taken)


Fault = Callable[[Asked, Random], Reply]


def accept_all(request: Request) -> Reply:
    """Answer 200, for each record of a body too: `{"results": [{"id": …, "status": 200}, …]}`."""
    records = request.records if request.body else []
    return Reply.json({"results": [{"id": record.get("id"), "status": 200} for record in records]})


# Faults --------------------------------------------------------------------------------------------------------------


def _status(*statuses: int, acts: bool = False) -> Fault:
    """Answer with one of *statuses*; if it *acts*, the request may take effect all the same."""

    def fault(asked: Asked, dice: Random) -> Reply:
        status = dice.choice(statuses)
        applies = acts and _takes(asked.well) and dice.random() < 0.5
        return Reply(status=status, applies=applies, applies_to=asked.well.applies_to)

    return fault


def _retry_after(values: Callable[[], Collection[str]]) -> Fault:
    def fault(asked: Asked, dice: Random) -> Reply:
        return Reply(status=dice.choice([429, 503]), headers={"Retry-After": dice.choice(sorted(values()))})

    return fault


def _well_but(**changes: Any) -> Fault:
    """Answer as a well target does, but for *changes*; a function among them gets the request."""

    def fault(asked: Asked, dice: Random) -> Reply:
        return replace(asked.well, **{name: to(asked) if callable(to) else to for name, to in changes.items()})

    return fault


def _takes(reply: Reply) -> bool:
    return reply.applies if reply.applies is not None else 200 <= reply.status < 300


def _never(asked: Asked, dice: Random) -> Reply:
    return replace(asked.well, hold=threading.Event(), applies=_takes(asked.well) and dice.random() < 0.5)


def _body(asked: Asked) -> bytes:
    return asked.well.body if isinstance(asked.well.body, bytes) and asked.well.body else b"{}"


def _long_body(_: Asked) -> Iterator[bytes]:
    return iter([b'{"results": ["' + b"x" * 100_000] + [b"x" * 100_000] * 50)


def _close_idle(asked: Asked, dice: Random) -> Reply:
    return replace(asked.well, idle=dice.choice([0.0, 0.01]))


def _redirect(asked: Asked, dice: Random) -> Reply:
    return Reply(status=dice.choice([301, 302, 303, 307, 308]), headers={"Location": "http://elsewhere.invalid/rows"})


def _unauthorized(asked: Asked, dice: Random) -> Reply:
    return Reply(status=401, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})


def _partial_items(asked: Asked, dice: Random) -> Reply:
    """Take some records of a batch, say of others "not now", and of others nothing."""
    if not asked.is_batch:
        return Reply(status=503)
    if not _takes(asked.well):
        return asked.well
    fates: dict[int, int] = {}
    for position in range(len(asked.ids)):
        fate = dice.choice([200, 200, 429, 503, None])
        if position in asked.bad:
            fates[position] = 422
        elif position in asked.taken:
            fates[position] = 200
        elif fate is not None:
            fates[position] = fate
    return asked.listing(fates, status=dice.choice([200, 207]))


def _partial_truncated(asked: Asked, dice: Random) -> Reply:
    """Take some records of a batch, and break off before it is said which."""
    reply = _partial_items(asked, dice)
    assert isinstance(reply.body, bytes)
    return replace(reply, cut=len(reply.body) // 2) if asked.is_batch and reply.body else reply


def _reject_named(asked: Asked, dice: Random) -> Reply:
    """Take a batch but for its bad records."""
    if not asked.bad:
        return asked.well
    if not asked.is_batch:
        return Reply(status=422)
    return asked.listing({at: 422 if at in asked.bad else 200 for at in range(len(asked.ids))})


def _reject_unnamed(asked: Asked, dice: Random) -> Reply:
    """Take nothing of a request with a bad record, and do not say which it is."""
    return Reply(status=dice.choice([400, 422])) if asked.bad else asked.well


def _too_large(asked: Asked, dice: Random) -> Reply:
    return Reply(status=413) if len(asked.ids) > 1 and not asked.taken else asked.well


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        # It says so, and has done nothing.
        "status_408": _status(408),
        "status_425": _status(425),
        "status_503": _status(503),
        "status_429_seconds": _retry_after(lambda: ["0", "1"]),
        "status_429_date": _retry_after(lambda: [formatdate(time() + 1, usegmt=True)]),
        "status_429_absurd": _retry_after(
            lambda: ["9" * 5000, "1e9", "soon", "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 99 Foo 99999 99:99:99 GMT", ""]
        ),
        "status_429_negative": _retry_after(lambda: ["-1", "-99999999999", "Thu, 01 Jan 1970 00:00:00 GMT"]),
        # It says so, and may have taken the request before it failed.
        "status_500": _status(500, acts=True),
        "status_502": _status(502, acts=True),
        "status_504": _status(504, acts=True),
        # It says nothing.
        "drop_before": _well_but(drop="before"),
        "drop_after": _well_but(drop="after"),
        "reset_before": _well_but(drop="before", by="reset"),
        "reset_after": _well_but(drop="after", by="reset"),
        "half_close": _well_but(drop="after", by="half_close"),
        "never": _never,
        # It says all, too late.
        "late": _well_but(delay=lambda asked: asked.patience * 1.5),
        "applied_late": _well_but(delay=lambda asked: asked.patience * 1.5, applies_late=True),
        "slow_headers": _well_but(head_pace=lambda asked: asked.patience / 40),
        "slow_interim": _well_but(interim=lambda asked: (12, asked.patience / 4)),
        "slow_body": _well_but(body=lambda asked: _body(asked) + b" " * 40, pace=lambda asked: asked.patience / 20),
        # It takes the request, and says so in a way that cannot be read.
        "truncated": _well_but(body=_body, cut=lambda asked: len(_body(asked)) // 2),
        "huge_body": _well_but(body=_long_body),
        "no_body": _well_but(body=b""),
        "broken_json": _well_but(body=b'{"results": [{"id": "'),
        "not_json": _well_but(body=b"<html><h1>It works!</h1></html>", headers={"Content-Type": "text/html"}),
        # It takes the request and hangs up, which the next request finds out.
        "close_idle": _close_idle,
        # It refuses everybody.
        "status_401": _status(401),
        "status_403": _status(403),
        "status_404": _status(404),
        "status_405": _status(405),
        "redirect": _redirect,
        "unauthorized_until_renewed": _unauthorized,
        # It judges the records of a batch.
        "partial_items": _partial_items,
        "partial_truncated": _partial_truncated,
        "reject_unnamed": _reject_unnamed,
        "reject_named": _reject_named,
        "too_large": _too_large,
    }
)
"""Every fault by its name. `status_404` on a deletion by path says that it is done."""

PAUSING = frozenset({"status_401", "status_403", "status_404", "status_405", "redirect", "unauthorized_until_renewed"})
"""After these nothing more is sent in the run, and the target pauses."""
SLOW = frozenset({"never", "late", "applied_late", "slow_headers", "slow_interim", "slow_body"})
"""Each of these takes the client's whole patience."""
ABOUT_RECORDS = frozenset({"reject_unnamed", "reject_named"})
"""Not met by chance, but by every request with a bad record."""
NEEDS_RESULTS = frozenset({"partial_items", "partial_truncated", "reject_named"})
"""These are for batches of routes with `results`, found by `id` and `status` in `$.results`: else nobody reads them."""
_STEADY = frozenset({"too_large"})  # the same at each attempt: a proxy measures, it does not throw dice


# The target ----------------------------------------------------------------------------------------------------------


class FaultyApi(HttpApi):
    """A target that meets each request with at most one of `FAULTS`, as its *chance* has it.

    *answer* is what it says when it is well; *patience* is the client's time-out. Records with *bad_keys* are always
    refused, faults or not; the chances last given for `reject_named` and `reject_unnamed` say how often each way
    (default: unnamed). `POST /token` gives out a new token. Without *keep*, what arrives is judged by `history` and
    forgotten.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        chance: Mapping[str, float] = MappingProxyType({}),
        answer: Callable[[Request], Reply] = accept_all,
        bad_keys: Collection[str] = (),
        patience: float = 1.0,
        read: Read = versions_in,
        port: int = 0,
        keep: bool = True,
    ) -> None:
        self.history = History(read)
        """What it saw and took."""
        self.faults: Counter[str] = Counter()
        """How often each fault was met."""
        self.fault_of: dict[int, str] = {}
        """By a request's number; only if it keeps requests."""
        self.renewals = 0
        """How many tokens were given out."""
        self._seed, self._well, self._bad_keys, self._patience = seed, answer, frozenset(bad_keys), patience
        self._read = read
        self._attempts: Counter[str] = Counter()
        self._ways = {"reject_named": 0.0, "reject_unnamed": 0.0}
        self._revoked: set[str] = set()  # credentials that are no longer good
        self.revocations = 0
        """How often credentials were revoked."""
        self._errors: list[Exception] = []
        self._notes = threading.Lock()
        self.misbehave(chance)
        super().__init__(self._decide, port=port, keep=keep)

    def misbehave(self, chance: Mapping[str, float]) -> None:
        """Meet faults with these probabilities from now on; none, and it is well again, old tokens and all."""
        unknown = sorted(chance.keys() - FAULTS.keys())
        if unknown:
            raise ValueError(f"there is no fault '{unknown[0]}'; there are {', '.join(FAULTS)}")
        if sum(chance[name] for name in chance.keys() - ABOUT_RECORDS - _STEADY) > 1 + 1e-9:
            raise ValueError(f"a request meets one fault at most, so the chances {dict(chance)} must not exceed 1")
        with self._notes:
            self._chance = {name: chance[name] for name in FAULTS if name in chance}  # in one order: it is drawn from
            self._ways |= {name: chance[name] for name in ABOUT_RECORDS & chance.keys()}
            if "unauthorized_until_renewed" not in chance:
                self._revoked.clear()

    def __exit__(self, *error: object) -> None:
        """Stop; raises what went wrong inside, which its clients have seen as a broken connection."""
        super().__exit__(*error)
        if self._errors and error[0] is None:
            raise self._errors[0]

    def _decide(self, request: Request) -> Reply:
        with self._noticing():
            if request.path == TOKEN_PATH:
                return self._renew()
            self.history.arrive(request)
            asked = self._ask(request)
            fault = self._fault_for(asked)
            if fault is None:
                return asked.well
            with self._notes:
                self.faults[fault] += 1
                if self._keep:
                    self.fault_of[request.number] = fault
            return FAULTS[fault](asked, self._dice(asked, "how", asked.attempt))

    def _apply(self, request: Request, reply: Reply) -> None:
        with self._noticing():
            super()._apply(request, reply)
            self.history.apply(request, reply.applies_to)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._errors.append(error)
            raise

    def _ask(self, request: Request) -> Asked:
        with self._notes:
            attempt = self._attempts[request.key or ""]
            self._attempts[request.key or ""] += 1
            named, unnamed = self._ways["reject_named"], self._ways["reject_unnamed"]
        document = request.json if request.body else None
        ids = tuple(version.key for version in self._read(request))
        asked = Asked(
            **{field.name: getattr(request, field.name) for field in fields(Request)},
            attempt=attempt,
            is_batch=isinstance(document, list) or (document is not None and request.records != [document]),
            ids=ids,
            bad=frozenset(position for position, key in enumerate(ids) if key in self._bad_keys),
            taken=self.history.taken(request.key),
            patience=self._patience,
            well=self._well(request),
        )
        if not asked.bad:
            return asked
        is_named = asked.taken or self._dice(asked, "way").random() * (named + unnamed) < named
        way = "reject_named" if is_named else "reject_unnamed"
        with self._notes:
            self.faults[way] += 1
        return replace(asked, well=FAULTS[way](asked, self._dice(asked, "how")))

    def _fault_for(self, asked: Asked) -> str | None:
        with self._notes:
            chance = {name: often for name, often in self._chance.items() if name not in ABOUT_RECORDS}
            credentials = asked.headers.get("authorization", "")
            if credentials in self._revoked:
                return "unauthorized_until_renewed"
        steady = {name: often for name, often in chance.items() if name in _STEADY}
        fault = _draw(steady, self._dice(asked, "steady")) or _draw(
            {name: often for name, often in chance.items() if name not in _STEADY},
            self._dice(asked, "fault", asked.attempt),
        )
        if fault == "unauthorized_until_renewed":
            with self._notes:
                self._revoked.add(credentials)
                self.revocations += 1
        return fault

    def _dice(self, asked: Asked, purpose: str, *more: int) -> Random:
        # Not from the idempotency key: it is another in each database, and a run could not be had again.
        said = blake2b(b"\0".join([asked.method.encode(), asked.path.encode(), asked.body]), digest_size=8)
        return Random(f"{self._seed} {said.hexdigest()} {purpose} {more}")

    def _renew(self) -> Reply:
        with self._notes:
            self.renewals += 1
            token = f"token-{self.renewals}"
        document = {"access_token": token, "token_type": "Bearer", "expires_in": 3600}
        return Reply.json(document, applies=False)


def _draw(chance: Mapping[str, float], dice: Random) -> str | None:
    point = dice.random()
    for name, often in chance.items():
        point -= often
        if point < 0:
            return name
    return None
