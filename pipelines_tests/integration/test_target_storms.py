"""All faults of a target at once, by chance, over several runs; and the ways in which several make one that is new."""

from collections.abc import Callable

import pytest

from pipelines_tests.fakes.faulty_api import ABOUT_RECORDS, FAULTS, NEEDS_RESULTS, PAUSING, SLOW, FaultyApi, accept_all
from pipelines_tests.fakes.http_server import Reply, Request
from pipelines_tests.integration.deliveries import Delivery

pytestmark = pytest.mark.integration

PATIENCE = 0.15
# Of those that are left out, one takes a deletion by path for done, the other overtakes what does not know its key.
STORM = {
    fault: 0.004 if fault in SLOW else 0.001 if fault in PAUSING else 0.02
    for fault in FAULTS.keys() - ABOUT_RECORDS - {"status_404", "applied_late"}
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", ["batches", "blind_batches"])
def test_a_storm_loses_nothing(database: str, way: str, seed: int) -> None:
    """With records among the others that are refused, whatever else happens to them."""
    chance = STORM | {"reject_named": 0.5, "reject_unnamed": 0.5}
    if way == "blind_batches":
        chance = {fault: often for fault, often in chance.items() if fault not in NEEDS_RESULTS}
    refused = [f"{mode}_{way}-{number}" for mode, number in [("event", 1), ("state", 3), ("state", 4)]]
    with FaultyApi(seed=seed, chance=chance, bad_keys=refused, patience=PATIENCE) as api:
        delivery = Delivery(database=database, api=api, ways=[way, "singles"], timeout=PATIENCE)
        for run in range(3):
            delivery.append(50, refused=refused, seed=10 * seed + run)
            delivery.drain()
        delivery.finish(chance={"too_large": chance["too_large"]})
        assert delivery.refused
        delivery.assert_kept()


STREAM = "event_blind_batches"
REFUSED = "refused"


def refuses_one_and_loses_the_others(request: Request) -> Reply:
    is_refused = any(record["id"] == REFUSED for record in request.records)
    return Reply(status=422) if is_refused else Reply(drop="after")


def fails_on_upserts_and_loses_deletions(request: Request) -> Reply:
    return Reply(drop="after") if "deleted" in request.records[0] else Reply(status=500)


def finds_batches_too_large_and_loses_records(request: Request) -> Reply:
    return Reply(status=413) if len(request.records) > 1 else Reply(drop="after")


@pytest.mark.parametrize(
    ("sick", "changes"),
    [
        (refuses_one_and_loses_the_others, [(REFUSED, "insert"), ("a", "insert"), ("b", "insert"), ("c", "insert")]),
        (fails_on_upserts_and_loses_deletions, [("a", "insert"), ("a", "delete"), ("b", "delete")]),
        (finds_batches_too_large_and_loses_records, [("a", "insert"), ("b", "insert")]),
    ],
)
def test_a_part_of_a_batch_has_the_same_key_in_the_next_run(
    database: str, sick: Callable[[Request], Reply], changes: list[tuple[str, str]]
) -> None:
    """What went out by itself, without an answer, must not come again as part of a larger request."""
    answer = sick
    with FaultyApi(answer=lambda request: answer(request)) as api:
        delivery = Delivery(database=database, api=api, ways=["blind_batches"], max_elapsed=0.05)
        delivery.more = {"max_in_flight": 1}
        delivery.commit([(STREAM, key, operation) for key, operation in changes], refused=[REFUSED])
        delivery.drain()
        answer = accept_all
        delivery.finish()
        delivery.assert_kept()
