"""Change the source as an application would, and worse: hot keys, late commits, rollbacks, deletions.

`python -m soak.writers --seed 1 --per-second 40 [--late]` writes until it is asked to stop. Beside each change, and in
the same transaction, it counts the change in the table `written`: a count that owes nothing to the triggers.
"""

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from random import Random

import psycopg

from soak.schedule import BAD_KEYS

HOT, WARM = 30, 400
"""Customers that are written all the time, and customers in all."""

TABLES = """
create table customers (
    id       text    primary key,
    name     text    not null,
    revision integer not null,
    note     text
);
create table orders (
    id       text    primary key,
    customer text    not null,
    cents    integer not null,
    state    text    not null
);
-- How many changes of each key were committed.
create table written (
    key   text   primary key,
    times bigint not null
);
"""
STREAMS = ("customers", "orders")

_UPSERT = """
insert into customers (id, name, revision, note) values (%(key)s, %(name)s, 1, %(note)s)
on conflict (id) do update set revision = customers.revision + 1, name = excluded.name, note = excluded.note
"""
_ORDERS = """
insert into orders (id, customer, cents, state)
select %(prefix)s || i, %(customer)s, 100 + i, 'new' from generate_series(1, %(count)s) as i
returning id
"""
_COUNT = """
insert into written (key, times) select key, 1 from unnest(%s::text[]) as key
on conflict (key) do update set times = written.times + 1
"""


class Writer:
    """One application's session."""

    def __init__(self, connection: psycopg.Connection, dice: Random, *, name: str, stop: threading.Event) -> None:
        self._connection, self._dice, self._name, self._stop = connection, dice, name, stop
        self._orders: list[str] = []
        self._transactions = 0

    def transact(self) -> None:
        """Change some records in one transaction, and commit it, late, or roll it back."""
        self._transactions += 1
        fresh: list[str] = []
        # In one order, or writers would lock each other out.
        for key in sorted(set(self._keys())):
            self._connection.execute("savepoint here")
            self._change_customer(key)
            if self._dice.random() < 0.1:
                self._connection.execute("rollback to here")
        if self._dice.random() < 0.3:
            fresh = self._place_orders()
        if self._orders and self._dice.random() < 0.3:
            self._advance_order()
        if self._dice.random() < 0.2:
            self._stop.wait(self._dice.uniform(0.0, 0.3))
        if self._dice.random() < 0.15:
            self._connection.rollback()
        else:
            self._connection.commit()
            self._orders = (self._orders + fresh)[-200:]

    def stay_open(self, seconds: float) -> None:
        """Change records that nobody else writes, and commit after *seconds*."""
        for number in range(5):
            self._change_customer(f"c-late-{number}")
        self._stop.wait(seconds)
        if self._dice.random() < 0.2:
            self._connection.rollback()
        else:
            self._connection.commit()

    def _keys(self) -> Sequence[str]:
        if self._dice.random() < 0.02:
            return [self._dice.choice(BAD_KEYS)]
        return [
            f"c-{self._dice.randrange(HOT if self._dice.random() < 0.6 else WARM)}"
            for _ in range(self._dice.randint(1, 3))
        ]

    def _change_customer(self, key: str) -> None:
        if self._dice.random() < 0.06:
            self._count([key] * self._connection.execute("delete from customers where id = %s", [key]).rowcount)
            return
        note = "x" * self._dice.randrange(400) if self._dice.random() < 0.8 else None
        name = f"Customer {self._dice.random()}"
        self._connection.execute(_UPSERT, {"key": key, "name": name, "note": note})
        self._count([key])

    def _place_orders(self) -> list[str]:
        placed = {
            "prefix": f"o-{self._name}-{self._transactions}-",
            "customer": f"c-{self._dice.randrange(WARM)}",
            "count": self._dice.choice([1, 1, 2, 12]),
        }
        keys = [key for (key,) in self._connection.execute(_ORDERS, placed)]
        self._count(keys)
        return keys

    def _advance_order(self) -> None:
        key = self._dice.choice(self._orders)
        if self._dice.random() < 0.2:
            changed = self._connection.execute("delete from orders where id = %s", [key])
        else:
            changed = self._connection.execute("update orders set state = state || '+' where id = %s", [key])
        self._count([key] * changed.rowcount)

    def _count(self, keys: Sequence[str]) -> None:
        self._connection.execute(_COUNT, [list(keys)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write until asked to stop."""
    parser = argparse.ArgumentParser(prog="python -m soak.writers", description="Write to the source.")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--per-second", type=float, required=True, help="transactions")
    parser.add_argument("--late", action="store_true", help="hold each transaction open for some seconds")
    chosen = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    dice = Random(chosen.seed)
    with psycopg.connect(os.environ["DATABASE_URL"], application_name="soak writer") as connection:
        writer = Writer(connection, dice, name=str(chosen.seed), stop=stop)
        while not stop.is_set():
            if chosen.late:
                writer.stay_open(dice.uniform(2.0, 15.0))
            else:
                writer.transact()
                stop.wait(dice.expovariate(chosen.per_second))


if __name__ == "__main__":
    main()
