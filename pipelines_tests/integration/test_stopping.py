"""A drain that is killed or told to stop, at every point between reading its work and having written down its end."""

import threading

import dagster as dg
import psycopg
import pytest

from pipelines.definitions import definitions
from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import Deployment
from pipelines_tests.integration.own_faults import (
    PATIENCE,
    DrainProcess,
    append_changes,
    assert_all_is_well,
    changes_in,
    deliver,
    halted,
    one_at_a_time,
    read_ledger,
    target_config,
    wait_until,
    wait_until_free,
)

pytestmark = pytest.mark.integration

EXECUTE = ("job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job")

# Whether there are claims, requests, and settlements at each point; None: as it happens.
KILLED = {
    "before claim": (False, False, False),
    "in claim, rolled back": (False, False, False),
    "in claim, committed all the same": (True, False, False),
    "after claim": (True, False, False),
    "before split": (True, True, None),
    "in split, rolled back": (True, True, None),
    "in split, committed all the same": (True, True, None),
    "after split": (True, True, None),
    "sending": (True, True, False),
    "before settle": (True, True, False),
    "in settle, rolled back": (True, True, False),
    "in settle, committed all the same": (None, True, True),
    "after settle": (None, True, True),
}


@pytest.mark.parametrize("where", KILLED)
def test_a_killed_drain_loses_nothing_and_repeats_only_what_it_had_not_written_down(database: str, where: str) -> None:
    """Two are killed at the same point, the second on top of the first's leftovers; the third finishes the job."""
    point, _, ending = where.partition(", ")
    with HttpApi(one_at_a_time if "split" in point else ()) as api:
        for generation in range(2):
            append_changes(database, seed=generation)
            with halted(point, database, api) as drain:
                drain.process.kill()
                if ending == "rolled back":
                    drain.roll_back()
                drain.go_on()
                wait_until_free(database)
            api.wait_until_left(seconds=PATIENCE)
            left, seen = read_ledger(database), len(api.requests)
            if generation == 0:
                there = (left.claimed_keys, api.requests, left.conservation.accepted)
                for found, expected in zip(there, KILLED[where], strict=True):
                    assert expected is None or bool(found) == expected

        report = deliver(database, target_config(api.url))

        assert report.end == "caught_up"
        assert_all_is_well(database, api)
        after = api.requests[seen:]
        assert left.settled.isdisjoint(changes_in(after))
        first = after if "split" in point else after[: len(left.claimed_keys)]
        assert {request.key for request in first} >= set(left.claimed_keys)


@pytest.mark.parametrize("point", dict.fromkeys(where.partition(", ")[0] for where in KILLED))
def test_a_drain_that_is_told_to_stop_writes_down_all_that_it_knows(database: str, point: str) -> None:
    """SIGTERM: what is out is finished, nothing is sent that was not begun, and so nothing is ever repeated."""
    append_changes(database)
    with HttpApi(one_at_a_time if "split" in point else ()) as api:
        with halted(point, database, api) as drain:
            drain.process.terminate()
            drain.go_on()
            stopped = drain.process.report()
        assert (stopped.end, stopped.reason) == ("stopped", "the run was asked to stop")
        applied = sum(len(request.records) for request in api.applied)
        assert read_ledger(database).conservation.accepted == stopped.total("accepted") == applied

        report = deliver(database, target_config(api.url))

        assert report.end == "caught_up"
        assert_all_is_well(database, api, repeats=False)


def test_a_drain_that_is_told_to_stop_does_not_wait_for_a_target_that_asked_to_be_left_alone(database: str) -> None:
    append_changes(database)
    with HttpApi(Reply(status=503, headers={"Retry-After": "3000"})) as api:
        config = target_config(api.url, retry={"max_elapsed": 3600})
        with DrainProcess(database, config) as drain:
            api.wait_for(1, seconds=PATIENCE)
            drain.terminate()
            assert drain.report().end == "stopped"
        assert read_ledger(database).conservation.accepted == 0
        api.script([])

        assert deliver(database, config).end == "caught_up"
        assert_all_is_well(database, api)


