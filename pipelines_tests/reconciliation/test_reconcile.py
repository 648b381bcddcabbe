"""Listed, compared and repaired against a real Postgres: what is found, what is no drift, what breaking off costs."""

import hashlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from pipelines.delivery.routing import Transform
from pipelines.reconciliation import reconcile
from pipelines.reconciliation.guard import Guard, guard
from pipelines.reconciliation.listing import ListingFailed
from pipelines.reconciliation.workspace import CannotReconcile
from pipelines_tests.fakes.target import answer
from pipelines_tests.reconciliation.world import OFFSET, World, drift, failing
from resources.postgres_workspace import PostgresWorkspaces


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def world(database: str, connection: psycopg.Connection) -> World:
    return World.made(database, connection)


ALL: dict[str, Any] = {"repair": "all", "delete_extra": True, "max_repair_fraction": 1.0}


# What is found -------------------------------------------------------------------------------------------------------


def test_a_target_that_holds_what_the_source_holds_agrees(world: World) -> None:
    world.fill(10)

    found = world.reconcile()

    assert (drift(found), found.matched, found.source, found.listed) == ((0, 0, 0), 10, 10, 10)
    assert (found.pages, found.requests) == (4, 4)
    assert (found.guard.believed, found.resumed) == (True, False)


def test_what_is_missing_stale_and_extra_is_counted_named_and_repaired(world: World) -> None:
    world.fill(10)
    del world.api.records["p03"]
    world.api.records["p05"]["name"] = "other"
    world.api.records["x1"] = {"id": "x1", "name": "nobody"}

    found = world.reconcile(**ALL)

    assert drift(found) == (1, 1, 1)
    assert {kind: [one.match for one in some] for kind, some in found.summary.samples.items()} == {
        "missing": ["p03"],
        "stale": ["p05"],
        "extra": ["x1"],
    }
    assert found.summary.fields == [("name", 1)]
    assert (found.appended.snapshots, found.appended.deletes) == (2, 1)
    assert world.addressed() == [
        ("snapshot", "p03", {"id": "p03", "name": "n"}),
        ("snapshot", "p05", {"id": "p05", "name": "n"}),
        ("delete", "x1", {"id": "x1"}),
    ]

    world.deliver()

    assert drift(world.reconcile()) == (0, 0, 0)


def test_nothing_is_repaired_that_is_not_asked_for(world: World) -> None:
    world.fill(10)
    del world.api.records["p03"]
    world.api.records["x1"] = {"id": "x1", "name": "nobody"}

    assert drift(world.reconcile()) == (1, 0, 1)
    assert world.addressed() == []


def test_what_the_transform_filters_is_not_owed_and_what_cannot_be_rendered_is_told(world: World) -> None:
    """A row that the transform filters now may be at the target or not: nobody said what is to become of it."""

    def transform(change: dict[str, Any]) -> Any:
        if change["key"] in ("p01", "p02"):
            return None
        if change["key"] == "p03":
            raise ValueError("no")
        return change["row"]

    world.route = {"transform": "m:f"}
    world.transforms = {"m:f": Transform(name="m:f", function=transform)}
    world.fill(5)
    del world.api.records["p02"], world.api.records["p03"]

    found = world.reconcile(**ALL)

    assert (drift(found), found.filtered, found.matched) == ((0, 0, 0), 2, 2)
    assert found.count("unrenderable") == 1
    assert world.addressed() == []


def test_records_without_a_key_of_ours_are_the_targets_own(world: World) -> None:
    world.fill(3)
    world.api.records["zz"] = {"name": "made by hand"}

    found = world.reconcile(**ALL)

    assert (drift(found), found.unkeyed, found.listed) == ((0, 0, 0), 1, 3)


