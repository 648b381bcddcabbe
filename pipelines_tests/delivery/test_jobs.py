"""The whole of `delivery_job` in one process, over fakes: who is served, and how the run ends."""

from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest

from pipelines.changes.record import ChangeRecord, instant_of
from pipelines.delivery.jobs import delivery_job
from pipelines.delivery.ops import PlanConfig
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.ledger import FakeLedger
from pipelines_tests.fakes.loader import FakeLoader
from pipelines_tests.fakes.target import ScriptedTarget

METADATA = {
    "delivered",
    "superseded",
    "filtered",
    "dead",
    "retries",
    "records per second",
    "latency p50 (ms)",
    "latency p95 (ms)",
    "lag p50 (s)",
    "lag p95 (s)",
}


def changes(*days: str, stream: str = "people", first: int = 1) -> list[ChangeRecord]:
    return [
        ChangeRecord(
            change_id=number,
            stream=stream,
            key=str(number),
            operation="insert",
            payload=b'{"name": "Ada Lovelace"}',
            instant=instant_of(datetime.fromisoformat(day).replace(tzinfo=UTC)),
        )
        for number, day in enumerate(days, start=first)
    ]


def run(
    ledger: FakeLedger, catalog: FakeTargetCatalog, instance: dg.DagsterInstance | None = None, **config: Any
) -> dg.ExecuteInProcessResult:
    return delivery_job.execute_in_process(
        run_config=dg.RunConfig(ops={"plan_deliveries": PlanConfig(**config)}),
        resources={
            "ledger": ledger,
            "targets": catalog,
            "clock": FakeClock(start=datetime(2026, 3, 3, tzinfo=UTC)),
            "loader": FakeLoader(ledger),
        },
        raise_on_error=False,
        instance=instance,
    )


def why(result: dg.ExecuteInProcessResult) -> list[str | None]:
    """Return the sentences of all failures."""
    failures = [event.step_failure_data for event in result.get_step_failure_events()]
    return [failure.user_failure_data.description if failure.user_failure_data else None for failure in failures]


def test_every_target_gets_what_it_is_owed(capsys):
    ledger = FakeLedger(changes=changes(*["2026-03-01"] * 120))
    catalog = FakeTargetCatalog([target_config("crm"), target_config("email")])

    result = run(ledger, catalog)

    assert result.success
    assert [ledger.conservation(name).accepted for name in ("crm", "email")] == [120, 120]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["crm", "120", "delivered,"], ["email", "120", "delivered,"]]
    assert all(line.endswith("caught up") for line in lines)


def test_with_nothing_owed_the_run_is_green_and_says_so(capsys):
    result = run(FakeLedger(), FakeTargetCatalog([target_config("crm"), target_config("email")]))

    assert result.success
    assert capsys.readouterr().out.splitlines() == ["crm    up to date", "email  up to date"]


def test_without_any_target_the_run_is_green():
    assert run(FakeLedger(), FakeTargetCatalog([])).success


def test_one_target_down_does_not_stop_the_others():
    """The healthy targets are served, and the run still ends in failure: once, with one sentence."""
    ledger = FakeLedger(changes=changes(*["2026-03-01"] * 5))
    catalog = FakeTargetCatalog(
        [target_config("alpha"), target_config("crm"), target_config("email")],
        clients={"crm": ScriptedTarget(then=503)},
    )

    result = run(ledger, catalog)

    assert not result.success
    assert [ledger.conservation(name).accepted for name in ("alpha", "crm", "email")] == [5, 0, 5]
    assert [event.step_key for event in result.get_step_failure_events()] == ["conclude_delivery"]
    assert why(result) == ["crm: not caught up, deferred: answered 503"]


def test_a_refused_record_fails_the_run_though_all_others_were_delivered():
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm")], clients={"crm": ScriptedTarget([422])})

    assert why(run(ledger, catalog)) == ["crm: 1 dead-lettered (1 x answered 422)"]
    assert len(ledger.dead_letters) == 1


def test_a_missing_secret_pauses_its_target_alone():
    ledger = FakeLedger(changes=changes("2026-03-01"))
    sentence = "targets/crm.yaml: auth.token: the environment variable CRM_TOKEN is not set"
    catalog = FakeTargetCatalog([target_config("crm"), target_config("email")], misconfigured={"crm": sentence})

    result = run(ledger, catalog)

    assert ledger.conservation("email").accepted == 1
    assert why(result) == [f"crm: not caught up, paused: {sentence}"]


def test_a_target_that_is_not_critical_leaves_the_run_green(capsys):
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm", critical=False)], clients={"crm": ScriptedTarget(then=503)})

    result = run(ledger, catalog)

    assert result.success
    assert "deferred: answered 503" in capsys.readouterr().out


