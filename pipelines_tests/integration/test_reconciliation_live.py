"""While applications write and a drain delivers, real targets are reconciled again and again: no false alarm, no miss.

`RECONCILIATION_ROUNDS=100` makes it as many; a few are run with all other tests.
"""

import itertools
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from demo import target_apis
from demo.processes import Programs
from pipelines_tests.integration.reconciling import ROOT, World, environment, fill

ROUNDS = int(os.environ.get("RECONCILIATION_ROUNDS", "4"))
STREAMS = {
    "flight_board": ("airlines", "airports", "flights", "planes"),
    "registry": ("airlines", "airports", "planes"),
}
ALL = {"repair": "all", "delete_extra": True, "max_repair_fraction": 1.0}

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200 + 60 * ROUNDS)]

_PLANE = "(tailnum, type, manufacturer, model, engines, seats, engine)"


class Writers:
    """Applications: inserts, updates, deletes, whole transactions of them, some undone, some open for a while."""

    def __init__(self, database: str, count: int = 3) -> None:
        self._database = database
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,), daemon=True) for number in range(count)]
        self.commits = 0
        self.problems: list[BaseException] = []

    def __enter__(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _write(self, number: int) -> None:
        dice = random.Random(number)
        try:
            with psycopg.connect(self._database) as connection:
                while not self._over.wait(dice.random() * 0.05):
                    for _ in range(dice.choice([1, 1, 1, 5, 20])):
                        self._change(connection, dice, number)
                    if dice.random() < 0.05:
                        self._over.wait(1.5)  # open for longer than a list takes
                    if dice.random() < 0.1:
                        connection.rollback()
                    else:
                        connection.commit()
                        self.commits += 1
        except BaseException as problem:
            self.problems.append(problem)

    def _change(self, connection: psycopg.Connection, dice: random.Random, number: int) -> None:
        key = f"W{number}{dice.randrange(300):03}"
        match dice.randrange(5):
            case 0:
                connection.execute(
                    f"insert into planes {_PLANE} values (%s, 't', 'm', 'm', 1, 1, 'e') on conflict do nothing", [key]
                )
            case 1:
                connection.execute("delete from planes where tailnum = %s", [key])
            case 2:
                connection.execute("update planes set seats = seats + 1 where tailnum = %s", [key])
            case 3:
                connection.execute(
                    "update airports set alt = alt + 1 where faa in"
                    " (select faa from airports where hashtext(faa) %% 3 = %s order by faa limit 1 offset %s)",
                    [number - 1, dice.randrange(30)],
                )
            case _:
                connection.execute(
                    "update flights set dep_delay = %s where flight %% 3 = %s and day = 1 and flight %% 10 = %s",
                    [dice.randrange(100), number, dice.randrange(10)],
                )


@contextmanager
def delivering(world: World, programs: Programs, folder: Path) -> Iterator[None]:
    """Have a drain for each target at work for as long as the context lasts."""
    run = folder / "delivery.yaml"
    run.write_text("ops: {plan_deliveries: {config: {linger_seconds: 3600, poll_seconds: 0.05}}}")
    command = ["-m", "dagster", "job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job", "-c", str(run)]
    home = folder / "home"
    home.mkdir()
    env = environment(world.database, world.config, world.apis) | {"DAGSTER_HOME": str(home)}
    drain = programs.start("delivery", command, env=env)
    try:
        yield
        assert drain.exit_code() is None, drain.last_words(30)
    finally:
        drain.stop()


def damage(world: World, number: int) -> dict[str, tuple[int, int, int]]:
    """Alter both targets behind our back, in records that no writer touches; return what is to be found of planes."""
    rows = world.source("select tailnum from planes where tailnum like 'N%%' order by tailnum")
    keys = [key for (key,) in rows[number * 5 % 300 :][:3]]
    for target, altered in (("flight_board", keys[1:]), ("registry", keys[1:2])):
        world.delete_planes(target, keys[0])
        for key in altered:
            world.alter_plane(target, key)
    world.add_plane("registry", f"ghost{number}")
    return {"flight_board": (1, 2, 0), "registry": (1, 1, 1)}


def test_live_writes_are_no_drift_and_drift_is_found_among_them(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Programs(tmp_path) as programs:
        apis = target_apis.start(tmp_path, programs)
        config = tmp_path / "config"
        target_apis.write_configuration(ROOT / "resources", config, apis.base_urls)
        (config / "targets" / "event_hook.yaml").unlink()
        for name, value in environment(database, config, apis).items():
            monkeypatch.setenv(name, value)
        world = World(database=database, folder=tmp_path, config=config, apis=apis)
        fill(database)
        world.deliver()
        alarms: list[str] = []
        in_flight = 0
        with delivering(world, programs, tmp_path), Writers(database) as writers:
            for number in range(ROUNDS):
                expected = damage(world, number) if number % 4 == 1 else dict.fromkeys(STREAMS, (0, 0, 0))
                for target, streams in STREAMS.items():
                    found = world.reconcile(target, **ALL)
                    assert sorted(found) == sorted(streams)
                    for stream, one in found.items():
                        in_flight += one.numbers["in flight"]
                        if one.drift != (expected[target] if stream == "planes" else (0, 0, 0)):
                            alarms.append(f"round {number}: {target}/{stream}: {one.drift}: {one.metadata['samples']}")
            assert not writers.problems
            assert writers.commits > ROUNDS
        assert alarms == []
        assert in_flight > 0, "the writers were too slow to be seen at all"
        world.deliver()
        for target in STREAMS:
            for stream, one in world.reconcile(target).items():
                assert (one.drift, one.numbers["in flight"]) == ((0, 0, 0), 0), (target, stream, one)
                assert one.numbers["matched"] == one.numbers["source rows"]


def test_damage_is_done_to_other_records_each_time() -> None:
    """Else a repair that is not delivered yet would hide the next."""
    starts = [number * 5 % 300 for number in itertools.islice(itertools.count(1, 4), 25)]

    assert all(abs(one - other) >= 3 for one, other in itertools.pairwise(starts))
