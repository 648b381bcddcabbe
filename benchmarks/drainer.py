"""One target's drain in a process of its own, as a step of `delivery_job` has it, but without Dagster.

`python -m benchmarks.drainer DATABASE_URL TARGET_FILE_AS_JSON`. It says `ready`, waits for a line, drains, says what
that took as a line of JSON, and ends with its standard input.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.delivery.catalog import policy_of
from pipelines.delivery.config import TargetConfig
from pipelines.delivery.drain import DrainLimits, drain
from pipelines.delivery.routing import compile_routes
from resources.http_target import HttpTargetClient, endpoint
from resources.postgres_ledger import PostgresLedger
from resources.system_clock import SystemClock

UNIT_OF_PEAK = 1 if sys.platform == "darwin" else 1024


def main(database_url: str, target_file: str) -> None:
    """Drain once, when told to."""
    config = TargetConfig.model_validate(json.loads(target_file))
    ledger = PostgresLedger(database_url)
    where = endpoint(config, lambda name: name)
    HttpTargetClient(where).close()  # the certificates are read once, when a process starts
    routes = compile_routes(config)
    with ledger.open_target(config.name, run_id="benchmark") as opened:
        assert opened is not None
        _say("ready")
        if not sys.stdin.readline():
            return
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        report = drain(
            policy=policy_of(config),
            routes=routes,
            ledger=opened,
            connect=lambda: HttpTargetClient(where),
            clock=SystemClock(),
            limits=DrainLimits(),
        )
        ended, after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        found: dict[str, Any] = {
            "end": report.end,
            "reason": report.reason,
            "accepted": report.total("accepted"),
            "requests": report.requests,
            "started": started,
            "ended": ended,
            "cpu_seconds": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
            "peak_bytes": peak_bytes(),
        }
        _say(json.dumps(found))
        sys.stdin.readline()  # whoever measures has a look at the database's process first


def peak_bytes() -> int:
    """Return the most memory that this process ever had resident.

    Not `ru_maxrss`: after a fork that begins with what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_OF_PEAK


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
