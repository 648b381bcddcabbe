"""When the sensor wakes a run, for whom, and what it says when it does not."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
import pytest

# No public name makes a queued run, which Dagster wants to know the code location of.
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.ledger import Owed
from pipelines.delivery.sensors import TARGETS_TAG, change_sensor
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger

CRM_AND_EMAIL = FakeTargetCatalog([target_config("crm"), target_config("email")])
FOR_CRM = {"ops": {"plan_deliveries": {"config": {"targets": ["crm"]}}}}
MINUTE = 60.0


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def ledger() -> FakeLedger:
    """Return a ledger in which both targets are owed a change."""
    ledger = FakeLedger(targets={"crm": "beginning", "email": "beginning"})
    ledger.append("people", "1")
    return ledger


def tick(
    instance: dg.DagsterInstance,
    ledger: FakeLedger,
    catalog: FakeTargetCatalog = CRM_AND_EMAIL,
    clock: FakeClock | None = None,
) -> dg.SensorResult | dg.SkipReason:
    with dg.build_sensor_context(instance=instance) as context:
        answer = change_sensor(context, ledger=ledger, targets=catalog, clock=clock or FakeClock())
    assert isinstance(answer, dg.SensorResult | dg.SkipReason)
    return answer


def targets_of(answer: dg.SensorResult | dg.SkipReason) -> list[str]:
    """Return whom a tick launches a run for."""
    if isinstance(answer, dg.SkipReason):
        return []
    (request,) = answer.run_requests or ()
    return list(request.run_config["ops"]["plan_deliveries"]["config"]["targets"])


def some_run(
    instance: dg.DagsterInstance, *events: str, age: float = 0.0, run_config: Mapping[str, Any] = FOR_CRM
) -> str:
    """Make a run of delivery_job that has come as far as *events*, the last of them *age* seconds ago."""
    origin = RemoteJobOrigin(
        RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("distributary"), "__repository__"), delivery_job.name
    )
    run = instance.create_run_for_job(delivery_job, run_config=run_config, remote_job_origin=origin)
    for event in events:
        instance.report_dagster_event(
            dg.DagsterEvent(event_type_value=event, job_name=delivery_job.name), run.run_id, timestamp=time.time() - age
        )
    return run.run_id


def test_with_nothing_owed_the_tick_is_skipped_in_words(instance):
    answer = tick(instance, FakeLedger())

    assert isinstance(answer, dg.SkipReason)
    assert answer.skip_message == "Every target has everything."


def test_work_wakes_one_run_for_all_targets_that_have_some(instance, ledger):
    catalog = FakeTargetCatalog([target_config("crm"), target_config("email"), target_config("post", streams=["pets"])])

    answer = tick(instance, ledger, catalog)

    assert isinstance(answer, dg.SensorResult)
    (request,) = answer.run_requests or ()
    assert targets_of(answer) == ["crm", "email"]
    assert request.tags == {
        TARGETS_TAG: "crm,email",
        "dagster/max_runtime": "1800",
        "dagster/max_retries": "0",
    }


def test_the_runs_configuration_is_one_that_the_job_takes(instance, ledger):
    answer = tick(instance, ledger)

    assert isinstance(answer, dg.SensorResult)
    (request,) = answer.run_requests or ()
    config = dg.validate_run_config(delivery_job, request.run_config)["ops"]["plan_deliveries"]["config"]
    assert config["linger_seconds"] > 0
    assert config["max_seconds"] < 3600


def test_every_tick_may_ask_anew(instance, ledger):
    """No cursor and no run key: what was asked for is not what was delivered. The ledger knows."""
    first, second = tick(instance, ledger), tick(instance, ledger)

    assert targets_of(first) == targets_of(second) == ["crm", "email"]
    assert isinstance(second, dg.SensorResult)
    assert second.cursor is None
    assert [request.run_key for request in second.run_requests or ()] == [None]


@pytest.mark.parametrize(
    "events",
    [[], ["PIPELINE_ENQUEUED"], ["PIPELINE_ENQUEUED", "PIPELINE_STARTING"], ["PIPELINE_STARTING", "PIPELINE_START"]],
    ids=["made", "queued", "starting", "just started"],
)
def test_a_run_that_has_not_reached_its_targets_yet_suppresses_another_for_them(instance, ledger, events):
    some_run(instance, *events)

    assert targets_of(tick(instance, ledger)) == ["email"]


def test_a_queued_run_is_waited_for_however_long_the_queue(instance, ledger):
    some_run(instance, "PIPELINE_ENQUEUED", age=600 * MINUTE)

    assert targets_of(tick(instance, ledger)) == ["email"]


@pytest.mark.parametrize(
    ("events", "age"),
    [
        (["PIPELINE_STARTING", "PIPELINE_START"], 1 * MINUTE),
        (["PIPELINE_STARTING"], 11 * MINUTE),
        (["PIPELINE_STARTING", "PIPELINE_START", "PIPELINE_SUCCESS"], 0.0),
        (["PIPELINE_STARTING", "PIPELINE_START", "PIPELINE_FAILURE"], 0.0),
        (["PIPELINE_CANCELED"], 0.0),
    ],
    ids=["at work for a minute", "lost while starting", "succeeded", "failed", "cancelled"],
)
def test_a_run_that_is_past_its_start_suppresses_nothing(instance, ledger, events, age):
    """Once it is at work its lock tells; and what was lost with the process that made it must not silence a target."""
    some_run(instance, *events, age=age)

    assert targets_of(tick(instance, ledger)) == ["crm", "email"]


def test_a_persons_run_for_all_targets_suppresses_another_for_any(instance, ledger):
    some_run(instance, run_config={})

    answer = tick(instance, ledger)

    assert isinstance(answer, dg.SkipReason)
    assert answer.skip_message == "crm: a run is on its way; email: a run is on its way"


def test_the_run_that_it_asked_for_suppresses_the_next(instance, ledger):
    answer = tick(instance, ledger)
    assert isinstance(answer, dg.SensorResult)
    (request,) = answer.run_requests or ()

    some_run(instance, "PIPELINE_ENQUEUED", run_config=request.run_config)

    assert targets_of(tick(instance, ledger)) == []


def test_a_target_that_a_drain_is_at_needs_no_run(instance, ledger):
    with ledger.open_target("crm", run_id="another"), ledger.open_target("email", run_id="another"):
        answer = tick(instance, ledger)

    assert isinstance(answer, dg.SkipReason)
    assert answer.skip_message == "crm: a drain is at it; email: a drain is at it"


def test_a_held_back_target_gets_its_run_once_its_time_has_come(instance):
    clock = FakeClock()
    ledger = FakeLedger(targets={"crm": "beginning"}, clock=clock)
    ledger.append("people", "1")
    catalog = FakeTargetCatalog([target_config("crm")])
    with ledger.open_target("crm", run_id="another") as opened:
        assert opened is not None
        opened.hold(status="active", reason="answered 503", failed_runs=1, retry_in=300)

    early = tick(instance, ledger, catalog)
    clock.advance(5 * MINUTE)

    assert isinstance(early, dg.SkipReason)
    assert early.skip_message == "crm: held back: answered 503"
    assert targets_of(tick(instance, ledger, catalog)) == ["crm"]


def test_a_target_paused_until_a_person_acts_is_left_alone_with_the_reason(instance):
    ledger = FakeLedger(targets={"crm": "beginning"})
    ledger.append("people", "1")
    with ledger.open_target("crm", run_id="another") as opened:
        assert opened is not None
        opened.hold(status="paused", reason="the mapping is wrong", failed_runs=1, retry_in=None)

    answer = tick(instance, ledger, FakeTargetCatalog([target_config("crm")]))

    assert isinstance(answer, dg.SkipReason)
    assert answer.skip_message == "crm: held back: the mapping is wrong"


@pytest.mark.parametrize("status", ["paused", "disabled"])
def test_a_target_that_its_file_stops_gets_no_run(instance, ledger, status):
    catalog = FakeTargetCatalog([target_config("crm", status=status), target_config("email")])

    assert targets_of(tick(instance, ledger, catalog)) == ["email"]


def test_a_new_target_is_registered_and_served(instance):
    ledger = FakeLedger(targets={"crm": "beginning"})
    ledger.append("people", "1")

    assert targets_of(tick(instance, ledger)) == ["crm", "email"]
    assert set(ledger.states) == {"crm", "email"}


class LedgerThatIsQuietAtFirst(FakeLedger):
    """Has a change the third time it is asked."""

    asked = 0

    def owed(self, streams: Mapping[str, Sequence[str]]) -> Sequence[Owed]:
        self.asked += 1
        if self.asked == 3:
            self.append("people", "1")
        return super().owed(streams)


class UnreachableLedger(FakeLedger):
    def owed(self, streams: Mapping[str, Sequence[str]]) -> Sequence[Owed]:
        raise ConnectionError("Cannot reach the database")


def test_a_ledger_that_cannot_be_asked_fails_the_tick(instance):
    """ "Could not read" is not "nothing to do": a skipped tick would look as if all were well."""
    with pytest.raises(ConnectionError):
        tick(instance, UnreachableLedger())


def test_a_tick_that_finds_nothing_stays_until_the_next_is_nearly_due(instance, ledger):
    """The daemon comes every 5 s at best: what is committed meanwhile does not wait for it."""
    clock, nobody = FakeClock(), FakeLedger(targets={"crm": "beginning", "email": "beginning"})

    answer = tick(instance, nobody, clock=clock)

    assert isinstance(answer, dg.SkipReason)
    assert sum(clock.naps) == 4.5  # a tick that is still at it then would miss its turn
    assert max(clock.naps) <= 0.25


def test_a_change_that_comes_while_a_tick_stays_wakes_its_run_at_once(instance):
    clock, ledger = FakeClock(), LedgerThatIsQuietAtFirst(targets={"crm": "beginning", "email": "beginning"})

    assert targets_of(tick(instance, ledger, clock=clock)) == ["crm", "email"]
    assert sum(clock.naps) == 0.5


def test_while_nothing_is_owed_nobody_asks_for_runs(instance, monkeypatch):
    """It is looked often: each look is one query, and not one more to Dagster's own database."""
    asked: list[object] = []
    monkeypatch.setattr(instance, "get_run_records", lambda *_, **__: asked.append(1) or [])

    tick(instance, FakeLedger(targets={"crm": "beginning", "email": "beginning"}))

    assert asked == []


def test_a_tick_that_finds_work_does_not_stay(instance, ledger):
    clock = FakeClock()

    assert targets_of(tick(instance, ledger, clock=clock)) == ["crm", "email"]
    assert clock.naps == ()


def test_it_runs_from_the_start_and_often():
    assert change_sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert change_sensor.minimum_interval_seconds == 1
    assert change_sensor.job_name == delivery_job.name