def test_an_extra_record_whose_key_the_table_could_not_have_is_left(
    database: str, connection: psycopg.Connection
) -> None:
    """'007' is not the key of row 7, though Postgres would read it as that."""
    world = World.made(database, connection, columns="id integer primary key, name text")
    world.execute("insert into people values (1, 'a'), (7, 'b')")
    world.deliver()
    for key in ("12a", "007", "99"):
        world.api.records[key] = {"id": key, "name": "b"}

    found = world.reconcile(**ALL)

    assert drift(found) == (0, 0, 3)
    assert (found.appended.deletes, found.appended.impossible) == (1, 2)
    assert world.addressed() == [("delete", "99", {"id": 99})]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("Ada@x.org", "ada@x.org"), ("Jose\u0301", "Jos\u00e9"), (" p", "p"), ("\uff21", "a")]
)
@pytest.mark.parametrize("moving", [False, True])
def test_a_record_whose_key_is_a_missing_one_written_another_way_is_named_so_and_never_deleted(
    world: World, ours: str, theirs: str, moving: bool
) -> None:
    """The target writes keys its own way: what looks extra is the only record of the row that looks missing."""
    world.fill(30)
    world.execute("insert into people values (%s, 'n'), ('B', 'n')", ours)
    world.deliver()
    world.api.records[theirs] = world.api.records.pop(ours) | {"id": theirs}
    world.api.records["b"] = {"id": "b", "name": "another's: the target tells them apart"}
    if moving:
        world.execute("update people set name = 'm' where id = %s", ours)

    found = world.reconcile(**ALL)

    assert drift(found) == (0 if moving else 1, 0, 2)
    reasons = {one.match: one.reason for one in found.summary.samples["extra"]}
    assert reasons == {"b": None, theirs: f"{ours} of the source, written another way: not to be deleted"}
    assert (found.appended.deletes, found.appended.impossible) == (1, 1)
    assert [key for operation, key, _ in world.addressed() if operation == "delete"] == ["b"]


def test_a_record_whose_key_is_longer_than_any_of_the_sources_is_the_targets_own(world: World) -> None:
    world.fill(3)
    key = "".join(hashlib.sha256(bytes([number])).hexdigest() for number in range(100))
    world.api.records[key] = {"id": key, "name": "theirs"}

    found = world.reconcile(**ALL)

    assert (drift(found), found.unkeyed) == ((0, 0, 0), 1)


def test_a_key_of_several_columns_is_matched_whatever_the_types(database: str, connection: psycopg.Connection) -> None:
    world = World.made(database, connection, columns="a integer, b text, name text, primary key (a, b)", key=["a", "b"])
    world.execute("insert into people values (1, 'x', 'n'), (1, 'y', 'n'), (2, 'x', 'n'), (3, 'x', 'n')")
    world.deliver()
    world.api.records['[1, "x"]']["a"] = "1"  # as text
    del world.api.records['[2, "x"]']
    world.api.records['[3, "x"]']["name"] = "o"
    world.api.records["e"] = {"a": 9, "b": 'q"', "name": "n"}
    world.settings = {"max_repair_fraction": 1.0}
    world.route = {"read": {"fields": {"a": "number"}}}

    found = world.reconcile(**ALL)

    assert (drift(found), found.matched) == ((1, 1, 1), 2)
    assert [key for _, key, _ in world.addressed()] == ['[2, "x"]', '[3, "x"]', '[9, "q\\""]']

    again = world.reconcile(**ALL)
    assert (drift(again), again.count("in_flight")) == ((0, 0, 0), 3)

    world.execute(
        "insert into distributary.dead_letter (target, change_id, stream, key, operation, reason)"
        " select 'api', change_id, stream, key, operation, 'no' from distributary.change_log where target = 'api'"
    )
    world.execute("update distributary.target_state set settled = '{[0,1000)}' where target = 'api'")
    dead = world.reconcile(**ALL)
    assert (drift(dead), dead.count("dead")) == ((0, 0, 0), 3)


# What is on its way --------------------------------------------------------------------------------------------------


def test_what_is_pending_claimed_or_comes_while_the_list_is_read_is_no_drift(world: World) -> None:
    world.fill(12)
    world.execute("update people set name = 'pending' where id = 'p00'")
    world.execute("delete from people where id = 'p01'")
    world.execute("insert into people values ('p50', 'new')")

    def meddle(number: int, path: str) -> None:
        if number == 2:
            world.execute("update people set name = 'late' where id = 'p02'")
            world.execute("insert into people values ('p0a', 'late')")
            world.execute("delete from people where id = 'p03'")
            world.deliver()
        if number == 3:
            world.execute("update people set name = 'later' where id = 'p11'")

    world.api.before = meddle

    found = world.reconcile(**ALL)

    assert drift(found) == (0, 0, 0)
    assert found.count("in_flight") > 0
    assert found.appended.snapshots + found.appended.deletes == 0


