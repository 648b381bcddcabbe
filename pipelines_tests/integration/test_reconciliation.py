"""Against Datasette and Kinto as they are: what happened to a target behind our back is found, named, and repaired."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import target_apis
from pipelines_tests.integration.reconciling import PLANES, ROOT, ROWS, World, apis_started, environment, fill, found_in

pytestmark = pytest.mark.integration

TARGETS = ("flight_board", "registry")
CHECKS = ("nothing_missing", "nothing_stale", "nothing_extra")


@pytest.fixture(scope="module")
def apis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[target_apis.TargetApis, Path]]:
    folder = tmp_path_factory.mktemp("apis")
    with apis_started(folder) as started:
        yield started, folder


@pytest.fixture
def world(
    apis: tuple[target_apis.TargetApis, Path], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    """Return a world in which everything is delivered."""
    started, folder = apis
    config = tmp_path / "config"
    target_apis.write_configuration(ROOT / "resources", config, started.base_urls)
    (config / "targets" / "event_hook.yaml").unlink()
    for name, value in environment(database, config, started).items():
        monkeypatch.setenv(name, value)
    world = World(database=database, folder=folder, config=config, apis=started)
    world.empty_targets()
    fill(database)
    world.deliver()
    return world


def test_targets_that_agree_are_found_to(world: World) -> None:
    for target, streams in {
        "flight_board": ["airlines", "airports", "flights", "planes"],
        "registry": ["airlines", "airports", "planes"],
    }.items():
        found = world.reconcile(target)
        assert sorted(found) == streams
        for stream, one in found.items():
            assert one.drift == (0, 0, 0), (target, stream, one)
            assert one.numbers["matched"] == one.numbers["source rows"] == ROWS[stream]
            assert one.checks == {"nothing_missing": True, "nothing_stale": True, "nothing_extra": True}


def test_what_was_deleted_altered_and_added_at_datasette_is_found_named_and_repaired(world: World) -> None:
    world.board("delete from planes where tailnum in (select tailnum from planes order by tailnum limit 3)")
    world.board("update planes set seats = seats + 1, model = 'x' where tailnum = (select max(tailnum) from planes)")
    world.board(
        "insert into planes (tailnum, type, manufacturer, model, engines, seats, engine) values "
        "('NOBODY', 't', 'm', 'm', 1, 1, 'e'), ('NOBODY2', 't', 'm', 'm', 1, 1, 'e')"
    )

    dry = world.reconcile("flight_board", "planes", repair="all", delete_extra=True, dry_run=True)["planes"]

    assert dry.drift == (3, 1, 2)
    assert dry.checks == {"nothing_missing": False, "nothing_stale": False, "nothing_extra": False}
    assert dry.numbers["repaired"] == 0
    fields = dry.metadata["fields that differ"].records
    assert [record.data for record in fields] == [
        {"field": "model", "records": 1},
        {"field": "seats", "records": 1},
    ]

    found = world.reconcile("flight_board", "planes", repair="all", delete_extra=True)["planes"]
    between = world.reconcile("flight_board", "planes", repair="all", delete_extra=True)["planes"]

    assert (found.drift, found.numbers["repaired"]) == ((3, 1, 2), 6)
    assert (between.drift, between.numbers["in flight"], between.numbers["repaired"]) == ((0, 0, 0), 6, 0)

    world.deliver()
    after = world.reconcile("flight_board", "planes")["planes"]

    assert after.drift == (0, 0, 0)
    assert all(after.checks.values())
    assert (after.numbers["matched"], after.numbers["in flight"]) == (400, 0)


def test_what_was_deleted_altered_and_added_at_kinto_is_found_named_and_repaired(world: World) -> None:
    with world.registry() as client:
        held = [one["id"] for one in client.get(PLANES, params={"_sort": "id", "_limit": 5}).json()["data"]]
        client.patch(f"{PLANES}/{held[2]}", json={"data": {"engines": {"count": 77, "type": "x"}}}).raise_for_status()
    world.delete_planes("registry", *held[:2])
    for name in ("ghost1", "ghost2", "ghost3"):
        world.add_plane("registry", name)

    found = world.reconcile("registry", "planes", repair="all", delete_extra=True)["planes"]

    assert (found.drift, found.numbers["repaired"]) == ((2, 1, 3), 6)
    assert [r.data["field"] for r in found.metadata["fields that differ"].records] == ["engines.count", "engines.type"]
    assert sorted(r.data["key"] for r in found.metadata["samples"].records if r.data["kind"] == "extra") == [
        "ghost1",
        "ghost2",
        "ghost3",
    ]

    world.deliver()
    after = world.reconcile("registry", "planes")["planes"]

    assert (after.drift, after.numbers["matched"]) == ((0, 0, 0), 400)


def test_a_composite_key_is_matched_and_its_extra_record_deleted(world: World) -> None:
    world.board("delete from flights where rowid in (select rowid from flights limit 4)")
    world.board("update flights set dest = 'XXX' where rowid = (select max(rowid) from flights)")
    world.board(
        "insert into flights (year, month, day, carrier, flight, origin, sched_dep_time, sched_arr_time, dest,"
        " distance, hour, minute, time_hour) values (1999, 1, 1, 'ZZ', 1, 'A', 1, 1, 'B', 1, 1, 1, 't')"
    )

    found = world.reconcile("flight_board", "flights", repair="all", delete_extra=True)["flights"]

    assert (found.drift, found.numbers["repaired"]) == ((4, 1, 1), 6)
    keys = world.source("select key from distributary.change_log where target is not null and operation = 'delete'")
    assert keys == [('[1999, 1, 1, "ZZ", 1, "A"]',)]

    world.deliver()

    assert world.reconcile("flight_board", "flights")["flights"].drift == (0, 0, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["missing", "stale", "extra"])
def test_each_check_fails_for_its_own_reason_alone_until_that_is_repaired(world: World, target: str, kind: str) -> None:
    keys = [key for (key,) in world.source("select tailnum from planes order by tailnum limit 3")]
    if kind == "missing":
        world.delete_planes(target, *keys)
    for key in keys:
        if kind == "stale":
            world.alter_plane(target, key)
        if kind == "extra":
            world.add_plane(target, f"GHOST{key}")

    found = world.reconcile(target, "planes", repair="all", delete_extra=True)["planes"]
    world.deliver()
    after = world.reconcile(target, "planes")["planes"]

    assert found.checks == {name: name != f"nothing_{kind}" for name in CHECKS}
    assert (found.numbers[kind], found.numbers["repaired"]) == (3, 3)
    assert after.checks == dict.fromkeys(CHECKS, True)
    assert (after.drift, after.numbers["matched"], after.numbers["target records"]) == ((0, 0, 0), 400, 400)


@pytest.mark.parametrize("target", TARGETS)
def test_an_emptied_target_is_not_taken_for_a_million_missing_records_until_a_person_says_so(
    world: World, target: str
) -> None:
    """Whether the target is empty or its list was, nobody can tell from here."""
    world.delete_planes(target)

    found = world.reconcile(target, "planes", repair="all", max_repair_fraction=1.0)["planes"]

    assert found.drift == (0, 0, 0)
    assert (found.numbers["not listed"], found.numbers["repaired"]) == (400, 0)
    assert found.checks == {name: name != "nothing_missing" for name in CHECKS}
    assert "trust_listing: true" in found.said["nothing_missing"]

    settings = {"repair": "missing", "max_repair_fraction": 1.0, "trust_listing": True}
    repaired = world.reconcile(target, "planes", **settings)["planes"]
    world.deliver()
    after = world.reconcile(target, "planes")["planes"]

    assert (repaired.drift, repaired.numbers["repaired"]) == ((400, 0, 0), 400)
    assert (after.drift, after.numbers["matched"]) == ((0, 0, 0), 400)
    assert all(after.checks.values())


@pytest.mark.parametrize("target", TARGETS)
def test_more_than_max_repair_fraction_is_not_repaired(world: World, target: str) -> None:
    rows = world.source("select tailnum from planes order by tailnum limit 21")
    world.delete_planes(target, *(key for (key,) in rows))

    found = world.reconcile(target, "planes", repair="missing")["planes"]
    world.deliver()

    assert (found.drift, found.numbers["repaired"]) == ((21, 0, 0), 0)
    assert "max_repair_fraction (0.05) allows (20)" in found.said["nothing_missing"]
    assert world.reconcile(target, "planes")["planes"].drift == (21, 0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_source_has_not_got_is_left_unless_it_is_said_to_be_deleted(world: World, target: str) -> None:
    world.add_plane(target, "GHOST")

    found = world.reconcile(target, "planes", repair="all", max_repair_fraction=1.0)["planes"]
    world.deliver()

    assert (found.drift, found.numbers["repaired"]) == ((0, 0, 1), 0)
    assert "delete_extra: true" in found.said["nothing_extra"]
    assert world.reconcile(target, "planes")["planes"].drift == (0, 0, 1)


ONE = {
    "flight_board": "/board/planes/${tailnum}.json",
    "registry": "/v1/buckets/fleet/collections/planes/records/${tailnum}",
}
WHOLE = {"flight_board": "/board/planes.json", "registry": "/v1/buckets/fleet/collections/planes/records"}
SOME = {"flight_board": "seats__lte=300", "registry": "max_seats=300"}
"""By which each lists some of its planes and leaves out others."""


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_list_lacks_is_asked_for_and_so_a_loss_is_told_from_a_list_that_leaves_out(
    world: World, target: str
) -> None:
    def read(**more: str) -> None:
        world.edit(target, lambda document: document["routes"]["planes"]["read"].update(one=ONE[target], **more))

    rows = world.source("select tailnum from planes where seats <= 300 order by tailnum limit 150")
    ((left_out,),) = world.source("select count(*) from planes where seats > 300")
    assert 0 < left_out < 80, "else the list would look cut short anyway"
    repair = {"repair": "missing", "max_repair_fraction": 1.0}

    read(path=f"{WHOLE[target]}?{SOME[target]}")
    cut = world.reconcile(target, "planes", **repair)["planes"]
    read(path=WHOLE[target])
    world.delete_planes(target, *(key for (key,) in rows))
    lost = world.reconcile(target, "planes", **repair)["planes"]
    world.deliver()

    assert (cut.drift, cut.numbers["not listed"], cut.numbers["repaired"]) == ((0, 0, 0), left_out, 0)
    assert cut.checks == {name: name != "nothing_missing" for name in CHECKS}
    assert "its list leaves out records" in cut.said["nothing_missing"]
    assert (lost.drift, lost.numbers["repaired"]) == ((150, 0, 0), 150)
    assert world.reconcile(target, "planes")["planes"].drift == (0, 0, 0)


def test_changes_on_their_way_are_no_drift(world: World) -> None:
    world.source("update planes set seats = seats + 1 where tailnum in (select tailnum from planes limit 7)")
    world.source("delete from planes where tailnum in (select tailnum from planes order by tailnum desc limit 5)")
    world.source(
        "insert into planes (tailnum, type, manufacturer, model, engines, seats, engine)"
        " values ('NEW', 't', 'm', 'm', 1, 1, 'e')"
    )

    for target in ("flight_board", "registry"):
        found = world.reconcile(target, "planes", repair="all", delete_extra=True)["planes"]
        assert (found.drift, found.numbers["in flight"], found.numbers["repaired"]) == ((0, 0, 0), 13, 0)
        assert all(found.checks.values())


def test_what_the_target_refused_is_named_dead_and_not_repaired(world: World) -> None:
    world.source("update planes set seats = -1 where tailnum = (select min(tailnum) from planes)")
    world.deliver()

    for target in ("flight_board", "registry"):
        found = world.reconcile(target, "planes", repair="all")["planes"]
        assert (found.drift, found.numbers["dead"], found.numbers["repaired"]) == ((0, 0, 0), 1, 0)


def test_values_are_shown_only_if_that_is_asked_for(world: World) -> None:
    world.board("update airlines set name = 'Secret Air' where carrier = 'UA'")

    quiet = world.reconcile("flight_board", "airlines")["airlines"]
    world.settings("flight_board", "airlines", show_values=True)
    loud = world.reconcile("flight_board", "airlines")["airlines"]

    assert "Secret Air" not in str(quiet)
    assert "Secret Air" not in str(quiet.metadata)
    assert [record.data for record in loud.metadata["values that differ"].records] == [
        {"key": "UA", "field": "name", "should be": "United Air Lines Inc.", "is": "Secret Air"}
    ]


def test_each_changes_place_is_counted_and_the_check_tells_when_one_is_lost(world: World) -> None:
    counted = found_in(world.run("registry"), "registry")[""]
    world.source("update distributary.target_state set accepted = accepted - 1 where target = 'registry'")
    lost = found_in(world.run("registry", raises=False), "registry")[""]

    assert counted.checks == {"conservation": True}
    assert counted.numbers["captured"] == 866
    assert lost.checks == {"conservation": False}
