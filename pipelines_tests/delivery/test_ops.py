"""The wiring of each op: what it takes from the ledger and the catalog, and what it makes of how a drain ends."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from pipelines.delivery.clock import Clock
from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.ledger import LedgerFailed
from pipelines.delivery.ops import DeliveryPlan, PlanConfig, conclude_delivery, deliver_to_target, plan_deliveries
from pipelines.delivery.report import DrainReport
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.loader import FakeLoader
from pipelines_tests.fakes.target import ScriptedTarget, SentRequest
from resources.system_clock import SystemClock

ONE_BY_ONE = {"people": {"upsert": {"path": "/records"}}}


def plan(ledger: FakeLedger, catalog: FakeTargetCatalog, **config: Any) -> tuple[list[DeliveryPlan], Sequence[str]]:
    with dg.build_op_context() as context:
        outputs: list[Any] = list(plan_deliveries(context, PlanConfig(**config), ledger=ledger, targets=catalog))
    for output in outputs[:-1]:
        assert output.mapping_key == output.value.target
    return [output.value for output in outputs[:-1]], outputs[-1].value


def deliver(
    ledger: FakeLedger,
    catalog: FakeTargetCatalog,
    *,
    clock: Clock | None = None,
    loader: FakeLoader | None = None,
    **limits: Any,
) -> DrainReport:
    share = replace(DeliveryPlan(target="crm", linger_seconds=0.0, poll_seconds=0.01, max_seconds=3600.0), **limits)
    with dg.build_op_context() as context:
        report = deliver_to_target(
            context,
            share,
            ledger=ledger,
            targets=catalog,
            clock=clock or FakeClock(),
            loader=loader or FakeLoader(ledger),
        )
    assert isinstance(report, DrainReport)
    return report


class TestPlanDeliveries:
    def test_plans_one_delivery_for_each_target_that_is_owed_something(self):
        ledger = FakeLedger(targets={"email": "beginning"})
        ledger.append("people", "1")
        catalog = FakeTargetCatalog(
            [target_config("crm"), target_config("email"), target_config("post", streams=["pets"])]
        )

        plans, scope = plan(ledger, catalog, linger_seconds=7, poll_seconds=0.5, max_seconds=90)

        expected = {"linger_seconds": 7.0, "poll_seconds": 0.5, "max_seconds": 90.0}
        assert plans == [DeliveryPlan(target=name, **expected) for name in ("crm", "email")]
        assert scope == ["crm", "email", "post"]

    def test_keeps_to_the_targets_that_it_was_given(self):
        ledger = FakeLedger()
        ledger.append("people", "1")

        plans, scope = plan(
            ledger, FakeTargetCatalog([target_config("crm"), target_config("email")]), targets=["email"]
        )

        assert [share.target for share in plans] == scope == ["email"]

    def test_with_nothing_owed_there_is_nothing_to_plan(self):
        plans, scope = plan(FakeLedger(), FakeTargetCatalog([target_config("crm")]))

        assert (plans, scope) == ([], ["crm"])

    def test_an_unknown_target_is_answered_with_the_known_ones(self):
        """Nothing is delivered to anyone: what was meant is not known."""
        catalog = FakeTargetCatalog([target_config("crm"), target_config("email")])

        with pytest.raises(dg.Failure) as failure:
            plan(FakeLedger(), catalog, targets=["crm", "crn", "mail"])

        assert failure.value.description == (
            "ops.plan_deliveries.config.targets: there is no target crn, mail; configured are: crm, email."
        )
        assert failure.value.allow_retries is False

    def test_a_target_that_another_drain_is_at_is_left_to_it(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")

        with ledger.open_target("crm", run_id="another"):
            plans, _ = plan(ledger, FakeTargetCatalog([target_config("crm")]))

        assert plans == []

    def test_a_plan_carries_no_record(self):
        """Dagster pickles it to disk, where personal data has no business."""
        ledger = FakeLedger()
        ledger.append("people", "ada@example.org", payload=b'{"name": "Ada"}')

        plans, scope = plan(ledger, FakeTargetCatalog([target_config("crm")]))

        assert b"Ada" not in pickle.dumps((plans, scope))
        assert b"ada@" not in pickle.dumps((plans, scope))


class TestDeliverToTarget:
    def test_delivers_what_is_owed_and_reports_it(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        for number in range(250):
            ledger.append("people", str(number))
        catalog = FakeTargetCatalog([target_config("crm")])

        report = deliver(ledger, catalog)

        assert (report.end, report.total("accepted"), report.requests) == ("caught_up", 250, 3)
        assert ledger.conservation("crm").pending == 0
        assert len(catalog.client("crm").sent) == 3

    def test_a_report_carries_no_record(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "ada@example.org", payload=b'{"name": "Ada"}')
        catalog = FakeTargetCatalog([target_config("crm")], clients={"crm": ScriptedTarget([422])})

        report = deliver(ledger, catalog)

        assert report.total("dead") == 1
        assert b"Ada" not in pickle.dumps(report)
        assert b"ada@" not in pickle.dumps(report)

    def test_a_report_survives_the_way_to_another_process(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")
        report = deliver(ledger, FakeTargetCatalog([target_config("crm")]))

        assert pickle.loads(pickle.dumps(report)) == report

    def test_a_target_that_is_down_is_a_value_and_no_exception(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")
        catalog = FakeTargetCatalog([target_config("crm")], clients={"crm": ScriptedTarget(then=503)})

        report = deliver(ledger, catalog)

        assert (report.end, report.reason) == ("deferred", "answered 503")

    def test_a_target_that_cannot_be_used_as_configured_is_paused_without_a_request(self):
        """A missing secret is one target's trouble."""
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")
        sentence = "targets/crm.yaml: auth.token: the environment variable CRM_TOKEN is not set; export it"
        catalog = FakeTargetCatalog([target_config("crm")], misconfigured={"crm": sentence})

        report = deliver(ledger, catalog)

        assert (report.end, report.reason) == ("paused", sentence)
        assert catalog.client("crm").sent == []
        assert ledger.conservation("crm").pending == 1

    def test_a_lock_that_another_drain_holds_is_left_alone(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")
        catalog = FakeTargetCatalog([target_config("crm")])

        with ledger.open_target("crm", run_id="another"):
            report = deliver(ledger, catalog)

        assert report.end == "held"
        assert catalog.client("crm").connected == 0

    def test_its_batches_name_the_run(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")

        deliver(ledger, FakeTargetCatalog([target_config("crm")]))

        with dg.build_op_context() as context:
            assert [batch.run_id for batch in ledger.batches] == [context.run_id]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_lets_what_is_in_flight_finish_and_be_settled(self, number):
        """What a cancelled run and a stopping machine send; without this, the step would be cut off in mid-request."""
        # A shell starts what runs in the background with SIGINT ignored.
        before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
        ledger = FakeLedger(targets={"crm": "beginning"})
        for key in range(2000):
            ledger.append("people", str(key))

        def answer(request: SentRequest) -> int:
            if request.number == 3:
                os.kill(os.getpid(), number)
            time.sleep(0.005 if request.number >= 3 else 0)
            return 200

        catalog = FakeTargetCatalog([target_config("crm", routes=ONE_BY_ONE)], clients={"crm": ScriptedTarget(answer)})

        report = deliver(ledger, catalog)

        sent = len(catalog.client("crm").sent)
        assert (report.end, report.reason) == ("stopped", "the run was asked to stop")
        assert 4 <= sent < 2000
        assert report.total("accepted") == ledger.conservation("crm").accepted == sent
        assert ledger.conservation("crm").holds
        assert not any(state.held for state in ledger.owed({"crm": ["people"]}))
        # Dagster itself, once it has run anything, leaves SIGTERM to what SIGINT does.
        usual = (*before, signal.SIG_DFL, signal.default_int_handler)
        assert signal.getsignal(signal.SIGINT) in usual
        assert signal.getsignal(signal.SIGTERM) in usual

    def test_a_signal_at_any_moment_of_lingering_is_heard(self, monkeypatch):
        """The handler sets the stop event. Were this thread to wait on it, it might hold the lock that set() needs."""
        waited: list[float | None] = []
        wait = threading.Event.wait

        def spy(self, timeout=None):
            if threading.current_thread() is threading.main_thread():
                waited.append(timeout)
            return wait(self, timeout)

        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        monkeypatch.setattr(threading.Event, "wait", spy)
        ledger = FakeLedger(targets={"crm": "beginning"})
        catalog = FakeTargetCatalog([target_config("crm")])

        report = deliver(ledger, catalog, clock=SystemClock(), linger_seconds=60.0, poll_seconds=0.05)

        assert report.end == "stopped"
        assert waited == []

    def test_it_works_where_signals_cannot_be_caught(self):
        """In a thread other than the main one, as some executors run steps."""
        ledger = FakeLedger(targets={"crm": "beginning"})
        ledger.append("people", "1")
        reports: list[DrainReport] = []
        catalog = FakeTargetCatalog([target_config("crm")])

        thread = threading.Thread(target=lambda: reports.append(deliver(ledger, catalog)))
        thread.start()
        thread.join()

        assert [report.end for report in reports] == ["caught_up"]

    def test_max_seconds_ends_a_delivery(self):
        ledger = FakeLedger(targets={"crm": "beginning"})
        for key in range(2000):
            ledger.append("people", str(key))
        clock = FakeClock()

        def answer(request: SentRequest) -> int:
            clock.advance(100 if request.number == 3 else 0)
            time.sleep(0.005 if request.number >= 3 else 0)
            return 200

        catalog = FakeTargetCatalog([target_config("crm", routes=ONE_BY_ONE)], clients={"crm": ScriptedTarget(answer)})

        report = deliver(ledger, catalog, clock=clock, max_seconds=60)

        assert (report.end, report.reason) == ("stopped", "max_seconds (60) passed")
        assert 4 <= ledger.conservation("crm").accepted < 2000


class TestLedgerFailure:
    def test_a_ledger_that_fails_is_told_in_a_report_so_that_other_targets_are_concluded(self):
        """A step that raised would keep the last op, and with it every target's line, from running."""

        class Failing(FakeLedger):
            @contextmanager
            def open_target(self, target: str, *, run_id: str) -> Iterator[Any]:
                with super().open_target(target, run_id=run_id) as opened:
                    yield opened
                    raise LedgerFailed("the database failed: could not extend file: No space left on device")

        ledger = Failing(targets={"crm": "beginning"})
        ledger.append("people", "1", payload=b'{"id": "1"}')

        report = deliver(ledger, FakeTargetCatalog([target_config("crm")]))

        assert report.end == "failed"
        assert report.reason == "the database failed: could not extend file: No space left on device"


class TestInitialLoads:
    ROWS = {"people": {"a": b'{"id": "a"}', "b": b'{"id": "b"}'}}

    def test_a_target_that_starts_with_a_snapshot_gets_every_row_and_then_the_changes(self):
        """Of what was in the log before it came it gets nothing; nobody has to launch anything."""
        ledger = FakeLedger()
        ledger.append("people", "a")
        ledger.append("people", "gone", operation="delete")
        catalog = FakeTargetCatalog([target_config("crm", start="snapshot")])
        plans, _ = plan(ledger, catalog)
        ledger.append("people", "b", payload=b'{"id": "b", "new": true}')

        report = deliver(ledger, catalog, loader=FakeLoader(ledger, self.ROWS))

        assert [share.target for share in plans] == ["crm"]
        assert report.end == "caught_up"
        assert [request.body for request in catalog.client("crm").sent] == [b'[{"id": "a"},{"id": "b"}]']
        assert plan(ledger, catalog)[0] == []

    def test_a_load_that_cannot_be_done_is_told_and_live_changes_do_not_wait(self):
        ledger = FakeLedger()
        catalog = FakeTargetCatalog([target_config("crm", start="snapshot")])
        plan(ledger, catalog)
        ledger.append("people", "b", payload=b'{"id": "b"}')

        report = deliver(ledger, catalog, loader=FakeLoader(ledger, {}))

        assert (report.end, report.total("accepted")) == ("deferred", 1)
        assert report.reason is not None
        assert report.reason.startswith("source.yaml: there is no table people")


class TestConcludeDelivery:
    def conclude(self, ledger: FakeLedger, *reports: DrainReport) -> None:
        catalog = FakeTargetCatalog([target_config("crm")])
        with dg.build_op_context() as context:
            conclude_delivery(context, ["crm"], list(reports), ledger=ledger, targets=catalog)

    def test_prints_one_line_for_each_target_on_stdout(self, capsys):
        self.conclude(FakeLedger(), DrainReport(target="crm", end="caught_up", requests=2))

        assert capsys.readouterr().out == "crm  0 delivered, 2 requests  caught up\n"

    def test_fails_with_a_sentence_and_is_not_tried_again(self, capsys):
        ledger = FakeLedger()
        ledger.append("people", "1")

        with pytest.raises(dg.Failure) as failure:
            self.conclude(ledger, DrainReport(target="crm", end="deferred", reason="answered 503"))

        assert failure.value.description == "crm: not caught up, deferred: answered 503"
        assert failure.value.allow_retries is False
        assert capsys.readouterr().out.startswith("crm  ")


@pytest.mark.parametrize(
    "wrong", [{"linger_seconds": -1}, {"poll_seconds": 0}, {"max_seconds": 0}, {"targets": "crm"}, {"target": ["crm"]}]
)
def test_a_run_config_that_makes_no_sense_is_refused_before_the_run(wrong):
    """Also one with a key that does not exist: a wish that is silently not honoured is worse than a refusal."""
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises((ValueError, dg.DagsterInvalidConfigError)) as told:
        delivery_job.execute_in_process(
            run_config={"ops": {"plan_deliveries": {"config": wrong}}},
            resources={
                "ledger": FakeLedger(),
                "targets": FakeTargetCatalog([]),
                "clock": FakeClock(),
                "loader": FakeLoader(FakeLedger()),
            },
            instance=instance,
        )

    assert next(iter(wrong)) in str(told.value)