def test_a_change_that_commits_late_behind_what_is_settled_is_no_drift(database: str, world: World) -> None:
    """Its id is older than what was settled; only a set can tell."""
    world.fill(3)
    with psycopg.connect(database) as late:
        late.execute("update people set name = 'late' where id = 'p01'")
        world.execute("update people set name = 'x' where id = 'p02'")
        world.deliver()

        def commit(number: int, path: str) -> None:
            late.commit()

        world.api.before = commit
        found = world.reconcile(**ALL)

    assert (drift(found), found.count("in_flight")) == ((0, 0, 0), 1)


def test_a_row_that_differs_and_goes_before_the_extra_ones_are_looked_for_is_noted_once(world: World) -> None:
    world.fill(5)
    world.api.records["p01"]["name"] = "wrong"
    world.api.records["x1"] = {"id": "x1", "name": "nobody"}

    def meddle(line: str) -> None:
        if "compared" in line:
            world.execute("delete from people where id = 'p01'")

    found = world.reconcile(say=meddle)

    assert (drift(found), found.count("in_flight")) == ((0, 0, 1), 1)


def test_what_is_settled_and_wrong_all_the_same_is_drift_though_others_move(world: World) -> None:
    world.fill(5)
    world.api.records["p04"]["name"] = "wrong"
    world.execute("update people set name = 'moving' where id = 'p01'")

    found = world.reconcile()

    assert (drift(found), found.count("in_flight")) == ((0, 1, 0), 1)


def test_a_list_that_lags_is_given_its_time(world: World) -> None:
    world.fill(3)
    world.route = {"read": {"lag_seconds": 20}}

    world.reconcile()

    assert sum(world.clock.naps) >= 20


# Lists that are not whole --------------------------------------------------------------------------------------------


def test_a_record_that_slips_past_a_counted_list_is_looked_for_again(world: World) -> None:
    """A record of an earlier page goes while the list is read; the next page begins one too far on."""
    world.route = {"read": {"page": OFFSET}}
    world.fill(10)

    def meddle(number: int, path: str) -> None:
        if number == 1:
            world.execute("delete from people where id = 'p00'")
            world.deliver()

    world.api.before = meddle

    found = world.reconcile(**ALL)

    assert (drift(found), found.matched, found.appended.snapshots) == ((0, 0, 0), 9, 0)
    assert world.api.paths.count("/people?limit=3&skip=0") == 2


def test_a_record_that_slips_past_because_of_what_others_do_at_the_target_is_looked_for_again(world: World) -> None:
    """Of their records there is nothing in the log."""
    world.route = {"read": {"page": OFFSET}}
    world.fill(10)
    world.api.records["a"] = {"id": "a", "name": "theirs"}
    del world.api.records["p08"]

    def meddle(number: int, path: str) -> None:
        if number == 1:
            del world.api.records["a"]

    world.api.before = meddle

    found = world.reconcile(repair="missing")

    assert (drift(found), found.matched, found.appended.snapshots) == ((1, 0, 1), 9, 1)
    assert [key for _, key, _ in world.addressed()] == ["p08"]
    assert world.api.paths.count("/people?limit=3&skip=0") == 2


def test_what_is_missing_from_a_counted_list_is_found_though_others_come_and_go(world: World) -> None:
    world.route = {"read": {"page": OFFSET}}
    world.fill(10)
    del world.api.records["p08"]

    def meddle(number: int, path: str) -> None:
        world.execute("update people set name = %s where id = 'p02'", str(number))
        world.deliver()

    world.api.before = meddle

    found = world.reconcile(**ALL)

    assert (drift(found), found.appended.snapshots) == ((1, 0, 0), 1)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_list_of_many_pages_that_is_read_again_is_not_taken_for_a_circle(world: World, interrupted: bool) -> None:
    world.route = {"read": {"page": OFFSET}}
    world.fill(45)
    del world.api.records["p08"]
    asked: list[str] = []

    def meddle(number: int, path: str) -> Any:
        world.execute("update people set name = %s where id = 'p02'", str(number))
        world.deliver()
        asked.append(path)
        return failing() if interrupted and asked.count("/people?limit=3&skip=3") > 1 and not recovered else None

    world.api.before = meddle
    recovered = not interrupted
    if interrupted:
        with pytest.raises(ListingFailed, match="unwell"):
            world.reconcile()
    recovered = True

    assert drift(world.reconcile()) == (1, 0, 0)


