"""When does which target misbehave, and when is what killed? Pure: the length of the soak in, a plan out."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Attack = Literal[
    "kill a drain", "cut a drain's connection", "kill a run", "kill the daemon", "stop a drain", "kill all"
]

BAD_KEYS = ("c-bad-1", "c-bad-2", "c-bad-3")
"""Records that the target `picky` never takes."""

_ATTACKS: Sequence[Attack] = (
    "kill a drain",
    "cut a drain's connection",
    "kill a run",
    "kill the daemon",
    "stop a drain",
    "kill a drain",
    "cut a drain's connection",
    "kill all",
)
_BETWEEN_ATTACKS = 25.0
_LEAST_ATTACKS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Misbehaviour:
    """How one target behaves from *at* on, in seconds from the beginning."""

    at: float
    target: str
    what: str
    """For people; empty: it is well."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """Of each fault, by request."""
    listens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """Something is to be killed at *at*."""

    at: float
    attack: Attack


_FLAKY = {
    "status_500": 0.02,
    "status_502": 0.02,
    "status_503": 0.02,
    "status_408": 0.01,
    "status_429_seconds": 0.005,
    "drop_before": 0.02,
    "drop_after": 0.02,
    "reset_before": 0.01,
    "reset_after": 0.01,
    "half_close": 0.01,
    "late": 0.002,
    "slow_body": 0.005,
    "truncated": 0.01,
    "broken_json": 0.01,
    "no_body": 0.01,
    "not_json": 0.01,
    "close_idle": 0.02,
    "partial_items": 0.05,
    "too_large": 0.01,
}
_DROPPING = {"drop_before": 0.3, "drop_after": 0.3}
_BUSY = {"status_429_seconds": 0.06, "status_429_date": 0.03, "status_429_negative": 0.01}

_DOWN_FROM = 0.15


class OutageTooLong(Exception):
    """The outage asked for does not end before the soak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """A target's bad time; from and to are parts of the whole."""

    begin: float
    end: float
    target: str
    what: str
    chance: Mapping[str, float] = field(default_factory=dict)
    listens: bool = True


_PHASES = (
    _Phase(begin=0.00, end=1.00, target="flaky", what="is flaky", chance=_FLAKY),
    _Phase(begin=0.10, end=0.80, target="busy", what="asks to slow down", chance=_BUSY),
    _Phase(begin=0.25, end=0.45, target="stuck", what="hangs", chance={"never": 1.0}),
    _Phase(begin=0.40, end=0.55, target="locked", what="answers 401", chance={"status_401": 1.0}),
    _Phase(begin=0.70, end=0.76, target="locked", what="redirects", chance={"redirect": 1.0}),
    _Phase(begin=0.80, end=0.86, target="stuck", what="drops connections", chance=_DROPPING),
)


def misbehaviours(seconds: float, *, outage: float | None = None) -> Sequence[Misbehaviour]:
    """Return all changes of behaviour, in order; after *seconds* every target is well.

    The target `away` is down for *outage* seconds, by default a fifth of the whole. Raises OutageTooLong.
    """
    down = _DOWN_FROM + (0.2 if outage is None else outage / seconds)
    if down > 1:
        raise OutageTooLong(
            f"An outage of {outage:g} s does not fit into {seconds:g} s; give at least 1.2 times as much."
        )
    away = _Phase(begin=_DOWN_FROM, end=down, target="away", what="is down", listens=False)
    changes = []
    for phase in (*_PHASES, away):
        begins = Misbehaviour(
            at=phase.begin * seconds,
            target=phase.target,
            what=phase.what,
            chance=phase.chance,
            listens=phase.listens,
        )
        changes += [begins, Misbehaviour(at=phase.end * seconds, target=phase.target, what="")]
    return sorted(changes, key=lambda change: change.at)


def blows(seconds: float) -> Sequence[Blow]:
    """Return when to kill what, in order: one blow every 25 seconds, and never fewer than six."""
    count = max(_LEAST_ATTACKS, int(0.85 * seconds / _BETWEEN_ATTACKS))
    attacks = itertools.islice(itertools.cycle(_ATTACKS), count)
    return [Blow(at=seconds * (0.12 + 0.83 * number / count), attack=attack) for number, attack in enumerate(attacks)]