def only_what_was_set_aside_waits(database: str) -> bool:
    """Whether some batch was set aside, and nothing is owed but changes of its keys."""
    with psycopg.connect(database) as connection:
        ((waits, only),) = connection.execute(
            "with owed as (select change_id, key from distributary.change_log, distributary.target_state"
            "              where not settled @> change_id),"
            " aside as (select key from owed, distributary.batch where change_id = any (change_ids) and set_aside > 0)"
            " select exists (select from aside), not exists (select key from owed except select key from aside)"
        ).fetchall()
    return bool(waits and only)


def test_a_drain_killed_with_a_batch_set_aside_keeps_its_keys_in_order(database: str) -> None:
    """Later changes of its keys wait behind it, claimed; after the kill they still come after it."""
    with HttpApi() as api:
        api.script(lambda request: Reply(status=500 if b'"events-3"' in request.body else 200))
        config = target_config(
            api.url,
            retry={"initial_backoff": 0.01, "max_backoff": 0.02, "max_elapsed": 0.1},
            circuit_breaker={"failure_threshold": 100},
        )
        with DrainProcess(database, config, linger=3600.0) as drain:
            for seed in range(2):
                append_changes(database, seed=seed)
                wait_until(lambda: only_what_was_set_aside_waits(database), "the others are delivered")
            drain.kill()
        wait_until_free(database)
        left, seen = read_ledger(database), len(api.requests)
        assert len(left.claimed_keys) > 1
        api.script([])

        report = deliver(database, config)

        assert report.end == "caught_up"
        assert_all_is_well(database, api)
        assert {request.key for request in api.requests[seen : seen + len(left.claimed_keys)]} == set(left.claimed_keys)


# --- a run that is cancelled ------------------------------------------------------------------------------------------


def test_a_run_that_is_cancelled_settles_every_target_and_the_next_one_finishes(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Dagster cancels a run in a container: it notes that the run is to be cancelled, and the run gets SIGTERM."""
    for name in ("DATABASE_URL", "DAGSTER_POSTGRES_URL", "DAGSTER_HOME", "DISTRIBUTARY_CONFIG"):
        monkeypatch.setenv(name, deployment.env[name])
    deployment.insert(2000)
    answer = threading.Event()

    def script(request: Request) -> Reply:
        return Reply(hold=answer) if request.number < 2 else Reply(delay=0.2)

    with HttpApi(script) as crm, HttpApi(script) as email, dg.DagsterInstance.get() as instance:
        deployment.write_target("crm", crm.url, max_in_flight=2)
        deployment.write_target("email", email.url, max_in_flight=2)
        with deployment.started("dagster", *EXECUTE) as (process, log):
            crm.wait_for(2, seconds=PATIENCE)
            email.wait_for(2, seconds=PATIENCE)
            (run,) = instance.get_runs()
            instance.report_run_canceling(run)
            process.terminate()
            wait_until(lambda: "forwarding to active child processes" in log.read_text(), "the signal is passed on")
            answer.set()
            process.wait(PATIENCE)
        (run,) = instance.get_runs()
        applied = {"crm": len(changed(crm)), "email": len(changed(email))}
        assert run.status is dg.DagsterRunStatus.CANCELED, log.read_text()
        assert all(100 <= count < 2000 for count in applied.values())
        assert deployment.accepted() == applied

        for api in (crm, email):
            api.script([])
        job = definitions().resolve_job_def("delivery_job")
        done = job.execute_in_process(instance=instance)

    assert done.success
    assert deployment.accepted() == {"crm": 2000, "email": 2000}
    for api in (crm, email):
        assert len(changed(api)) == len(set(changed(api))) == 2000


def changed(api: HttpApi) -> list[str]:
    return [record["id"] for request in api.applied for record in request.records]