@pytest.mark.parametrize("items", ["[]", '[{"name": "made by hand"}]'])
def test_pages_without_a_key_of_ours_that_lead_in_circles_end_the_listing(world: World, items: str) -> None:
    world.fill(3)
    world.api.records["p99"] = {"id": "p99", "name": "n"}  # there is a second page
    around = {"b": "c", "c": "d", "d": "b"}

    def lead(number: int, path: str) -> Any:
        assert number < 50
        at = path.rpartition("after=")[2]
        return answer(200, f'{{"items": {items}, "next": "{around.get(at, "b")}"}}'.encode()) if number else None

    world.api.before = lead

    with pytest.raises(ListingFailed, match="in circles"):
        world.reconcile()


def test_a_short_page_in_the_middle_is_not_the_end(world: World) -> None:
    world.route = {"read": {"page": OFFSET}}
    world.fill(10)
    cut: list[str] = []

    def shorten(number: int, path: str) -> Any:
        if number == 1:
            cut.append(path)
            return answer(200, b'{"items": [{"id": "p03", "name": "n"}], "total": 10}')
        return None

    world.api.before = shorten

    found = world.reconcile(**ALL)

    assert cut
    assert (drift(found), found.listed) == ((0, 0, 0), 10)


def test_a_list_that_is_shorter_than_its_total_is_no_list(world: World) -> None:
    world.route = {"read": {"total": "$.total"}}
    world.fill(10)
    world.api.total = 11

    with pytest.raises(ListingFailed, match="says that it has 11 records, and listed 10"):
        world.reconcile(**ALL)
    assert world.addressed() == []

    world.api.total = None
    before = len(world.api.paths)
    assert drift(world.reconcile()) == (0, 0, 0)
    assert world.api.paths[before] == "/people?limit=3"


def test_an_empty_list_is_not_believed_unless_its_total_says_so_too(world: World) -> None:
    world.fill(10)
    world.api.records.clear()

    found = world.reconcile(**ALL)
    assert (drift(found), found.unlisted, found.appended.snapshots) == ((0, 0, 0), 10, 0)

    world.route = {"read": {"total": "$.total"}}
    found = world.reconcile(**ALL)
    assert (drift(found), found.unlisted, found.appended.snapshots) == ((10, 0, 0), 0, 10)


def test_a_list_that_ends_early_is_neither_believed_nor_repaired_until_a_person_says_so(world: World) -> None:
    """After six of ten records there is no next page, and no total tells."""
    world.fill(10)
    world.api.before = lambda number, path: (
        answer(200, b'{"items": [{"id": "p05", "name": "n"}]}') if "after=p05" in path else None
    )

    found = world.reconcile(**ALL)

    assert (drift(found), found.unlisted, found.matched) == ((0, 0, 0), 4, 6)
    assert "lacks 4 of 10 records" in str(found.guard.refused)
    assert world.addressed() == []

    world.api.before = lambda number, path: None
    for number in range(6, 10):
        del world.api.records[f"p0{number}"]
    assert drift(world.reconcile(**ALL)) == (0, 0, 0)
    assert drift(world.reconcile(trust_listing=True, **ALL)) == (4, 0, 0)
    world.deliver()
    assert drift(world.reconcile()) == (0, 0, 0)


def test_a_list_that_lacks_what_the_target_has_is_cut_short_by_however_little(world: World) -> None:
    world.route = {"read": {"one": "/people/${id}"}}
    world.fill(40)
    for key in ("p05", "p39"):
        del world.api.records[key]
    world.api.hidden = {"p39"}

    found = world.reconcile(trust_listing=True, **ALL)

    assert (drift(found), found.unlisted, found.asked, found.there) == ((0, 0, 0), 2, 2, 1)
    assert world.addressed() == []

    world.api.hidden.clear()
    assert drift(world.reconcile(**ALL)) == (2, 0, 0)
    world.deliver()
    assert drift(world.reconcile()) == (0, 0, 0)


