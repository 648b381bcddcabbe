"""What the catalog asks of the ledger, and what it makes of a target's file for a drain."""

from collections.abc import Mapping, Sequence

from pipelines.delivery.catalog import policy_of
from pipelines.delivery.drain import DrainPolicy, RateLimit
from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.ledger import Owed, Start
from pipelines.delivery.sending import RetryPolicy
from pipelines_tests.fakes.catalog import FakeTargetCatalog, target_config
from pipelines_tests.fakes.ledger import FakeLedger


class CountingLedger(FakeLedger):
    """Counts the queries that the sensor must not make too many of."""

    questions = 0
    registrations: list[Mapping[str, Start]]

    def owed(self, streams: Mapping[str, Sequence[str]]) -> Sequence[Owed]:
        self.questions += 1
        return super().owed(streams)

    def register(self, targets: Mapping[str, Start], *, streams: Mapping[str, Sequence[str]] | None = None) -> None:
        self.registrations = [*getattr(self, "registrations", []), dict(targets)]
        super().register(targets, streams=streams)


def test_one_question_is_enough_once_every_target_is_known():
    ledger = CountingLedger(targets={"crm": "beginning", "email": "beginning"})
    ledger.append("people", "1")

    owed = FakeTargetCatalog([target_config("crm"), target_config("email")]).owed(ledger)

    assert [(state.target, state.has_work) for state in owed] == [("crm", True), ("email", True)]
    assert ledger.questions == 1


def test_a_new_target_is_registered_with_the_start_of_its_file():
    ledger = CountingLedger(targets={"crm": "beginning"})
    ledger.append("people", "1")
    configs = [target_config("crm"), target_config("early"), target_config("late", start="now")]

    owed = FakeTargetCatalog(configs).owed(ledger)

    assert ledger.registrations[1:] == [{"early": "beginning", "late": "now"}]
    assert {state.target: state.has_work for state in owed} == {"crm": True, "early": True, "late": False}


def test_a_change_of_a_stream_that_no_route_takes_is_no_work():
    ledger = FakeLedger()
    catalog = FakeTargetCatalog([target_config("crm")])
    catalog.owed(ledger)
    ledger.append("pets", "1")

    assert [state.has_work for state in catalog.owed(ledger)] == [False]


def test_the_ledger_is_not_asked_about_a_target_that_its_file_stops():
    ledger = FakeLedger()
    configs = [target_config("crm", status="paused"), target_config("email", status="disabled")]

    assert FakeTargetCatalog(configs).owed(ledger) == []
    assert ledger.states == {}


def test_every_setting_of_the_file_reaches_the_drain():
    config = target_config(
        "crm",
        max_in_flight=7,
        rate_limit={"requests_per_second": 12.5, "burst": 3},
        retry={"initial_backoff": 0.25, "max_backoff": 11, "max_elapsed": 22, "max_retry_after": 33},
        circuit_breaker={"failure_threshold": 9, "error_timeout": 44},
        dead_letter_guard=0.75,
        probe_interval=55,
        success_on=[304],
        retryable_status_codes=[423],
        drop_on=[451],
    )

    assert policy_of(config) == DrainPolicy(
        target="crm",
        max_in_flight=7,
        rate_limit=RateLimit(requests_per_second=12.5, burst=3),
        retry=RetryPolicy(initial_backoff=0.25, max_backoff=11, max_elapsed=22),
        failure_threshold=9,
        error_timeout=44,
        dead_letter_guard=0.75,
        probe_interval=55,
        rules=JudgingRules(
            success_on=frozenset({304}),
            retryable_status_codes=frozenset({423}),
            drop_on=frozenset({451}),
            max_retry_after=33,
        ),
    )


def test_without_a_rate_limit_in_the_file_there_is_none():
    assert policy_of(target_config("crm")).rate_limit is None
