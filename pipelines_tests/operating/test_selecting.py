"""From what a person asks to what is redriven, and how it is told."""

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.operating.dead_letters import Group, Redrive
from pipelines.operating.selecting import UnknownTime, age, describe, parse_time, redrives
from pipelines_tests.fakes.catalog import target_config

NOW = datetime(2026, 2, 1, 12, tzinfo=UTC)


def group(target: str = "crm", stream: str = "people", *, count: int = 2) -> Group:
    oldest = NOW - timedelta(hours=30)
    return Group(
        target=target,
        stream=stream,
        reason="answered 422",
        count=count,
        oldest=oldest,
        newest=NOW,
        example_keys=["a", "b"],
    )


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T13:45", datetime(2026, 1, 31, 13, 45, tzinfo=UTC)),
        ("2026-01-31T13:45:00+01:00", datetime(2026, 1, 31, 12, 45, tzinfo=UTC)),
        ("", None),
    ],
)
def test_a_time_is_utc_unless_it_says_otherwise(text: str, time: datetime | None) -> None:
    assert parse_time(text, field="since") == time


def test_what_is_no_time_is_named_with_its_field_and_the_fix() -> None:
    with pytest.raises(
        UnknownTime, match=r"ops\.redrive\.config\.since: 'yesterday' is no time; write it as 2026-01-31"
    ):
        parse_time("yesterday", field="ops.redrive.config.since")


def test_each_route_is_redriven_in_its_own_mode() -> None:
    """In a blocked route whole keys go, for their order."""
    upsert = {"path": "/x"}
    crm = target_config("crm", routes={"people": {"upsert": upsert}, "pets": {"mode": "event", "upsert": upsert}})
    email = target_config("email", routes={"people": {"on_dead": "block", "upsert": upsert}})
    groups = [group(), group(count=1), group(stream="pets"), group("email")]

    found, problems = redrives(groups, {"crm": crm, "email": email})

    assert found == [
        Redrive(target="crm", stream="people", mode="state", whole_keys=False),
        Redrive(target="crm", stream="pets", mode="event", whole_keys=False),
        Redrive(target="email", stream="people", mode="state", whole_keys=True),
    ]
    assert problems == []


def test_what_has_no_route_any_more_is_told_and_hinders_nothing() -> None:
    found, problems = redrives([group("gone"), group(stream="pets"), group()], {"crm": target_config("crm")})

    assert [(one.target, one.stream) for one in found] == [("crm", "people")]
    assert problems == [
        "gone: there is no such target any more; discard its dead letters",
        "crm: it has no route for pets any more; add one, or discard the dead letters",
    ]


def test_a_group_is_told_in_one_line() -> None:
    assert describe(group(count=9), now=NOW) == ("crm/people  9 x answered 422  oldest 1 d ago, keys a, b, …")


@pytest.mark.parametrize(
    ("elapsed", "said"),
    [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (86_400 * 9 + 5, "9 d")],
)
def test_an_age_is_said_in_its_largest_unit(elapsed: int, said: str) -> None:
    assert age(timedelta(seconds=elapsed)) == said