def test_a_list_is_believed_however_short_if_what_it_lacks_is_not_there(world: World) -> None:
    world.route = {"read": {"one": "/people/${_key}"}}
    world.fill(100)
    for number in range(90):
        del world.api.records[f"p{number:02}"]

    found = world.reconcile(**ALL)

    assert (drift(found), found.asked, found.there, found.appended.snapshots) == ((90, 0, 0), 50, 0, 90)


def test_that_nothing_is_found_counts_only_if_something_is(world: World) -> None:
    """A path that leads nowhere finds nothing either; and of an empty list nothing can be tried."""
    world.route = {"read": {"one": "/persons/${id}"}}
    world.fill(10)
    world.api.before = lambda number, path: failing(404) if "/persons/" in path else None
    assert drift(world.reconcile()) == (0, 0, 0)

    del world.api.records["p01"]
    with pytest.raises(ListingFailed, match=r"mend read\.one"):
        world.reconcile(**ALL)

    world.api.records.clear()
    world.settings = {"resume_within_seconds": 0}
    found = world.reconcile(**ALL)
    assert (drift(found), found.unlisted) == ((0, 0, 0), 10)
    assert world.addressed() == []


def test_what_came_while_it_was_asked_for_is_on_its_way(world: World) -> None:
    world.route = {"read": {"one": "/people/${id}"}}
    world.fill(10)
    del world.api.records["p01"]

    def deliver(number: int, path: str) -> None:
        if path == "/people/p01":
            world.execute("update people set name = 'm' where id = 'p01'")
            world.deliver()

    world.api.before = deliver

    found = world.reconcile(**ALL)

    assert (drift(found), found.count("in_flight")) == ((0, 0, 0), 1)
    assert (found.asked, found.there, found.guard.believed) == (1, 0, True)


def test_a_long_list_of_others_is_not_taken_for_a_whole_one(world: World) -> None:
    world.fill(10)
    world.api.records = {f"x{number}": {"id": f"x{number}", "name": "theirs"} for number in range(20)}

    found = world.reconcile(**ALL)

    assert (drift(found), found.unlisted, found.appended.deletes) == ((0, 0, 20), 10, 0)


def test_what_is_filtered_or_on_its_way_makes_a_list_neither_shorter_nor_longer(world: World) -> None:
    world.route = {"transform": "m:f"}
    few = Transform(name="m:f", function=lambda change: change["row"] if change["key"] < "p03" else None)
    world.transforms = {"m:f": few}
    world.fill(20)
    for number in range(3, 20):
        del world.api.records[f"p{number:02}"]
    world.execute("insert into people select 'a' || n, 'n' from generate_series(10, 29) n")
    del world.api.records["p01"]

    found = world.reconcile(**ALL)

    assert (drift(found), found.count("in_flight"), found.appended.snapshots) == ((1, 0, 0), 20, 1)

    del world.api.records["p00"]
    world.execute("delete from distributary.change_log where target = 'api'")
    found = world.reconcile(**ALL)
    assert (drift(found), found.unlisted, found.owed, found.appended.snapshots) == ((0, 0, 0), 2, 3, 0)


def test_a_total_is_no_confirmation_for_as_many_as_are_on_their_way(world: World) -> None:
    world.route = {"read": {"total": "$.total"}}
    world.fill(10)
    world.execute("insert into people select 'q' || n, 'n' from generate_series(10, 29) n")
    world.api.before = lambda number, path: answer(200, b'{"items": [], "total": 10}')

    found = world.reconcile(**ALL)

    assert (drift(found), found.unlisted, found.appended.snapshots) == ((0, 0, 0), 10, 0)


def test_records_of_the_targets_own_are_counted_once_however_often_it_is_listed(world: World) -> None:
    world.route = {"read": {"page": OFFSET, "total": "$.total"}}
    world.fill(10)
    del world.api.records["p08"]
    for number in range(5):
        world.api.records[f"zz{number}"] = {"name": "made by hand"}

    def meddle(number: int, path: str) -> None:
        world.execute("update people set name = %s where id = 'p02'", str(number))
        world.deliver()

    world.api.before = meddle

    found = world.reconcile()

    assert world.api.paths.count("/people?limit=3&skip=0") == 3
    assert (found.unkeyed, drift(found)) == (5, (1, 0, 0))


# Breaking off --------------------------------------------------------------------------------------------------------


