"""The asset `dead_letters`: what targets refused and nobody has dealt with, counted and plotted."""

from collections import Counter

import dagster as dg

from pipelines.delivery.clock import Clock
from pipelines.operating.dead_letters import DeadLetters, Selection
from pipelines.operating.selecting import age

_SHOWN = 200


@dg.asset(name="dead_letters", group_name="operating", kinds={"postgres"})
def dead_letters_asset(
    dead_letters: dg.ResourceParam[DeadLetters], clock: dg.ResourceParam[Clock]
) -> dg.MaterializeResult[None]:
    """The open dead letters, by target, stream and reason. Redrive or discard them with `redrive_job`."""
    groups = dead_letters.groups(Selection())
    by_target = Counter[str]()
    for group in groups:
        by_target[group.target] += group.count
    oldest = min((group.oldest for group in groups), default=None)
    now = clock.now()
    records = [
        dg.TableRecord(
            {
                "target": group.target,
                "stream": group.stream,
                "reason": group.reason,
                "count": group.count,
                "oldest": age(now - group.oldest),
                "keys": ", ".join(group.example_keys),
            }
        )
        for group in groups[:_SHOWN]
    ]
    schema = dg.TableSchema(
        columns=[
            dg.TableColumn(name, "int" if name == "count" else "string")
            for name in ("target", "stream", "reason", "count", "oldest", "keys")
        ]
    )
    return dg.MaterializeResult(
        metadata={
            "open": by_target.total(),
            "age of the oldest (h)": 0.0 if oldest is None else round((now - oldest).total_seconds() / 3600, 2),
            **{f"open at {target}": count for target, count in sorted(by_target.items())},
            "dead letters": dg.MetadataValue.table(records=records, schema=schema),
        }
    )
