"""Each fault of a target through the real drain: nothing is lost, overtaken or buried, and repeats are repeats.

Drains run against a real Postgres and a `FaultyApi` over real sockets; once the fault is over, all must be there.
"""

import pytest

from pipelines_tests.fakes.faulty_api import ABOUT_RECORDS, FAULTS, PAUSING, SLOW, FaultyApi
from pipelines_tests.integration.deliveries import Delivery

pytestmark = pytest.mark.integration

PATIENCE = 0.15


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"applied_late"} - ABOUT_RECORDS))
def test_a_fault_loses_nothing(database: str, fault: str) -> None:
    """While some requests meet it and others do not, and once it is over."""
    slow = fault in SLOW
    # A 404 on a record's own path would say that the record is gone.
    ways = ["batches"] if fault == "status_404" else ["batches", "singles"]
    with FaultyApi(seed=3, chance={fault: 0.15 if slow else 0.4}, patience=PATIENCE) as api:
        delivery = Delivery(database=database, api=api, ways=ways, timeout=PATIENCE if slow else 5.0)
        delivery.append(40 if slow else 60)
        report = delivery.drain()
        assert api.faults[fault] > 0
        if fault in PAUSING:
            assert report.end == "paused"
        delivery.finish()
        delivery.assert_kept()


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        ("status_503", "deferred"),
        ("status_429_absurd", "deferred"),
        ("drop_after", "deferred"),
        ("never", "deferred"),
        ("status_403", "paused"),
        ("redirect", "paused"),
    ],
)
def test_an_outage_costs_one_request_a_run_and_buries_nothing(database: str, fault: str, end: str) -> None:
    """A run that finds the target unwell asks it once; what was claimed is kept, and goes out as it was."""
    with FaultyApi(chance={fault: 1.0}) as api:
        delivery = Delivery(database=database, api=api, timeout=PATIENCE, max_elapsed=0.05)
        delivery.append(60)
        assert delivery.drain().end == end
        for _ in range(2):
            before = len(api.requests)
            assert delivery.drain().end == end
            assert len(api.requests) == before + 1
        first = {request.key for request in api.requests}
        delivery.finish()
        assert first <= {request.key for request in api.applied}
        delivery.assert_kept()


@pytest.mark.parametrize("way", sorted(ABOUT_RECORDS))
def test_refused_records_are_buried_alone(database: str, way: str) -> None:
    """Named by the target or not, and whatever else goes wrong: each of their changes, and no other."""
    refused = [f"{mode}_{way}-2" for mode in ("event", "state") for way in ("batches", "singles")]
    chance = {way: 1.0, "drop_after": 0.2, "status_500": 0.1, "truncated": 0.1}
    with FaultyApi(chance=chance, bad_keys=refused) as api:
        delivery = Delivery(database=database, api=api)
        delivery.append(80, refused=refused)
        delivery.drain()
        delivery.finish()
        assert delivery.refused == set(refused)
        delivery.assert_kept()


def test_a_request_that_is_applied_when_it_was_given_up_overtakes_nothing_that_knows_its_key(database: str) -> None:
    """Who takes every request as new may end up with an older state by it: that cannot be prevented from here."""
    with FaultyApi(seed=1, chance={"applied_late": 0.2}, patience=PATIENCE) as api:
        delivery = Delivery(database=database, api=api, timeout=PATIENCE)
        delivery.append(60, keys=2)
        delivery.drain()
        delivery.finish()
        api.wait_until_left()
        delivery.assert_kept(tolerated=["out_of_order_if_careless"])
    assert api.history.findings(delivery.expected).repeats


def test_tokens_that_end_are_renewed_once_each(database: str) -> None:
    """However many lanes are refused by it, and nothing is sent again but what was refused."""
    with FaultyApi(chance={"unauthorized_until_renewed": 0.1}) as api:
        auth = {
            "type": "oauth2_client_credentials",
            "token_url": f"{api.url}/token",
            "client_id": "distributary",
            "client_secret": {"env": "SECRET"},
        }
        delivery = Delivery(database=database, api=api, more={"auth": auth})
        delivery.append(120)
        runs = 1
        # A token that ends before it was ever taken is none: the target pauses, and the next run begins with another.
        while delivery.drain().end == "paused" and runs < 20:
            runs += 1
        delivery.finish()
        assert api.revocations > 3
        assert api.renewals <= api.revocations + runs + 1
        assert api.history.findings(delivery.expected).repeats == 0
        delivery.assert_kept()