def test_an_interrupted_listing_goes_on_at_its_last_page(world: World) -> None:
    world.fill(10)
    world.api.before = lambda number, path: failing() if number >= 2 else None

    with pytest.raises(ListingFailed, match="unwell"):
        world.reconcile()

    world.api.before = lambda number, path: None
    world.execute("update people set name = 'meanwhile' where id = 'p00'")  # of a page that is read already
    world.deliver()
    before = len(world.api.paths)
    found = world.reconcile(**ALL)

    assert world.api.paths[before:] == ["/people?limit=3&after=p05", "/people?limit=3&after=p08"]
    assert (drift(found), found.count("in_flight")) == ((0, 0, 0), 1)
    assert (found.resumed, found.pages, found.listed, found.matched) == (True, 4, 10, 9)


@pytest.mark.parametrize("why", ["old", "begun long ago", "read another way", "emptied by a crash"])
def test_a_listing_that_is_of_no_use_any_more_begins_anew(world: World, why: str) -> None:
    world.fill(10)
    world.api.before = lambda number, path: failing() if number >= 2 else None
    with pytest.raises(ListingFailed):
        world.reconcile()
    world.api.before = lambda number, path: None
    if why == "old":
        world.settings = {"resume_within_seconds": 60}
        world.execute("update distributary.listing set updated_at = updated_at - interval '61 s'")
    elif why == "begun long ago":
        world.execute("update distributary.listing set started_at = started_at - interval '1 day'")
    elif why == "read another way":
        world.route = {"read": {"path": "/people?all=1"}}
    else:
        world.execute("truncate distributary.listed")

    before = len(world.api.paths)
    found = world.reconcile(**ALL)

    assert "after" not in world.api.paths[before]
    assert (drift(found), found.resumed, found.listed) == ((0, 0, 0), False, 10)


def test_a_position_that_the_target_has_forgotten_is_begun_anew(world: World) -> None:
    world.fill(10)
    world.api.before = lambda number, path: failing() if number >= 2 else None
    with pytest.raises(ListingFailed):
        world.reconcile()
    forgotten = "/people?limit=3&after=p05"
    tried: list[str] = []

    def forget(number: int, path: str) -> Any:
        if path == forgotten and path not in tried:
            tried.append(path)
            return failing(410)
        return None

    world.api.before = forget

    found = world.reconcile(**ALL)

    assert tried == [forgotten]
    assert (drift(found), found.listed, found.resumed) == ((0, 0, 0), 10, False)


def test_a_refusal_in_a_new_listing_is_no_reason_to_begin_anew(world: World) -> None:
    world.fill(10)
    world.api.before = lambda number, path: failing(404) if number == 1 else None

    with pytest.raises(ListingFailed, match="mend read"):
        world.reconcile()
    assert len(world.api.paths) == 2


def test_an_interrupted_comparison_reads_no_page_again(world: World) -> None:
    world.fill(10)
    del world.api.records["p04"]

    def stop(line: str) -> None:
        if "compared" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.reconcile(say=stop)
    before = len(world.api.paths)

    found = world.reconcile()

    assert (drift(found), len(world.api.paths), found.resumed) == ((1, 0, 0), before, True)


def test_an_interrupted_repair_goes_on_without_gap_and_sends_nothing_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "_REPAIRS_AT_ONCE", 2)
    world.fill(10)
    for number in range(7):
        del world.api.records[f"p0{number}"]
    settings = ALL | {"trust_listing": True}

    def stop(line: str) -> None:
        if "4 records" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.reconcile(say=stop, **settings)
    assert len(world.addressed()) == 4

    found = world.reconcile(**settings)

    assert (drift(found), found.count("in_flight"), found.appended.snapshots) == ((3, 0, 0), 4, 3)
    assert sorted(key for _, key, _ in world.addressed()) == [f"p0{number}" for number in range(7)]

    world.deliver()
    assert drift(world.reconcile()) == (0, 0, 0)


