"""What is delivered when throughput is measured: changes of about 300 bytes, to any number of targets alike.

The changes are of so many ids, each in several versions: first all ids in their first version, then all in their
second. Every change is to be sent, so that the target can see whether the versions of an id came in order. In mode
`event` they are in any case; in mode `state` as long as there are more ids than a drain's window holds, for then
nothing in it is superseded.
"""

from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from pipelines.delivery.drain import window_for
from resources.migrate import apply_migrations

VERSIONS = 4
Variant = Literal["rows", "template"]

_FILL = """
insert into distributary.change_log (stream, key, operation, payload)
select 'orders', id::text, case when version = 1 then 'insert' else 'update' end,
       jsonb_build_object(
           'id', id, 'version', version, 'email', 'customer' || id || '@shop.example',
           'name', 'Customer ' || id, 'city', (array['Bergen', 'Lyon', 'Gdańsk', 'Porto'])[1 + id %% 4],
           'cents', id * 7 + version, 'paid', id %% 3 = 0, 'note', rpad('', 148, md5(id::text)))
from generate_series(1, %(versions)s::bigint) as version, generate_series(1, %(ids)s::bigint) as id
order by version, id
"""

TABLE = """
create table orders (
    id bigint primary key, version int, email text, name text, city text, cents bigint, paid boolean, note text
)
"""
"""The source's table, with the columns of the changes; it stays empty."""

_TEMPLATE = {
    "id": "$id",
    "version": "$version",
    "operation": "$_operation",
    "properties": {
        "email": "$email",
        "fullname": "$name",
        "address": "${city} (shop)",
        "amount": {"cents": "$cents", "paid": "$paid"},
        "note": "$note",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """So much to deliver, to so many targets, in such requests."""

    changes: int = 100_000
    targets: int = 2
    batch: int = 100
    in_flight: int = 8
    latency: float = 0.0
    """Seconds that the target takes to answer."""
    versions: int = VERSIONS
    """Of each record: the more, the sooner a record's next change follows."""
    variant: Variant = "rows"
    """`rows`: each row as it is. `template`: each put into another shape, field by field."""

    @property
    def ids(self) -> int:
        """Records, each in so many versions."""
        return self.changes // self.versions

    @property
    def names(self) -> list[str]:
        """The targets' names."""
        return [f"target_{number}" for number in range(1, self.targets + 1)]

    @property
    def deliveries(self) -> int:
        """Records that the targets must have in the end, all together."""
        return self.ids * self.versions * self.targets

    @property
    def most(self) -> float:
        """Records a second that the latency allows; infinite without."""
        return self.targets * self.in_flight * self.batch / self.latency if self.latency else float("inf")

    def target_file(self, name: str, url: str) -> dict[str, Any]:
        """Return the configuration of the target *name*, which is at *url*."""
        window = window_for(max_in_flight=self.in_flight, max_records=self.batch)
        mode = "state" if self.ids > window else "event"
        route: dict[str, Any] = {"mode": mode, "upsert": {"path": "/orders", "batch": {"max_records": self.batch}}}
        if self.variant == "template":
            route["record"] = _TEMPLATE
        return {
            "name": name,
            "base_url": f"{url}/{name}",
            "max_in_flight": self.in_flight,
            "start": "beginning",
            "routes": {"orders": route},
        }


def fill(database_url: str, workload: Workload) -> None:
    """Make the schema and the changes in an empty database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        apply_migrations(connection)
        connection.execute(_FILL, {"versions": workload.versions, "ids": workload.ids})
        connection.execute("vacuum analyze distributary.change_log")
        connection.execute("checkpoint")
