"""drt-core: a project with one sync for each target, `drt run --threads` as many as there are targets.

What it holds back by default is lifted: ten requests a second, batches of a hundred for all of a client's life, three
attempts. A sync has one request in flight; the time-out of thirty seconds is written into it.
"""

import os
from pathlib import Path

import psycopg.conninfo
import yaml
from drt.cli.main import app

from benchmarks.peers.script import INITIAL_BACKOFF, MAX_BACKOFF, RETRYABLE, Work, run

_MODEL = """
select change_id, payload::text as payload from distributary.change_log
where change_id > {{ cursor_value }} order by change_id
"""
_BODY = "[{% for row in rows %}{{ row.payload }}{% if not loop.last %},{% endif %}{% endfor %}]"


def deliver(work: Work) -> None:
    """Write the project, run it."""
    project = Path(work.folder) / "drt"
    (project / "syncs").mkdir(parents=True, exist_ok=True)
    (project / ".drt").mkdir(exist_ok=True)
    database = psycopg.conninfo.conninfo_to_dict(work.database_url)
    given = {name: str(database[name]) for name in ("host", "dbname", "user", "password") if database.get(name)}
    profile = {"type": "postgres", "port": int(database["port"] or 5432), "fetch_size": 5000, **given}
    _write(project / ".drt" / "profiles.yml", {"peer": profile})
    _write(project / "drt_project.yml", {"name": "peer", "version": "0.1", "profile": "peer"})
    for target in work.targets:
        _write(project / "syncs" / f"{target}.yml", _sync(target, work))
    os.environ |= {"HOME": str(project), "DO_NOT_TRACK": "1"}  # its profiles lie in the home folder
    os.chdir(project)
    app(["run", "--threads", str(len(work.targets)), "--quiet"], standalone_mode=False)


def _sync(target: str, work: Work) -> dict[str, object]:
    return {
        "name": target,
        "model": _MODEL,
        "destination": {
            "type": "rest_api",
            "url": work.orders_url(target),
            "method": "POST",
            "headers": {"Content-Type": "application/json"},
            "body_mode": "batch",
            "batch_template": _BODY,
            "max_records_per_request": work.batch,
            "native_idempotency_key": "{{ request_id }}",
        },
        "sync": {
            "mode": "incremental",
            "cursor_field": "change_id",
            "watermark": {"default_value": "0"},
            "batch_size": 10_000,
            "on_error": "fail",
            "rate_limit": {"requests_per_second": 1_000_000},
            "retry": {
                "max_attempts": 20,
                "initial_backoff": INITIAL_BACKOFF,
                "max_backoff": MAX_BACKOFF,
                "retryable_status_codes": sorted(RETRYABLE),
            },
        },
    }


def _write(path: Path, content: object) -> None:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


if __name__ == "__main__":
    run(deliver)
