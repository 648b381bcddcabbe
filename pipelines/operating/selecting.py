"""From what a person asks to a redrive or discard: which routes' dead letters, and how each is sent again."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from pipelines.delivery.config import TargetConfig
from pipelines.operating.dead_letters import Group, Redrive


class UnknownTime(ValueError):
    """A text is no ISO 8601 date or time."""


def parse_time(text: str, *, field: str) -> datetime | None:
    """Return *text* as a time, UTC unless it says otherwise; None if it is empty. Raises UnknownTime."""
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UnknownTime(
            f"{field}: '{text}' is no time; write it as 2026-01-31 or 2026-01-31T13:45:00+01:00"
        ) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def redrives(groups: Sequence[Group], configs: Mapping[str, TargetConfig]) -> tuple[list[Redrive], list[str]]:
    """Return how the letters of *groups* are sent again, route by route, and a sentence for each that cannot be."""
    found: list[Redrive] = []
    problems: list[str] = []
    for target, stream in dict.fromkeys((group.target, group.stream) for group in groups):
        config = configs.get(target)
        route = config.routes.get(stream) if config is not None else None
        if config is None:
            problems.append(f"{target}: there is no such target any more; discard its dead letters")
        elif route is None:
            problems.append(f"{target}: it has no route for {stream} any more; add one, or discard the dead letters")
        else:
            found.append(Redrive(target=target, stream=stream, mode=route.mode, whole_keys=route.on_dead == "block"))
    return found, problems


def describe(group: Group, *, now: datetime) -> str:
    """Return one line about *group*: how many, of what, why, since when, and some keys."""
    keys = ", ".join(group.example_keys) + (", …" if group.count > len(group.example_keys) else "")
    return (
        f"{group.target}/{group.stream}  {group.count} x {group.reason}  "
        f"oldest {age(now - group.oldest)} ago, keys {keys}"
    )


def age(elapsed: timedelta) -> str:
    """Return *elapsed* as a person says it, in its largest unit."""
    seconds = max(0, int(elapsed.total_seconds()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
