"""`dagster job execute`, as a person or CI runs it: what is delivered, what is printed, how it exits."""

import os
import re
import signal
import threading
import time

import psycopg
import pytest
import yaml

from pipelines_tests.fakes.http_server import HttpApi, Reply, Request
from pipelines_tests.integration.conftest import Deployment

pytestmark = pytest.mark.integration

EXECUTE = ("job", "execute", "-m", "pipelines.definitions", "-j", "delivery_job")
NUMBERS = re.compile(r" +[\d,]+ records/s")


def test_all_that_is_pending_is_delivered_and_the_exit_is_0(deployment: Deployment):
    """One line for each target on stdout; and of the records nothing stays in Dagster's database or on its disk."""
    deployment.insert(120)
    with HttpApi() as crm, HttpApi() as email:
        deployment.write_target("crm", crm.url, auth={"type": "bearer", "token": {"env": "CRM_TOKEN"}})
        deployment.write_target("email", email.url, start="beginning", max_in_flight=1)

        done = deployment.run(*EXECUTE, CRM_TOKEN="s3cret-token")

    assert done.returncode == 0, done.stderr
    assert [NUMBERS.sub("", line) for line in done.stdout.splitlines()] == [
        "crm    120 delivered, 3 requests,  caught up",
        "email  120 delivered, 3 requests,  caught up",
    ]
    assert sum(len(request.records) for request in crm.applied) == 120
    assert deployment.accepted() == {"crm": 120, "email": 120}
    kept = [path.read_bytes() for path in (deployment.folder / "home").rglob("*") if path.is_file()]
    with psycopg.connect(deployment.env["DAGSTER_POSTGRES_URL"].replace("+psycopg2", "")) as connection:
        kept += [row[0].encode() for row in connection.execute("select event from event_logs")]
    assert len(kept) > 50
    assert not any(secret in text for text in kept for secret in (b"Lovelace", b"s3cret-token"))


def test_a_refused_record_makes_the_exit_1_and_a_run_can_be_kept_to_one_target(deployment: Deployment):
    deployment.insert(2)
    deployment.insert(1, name="Nobody")

    def refuse_nobody(request: Request) -> Reply:
        return Reply(status=422 if b"Nobody" in request.body else 200)

    with HttpApi(refuse_nobody) as email, HttpApi() as crm:
        deployment.write_target("crm", crm.url)
        deployment.write_target("email", email.url, max_in_flight=1)
        (deployment.folder / "run.yaml").write_text(
            yaml.safe_dump({"ops": {"plan_deliveries": {"config": {"targets": ["email"]}}}})
        )

        done = deployment.run(*EXECUTE, "-c", str(deployment.folder / "run.yaml"))

    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("email  2 delivered, 1 dead, ")
    assert "email: 1 dead-lettered (1 x answered 422)" in done.stderr
    assert crm.requests == []
    assert deployment.query("select target, status_code from distributary.dead_letter") == [("email", 422)]


def test_a_critical_target_that_is_down_makes_the_exit_1_and_the_others_get_everything(deployment: Deployment):
    deployment.insert(60)
    with HttpApi() as email:
        gone = HttpApi()
        gone.close()
        deployment.write_target("crm", gone.url, max_in_flight=1)
        deployment.write_target("email", email.url)

        done = deployment.run(*EXECUTE)

    assert done.returncode == 1
    crm, healthy = done.stdout.splitlines()
    assert re.match(r"crm +0 delivered, .* deferred: cannot connect: ", crm)
    assert healthy.endswith("caught up")
    assert deployment.accepted() == {"crm": 0, "email": 60}
    assert "crm: not caught up, deferred: cannot connect: " in done.stderr


def test_a_step_that_is_told_to_stop_finishes_what_is_in_flight_and_the_run_ends_green(deployment: Deployment):
    """SIGTERM while the target has a request and has not answered it: the answer is awaited and written down."""
    deployment.insert(2000)
    answer_now = threading.Event()

    def answer(request: Request) -> Reply:
        return Reply(hold=answer_now) if request.number == 0 else Reply(delay=0.2)

    with HttpApi(answer) as crm:
        deployment.write_target("crm", crm.url, max_in_flight=1)
        with deployment.started("dagster", *EXECUTE) as (process, log):
            crm.wait_for(1, seconds=30)
            started = re.search(r"- (\d+) - deliver_to_target\[crm\] - STEP_START ", log.read_text())
            assert started is not None
            os.kill(int(started[1]), signal.SIGTERM)
            time.sleep(0.2)
            answer_now.set()
            exit_status = process.wait(30)

        applied = sum(len(request.records) for request in crm.applied)
    assert exit_status == 0, log.read_text()
    assert "stopped: the run was asked to stop" in log.read_text()
    assert 50 <= applied < 2000
    assert deployment.accepted() == {"crm": applied}


def test_a_mistake_in_a_file_is_one_sentence_and_no_traceback(deployment: Deployment):
    deployment.write_target("crm", "https://crm.example", critcal=False)

    done = deployment.run(*EXECUTE)

    assert done.returncode == 1
    assert "crm.yaml:" in done.stderr
    assert "critcal: unknown key; did you mean 'critical'?" in done.stderr
    assert "Traceback" not in done.stderr