# Repair --------------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_the_row_as_it_is_when_it_is_appended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They changed, went and came when all was compared and nothing yet appended."""
    world.fill(10)
    for key in ("p01", "p02"):
        del world.api.records[key]
    for key in ("x1", "x2"):
        world.api.records[key] = {"id": key, "name": "theirs"}

    def decide_late(*given: Any, **counts: Any) -> Guard:
        world.execute("update people set name = 'newer' where id = 'p01'")
        world.execute("delete from people where id = 'p02'")
        world.execute("insert into people values ('x1', 'ours now')")
        return guard(*given, **counts)

    monkeypatch.setattr(reconcile, "guard", decide_late)
    found = world.reconcile(**ALL)

    assert drift(found) == (2, 0, 2)
    assert world.addressed() == [("snapshot", "p01", {"id": "p01", "name": "newer"}), ("delete", "x2", {"id": "x2"})]
    monkeypatch.undo()
    world.deliver()
    assert drift(world.reconcile()) == (0, 0, 0)
    assert world.api.records["x1"]["name"] == "ours now"


def test_a_row_that_somebody_is_changing_is_left_to_them(database: str, world: World) -> None:
    world.fill(10)
    del world.api.records["p01"], world.api.records["p02"]
    with psycopg.connect(database) as other:
        other.execute("update people set name = 'newer' where id = 'p01'")

        found = world.reconcile(**ALL)

        assert (found.appended.snapshots, found.appended.busy) == (1, 1)
        assert [key for _, key, _ in world.addressed()] == ["p02"]
        other.commit()
    world.deliver()

    assert drift(world.reconcile()) == (0, 0, 0)
    assert world.api.records["p01"]["name"] == "newer"


def test_a_record_is_not_deleted_whose_row_somebody_is_inserting(database: str, world: World) -> None:
    world.fill(3)
    world.api.records["x1"] = {"id": "x1", "name": "theirs"}
    with psycopg.connect(database) as other:
        other.execute("insert into people values ('x1', 'theirs')")

        found = world.reconcile(**ALL)

        assert (found.appended.deletes, found.appended.busy) == (0, 1)
        other.commit()
    world.deliver()

    assert world.addressed() == []
    assert drift(world.reconcile(**ALL)) == (0, 0, 0)


# Routes that do not promise all --------------------------------------------------------------------------------------


def test_a_route_that_only_inserts_is_asked_only_what_it_promises(world: World) -> None:
    world.route = {"insert": {"path": "/people"}}
    world.fill(5)
    world.api.records["p01"]["name"] = "their own"
    del world.api.records["p02"]

    found = world.reconcile(repair="all", max_repair_fraction=1.0)

    assert (drift(found), found.matched) == ((1, 0, 0), 4)
    assert [key for _, key, _ in world.addressed()] == ["p02"]


def test_a_route_that_only_updates_neither_misses_nor_owns_records(world: World) -> None:
    world.route = {"update": {"path": "/people/${id}"}}
    world.fill(5)
    world.api.records["p01"]["name"] = "other"
    del world.api.records["p02"]

    found = world.reconcile(repair="all", max_repair_fraction=1.0)

    assert drift(found) == (0, 1, 0)
    assert world.addressed() == []
    assert "stale" in found.guard.cannot


# One at a time -------------------------------------------------------------------------------------------------------


def test_another_run_of_the_same_stream_is_turned_away(database: str, world: World) -> None:
    world.fill(3)
    with (
        PostgresWorkspaces(database, world.source).open("api", "people", run_id="first"),
        pytest.raises(CannotReconcile, match="another run is reconciling it"),
    ):
        world.reconcile()

    assert drift(world.reconcile()) == (0, 0, 0)


def test_nothing_is_left_of_a_listing_that_is_over(world: World) -> None:
    world.fill(3)
    world.reconcile()

    assert world.execute("select count(*) from distributary.listing") == [(0,)]
    assert world.execute("select relname from pg_class where relname ~ '^(listed|found)_[0-9]+$'") == []


def test_what_a_run_left_that_never_came_back_is_removed_by_another(world: World) -> None:
    world.fill(3)
    world.api.before = lambda number, path: failing()
    with pytest.raises(ListingFailed):
        world.reconcile()
    world.execute("update distributary.listing set stream = 'gone', updated_at = now() - interval '3 days'")
    world.api.before = lambda number, path: None

    world.reconcile()

    assert world.execute("select count(*) from distributary.listing") == [(0,)]
    assert (
        world.execute("select relname from pg_class where relname ~ '^(listed|found)_[0-9]+$' and relkind = 'r'") == []
    )
