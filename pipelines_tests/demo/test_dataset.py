"""The data set as the demo relies on it."""

import itertools

from demo import dataset


def key(flight: dataset.Row) -> tuple[str | None, ...]:
    return tuple(flight[name] for name in dataset.TABLES["flights"])


def test_the_keys_are_unique() -> None:
    """The first of the year's flights stand for all of them."""
    flights = list(itertools.islice(dataset.read("flights"), 25_000))
    assert len({key(flight) for flight in flights}) == 25_000


def test_a_key_can_stand_in_a_path_as_it_is() -> None:
    """Datasette tilde-encodes the keys in its paths and Kinto refuses most characters; letters and digits suit both."""
    for table in ("airlines", "airports", "planes"):
        (column,) = dataset.TABLES[table]
        assert all(str(row[column]).isalnum() for row in dataset.read(table))
    assert all(
        str(part).isalnum() for flight in itertools.islice(dataset.read("flights"), 25_000) for part in key(flight)
    )


def test_a_missing_value_is_none() -> None:
    assert next(dataset.read("planes"))["speed"] is None


def test_the_flights_to_come_begin_with_the_day_after_the_last_one_loaded() -> None:
    assert next(dataset.flights_to_come())["day"] == str(dataset.LAST_DAY_LOADED + 1)