def test_a_target_paused_in_its_file_gets_nothing_and_is_named(capsys):
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm", status="paused"), target_config("email")])

    result = run(ledger, catalog)

    assert result.success
    assert catalog.client("crm").sent == []
    assert capsys.readouterr().out.splitlines()[0] == "crm    paused in its file"


def test_a_run_can_be_kept_to_some_targets(capsys):
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm"), target_config("email")])

    result = run(ledger, catalog, targets=["email"])

    assert result.success
    assert catalog.client("crm").sent == []
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["email"]


def test_an_unknown_target_fails_the_run_before_anything_is_sent():
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm")])

    result = run(ledger, catalog, targets=["crn"])

    assert why(result) == ["ops.plan_deliveries.config.targets: there is no target crn; configured are: crm."]
    assert catalog.client("crm").sent == []


def test_a_problem_of_the_source_fails_the_run_and_holds_nobody_up():
    class Uncaptured(FakeTargetCatalog):
        def problems(self):
            return ["source.yaml: tables.people: its changes are not captured"]

    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = Uncaptured([target_config("crm")])

    result = run(ledger, catalog)

    assert why(result) == ["source.yaml: tables.people: its changes are not captured"]
    assert ledger.conservation("crm").pending == 0


def test_a_target_that_another_run_is_at_is_left_to_it(capsys):
    ledger = FakeLedger(targets={"crm": "beginning"}, changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm"), target_config("email")])

    with ledger.open_target("crm", run_id="another"):
        result = run(ledger, catalog)

    assert why(result) == ["crm: not caught up: another run is delivering to it"]
    assert (len(catalog.client("crm").sent), len(catalog.client("email").sent)) == (0, 1)
    assert capsys.readouterr().out.splitlines()[0] == "crm    another run is delivering to it"


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_persons_run_tries_a_held_back_target_at_once(status):
    """They have mended it, and need not wait for its time."""
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm")], clients={"crm": ScriptedTarget([status] * 50)})
    assert not run(ledger, catalog).success
    assert [state.waiting for state in ledger.owed({"crm": ["people"]})] == [True]

    mended = FakeTargetCatalog([target_config("crm")])

    assert run(ledger, mended).success
    assert ledger.states["crm"].status == "active"
    assert ledger.conservation("crm").accepted == 1


def test_deliveries_are_reported_as_assets_by_stream_and_day_of_change():
    ledger = FakeLedger(
        changes=[
            *changes("2026-03-01", "2026-03-01", "2026-03-02"),
            *changes("2026-03-02", stream="pets", first=4),
        ]
    )
    catalog = FakeTargetCatalog([target_config("crm", streams=["people", "pets"])])

    result = run(ledger, catalog)

    seen = [
        event.step_materialization_data.materialization
        for event in result.all_events
        if event.event_type_value == "ASSET_MATERIALIZATION"
    ]
    delivered = {(tuple(found.asset_key.path), found.partition): found.metadata["delivered"].value for found in seen}
    assert delivered == {
        (("crm", "people"), "2026-03-01"): 2,
        (("crm", "people"), "2026-03-02"): 1,
        (("crm", "pets"), "2026-03-02"): 1,
    }
    assert all(set(found.metadata) == METADATA for found in seen)
    assert all(isinstance(value.value, int | float) for found in seen for value in found.metadata.values())


def test_a_change_from_before_the_calendar_begins_is_reported_all_the_same():
    ledger = FakeLedger(changes=changes("1999-12-31"))

    result = run(ledger, FakeTargetCatalog([target_config("crm")]))

    assert result.success
    assert [found.partition for found in result.asset_materializations_for_node("deliver_to_target")] == ["1999-12-31"]


def test_a_target_that_took_nothing_reports_no_asset():
    ledger = FakeLedger(changes=changes("2026-03-01"))
    catalog = FakeTargetCatalog([target_config("crm")], clients={"crm": ScriptedTarget(then=503)})

    result = run(ledger, catalog)

    assert "ASSET_MATERIALIZATION" not in [event.event_type_value for event in result.all_events]


def test_no_payload_and_no_key_is_written_into_dagsters_events():
    """They hold personal data, and Dagster keeps its events for ever, for all who may open its UI."""
    ledger = FakeLedger(targets={"crm": "beginning", "email": "beginning"})
    for _ in range(3):
        ledger.append("people", "ada@example.org", payload=b'{"name": "Ada Lovelace"}')
    catalog = FakeTargetCatalog(
        [target_config("crm"), target_config("email")], clients={"email": ScriptedTarget([422])}
    )

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(ledger, catalog, instance)
        events = " ".join(str(entry) for entry in instance.all_logs(result.run_id))

    assert b"Ada Lovelace" in catalog.client("crm").sent[0].body
    assert "caught_up" not in events
    assert "dead-lettered" in events
    assert "Lovelace" not in events
    assert "ada@" not in events
