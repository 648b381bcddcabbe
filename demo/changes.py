"""Change the source as an application would: the good, the late, and the one that targets must refuse.

Every function commits what it does and returns how many change records that must make, so that what was captured can
be checked against what was done.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import Connection
from psycopg.rows import dict_row

from demo import dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedPlane:
    """A change that the flight board and the registry must refuse."""

    tailnum: str
    before: dict[str, Any]
    """The plane as it was, and as those targets must still have it."""


def a_day_passes(connection: Connection) -> int:
    """Correct, cancel, add, rename and re-key, in a transaction each."""
    did = _Counter(connection)
    # Delays are corrected three times over: a target that wants states is owed the last of them, one that wants
    # events all three.
    for _ in range(3):
        did.run("update flights set dep_delay = coalesce(dep_delay, 0) + 1 where day = 1 and carrier = 'UA'")
    did.run("update flights set arr_delay = null, air_time = null where day = 2 and dest = 'ORD' and air_time > 0")
    did.run("delete from flights where dep_time is null and day < 15")
    with connection.transaction():
        coming = itertools.takewhile(lambda flight: flight["day"] == "24", dataset.flights_to_come())
        did.count += dataset.copy(connection, "flights", coming)
    did.run("update airlines set name = 'Endeavor Air' where carrier = '9E'")
    did.run("update airports set alt = alt + 1 where tzone = 'America/Anchorage'")
    did.run("delete from airports where faa in (select faa from airports where tzone = 'Pacific/Honolulu' limit 5)")
    # An aircraft gets another registration: of each record one delete and one insert.
    did.run("update planes set tailnum = tailnum || 'X' where manufacturer = 'PIPER'", records_per_row=2)
    # Here and gone within one transaction, and back again in the next.
    with connection.transaction():
        did.run("insert into airlines (carrier, name) values ('ZZ', 'Zephyr Zeppelins')")
        did.run("delete from airlines where carrier = 'ZZ'")
    did.run("insert into airlines (carrier, name) values ('ZZ', 'Zephyr Zeppelins Ltd. “Ünïcödé” & Söhne')")
    # Three that must leave no trace: an update that changes nothing, one of a column that stays at home, a rollback.
    did.run("update airports set alt = alt", records_per_row=0)
    did.run("update planes set internal_note = 'sold' where manufacturer = 'BOEING'", records_per_row=0)
    with connection.transaction(force_rollback=True):
        did.run("update flights set dep_delay = 999 where day = 5", records_per_row=0)
    return did.count


def open_late_transaction(connection: Connection) -> int:
    """Change a few rows and leave the transaction open: its change ids are drawn now, and committed later."""
    did = _Counter(connection)
    connection.execute("begin")
    did.run("update planes set speed = 100 where manufacturer = 'CESSNA'")
    did.run(
        "insert into flights select year, month, 31, dep_time, sched_dep_time, dep_delay, arr_time, sched_arr_time, "
        "arr_delay, carrier, flight, tailnum, origin, dest, air_time, distance, hour, minute, time_hour "
        "from flights where day = 4 and carrier = 'HA'"
    )
    return did.count


def one_bad_among_good(connection: Connection) -> tuple[int, RefusedPlane]:
    """Change two hundred planes well and one badly, in one transaction: it has fewer than no seats."""
    did = _Counter(connection)
    with connection.transaction():
        before = _first(connection, "select * from planes where manufacturer = 'BOEING' order by tailnum limit 1")
        did.run(
            "update planes set seats = seats + 1 where tailnum in "
            "(select tailnum from planes where manufacturer = 'AIRBUS' order by tailnum limit 200)"
        )
        did.run("update planes set seats = -1 where tailnum = %s", before["tailnum"])
    return did.count, RefusedPlane(tailnum=before["tailnum"], before=before)


def trickle(connection: Connection, *, per_second: float, rng: random.Random, sleep: Callable[[float], None]) -> None:
    """Go on changing rows at random, *per_second* of them, until something raises."""
    coming = dataset.flights_to_come()
    while True:
        _one_change(connection, rng, coming)
        sleep(rng.expovariate(per_second))


def _one_change(connection: Connection, rng: random.Random, coming: Iterator[dataset.Row]) -> None:
    kind = rng.random()
    if kind < 0.25:
        with suppress(psycopg.errors.UniqueViolation), connection.transaction():
            dataset.copy(connection, "flights", itertools.islice(coming, 1))
    elif kind < 0.30:
        connection.execute(_DELETE_A_FLIGHT)
    elif kind < 0.80:
        connection.execute(_DELAY_A_FLIGHT)
    elif kind < 0.95:
        connection.execute(_ADD_A_SEAT)
    else:
        connection.execute(_RAISE_AN_AIRPORT)


_DELETE_A_FLIGHT = """
delete from flights where (year, month, day, carrier, flight, origin) =
(select year, month, day, carrier, flight, origin from flights
 offset floor(random() * (select count(*) from flights)) limit 1)
"""
_DELAY_A_FLIGHT = """
update flights set dep_delay = coalesce(dep_delay, 0) + 1 where (year, month, day, carrier, flight, origin) =
(select year, month, day, carrier, flight, origin from flights
 offset floor(random() * (select count(*) from flights)) limit 1)
"""
_ADD_A_SEAT = """
update planes set seats = seats + 1 where tailnum =
(select tailnum from planes offset floor(random() * (select count(*) from planes)) limit 1)
"""
_RAISE_AN_AIRPORT = """
update airports set alt = alt + 1 where faa =
(select faa from airports offset floor(random() * (select count(*) from airports)) limit 1)
"""


class _Counter:
    """Runs statements and adds up the change records that they must make."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.count = 0

    def run(self, statement: LiteralString, *parameters: object, records_per_row: int = 1) -> None:
        rows = self._connection.execute(statement, parameters).rowcount
        if rows == 0:
            raise LookupError(f"the demo's data set has no row for: {statement}")
        self.count += rows * records_per_row


def _first(connection: Connection, query: LiteralString) -> dict[str, Any]:
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(query).fetchone()
    assert row is not None
    return row
