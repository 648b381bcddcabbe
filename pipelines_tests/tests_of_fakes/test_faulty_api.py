"""The target that misbehaves: what its faults look like from outside, and that they come the same way again."""

import contextlib
import json
import random
from collections.abc import Iterator, Mapping

import httpx
import pytest

from pipelines_tests.fakes.faulty_api import ABOUT_RECORDS, FAULTS, NEEDS_RESULTS, PAUSING, SLOW, FaultyApi
from pipelines_tests.fakes.http_server import Reply, Request


@contextlib.contextmanager
def a_client(api: FaultyApi, *, timeout: float = 5.0, **headers: str) -> Iterator[httpx.Client]:
    # To read certificates takes longer than most of these tests.
    with httpx.Client(base_url=api.url, timeout=timeout, headers=headers, verify=False) as client:
        yield client


def post(client: httpx.Client, *ids: str, key: str = "k") -> httpx.Response:
    records = [{"id": name, "change": number} for number, name in enumerate(ids, start=1)]
    return client.post("/rows", json=records, headers={"Idempotency-Key": key})


def statuses(response: httpx.Response) -> dict[str, int]:
    return {item["id"]: item["status"] for item in response.json()["results"]}


def applied_to(api: FaultyApi) -> int:
    return api.history.findings({}).applied


# What a client sees ---------------------------------------------------------------------------------------------------


def test_a_target_that_is_well_takes_everything_and_says_so() -> None:
    with FaultyApi() as api, a_client(api) as client:
        assert statuses(post(client, "ada", "bob")) == {"ada": 200, "bob": 200}
        assert client.delete("/rows/ada?change=3", headers={"Idempotency-Key": "d"}).status_code == 200

        assert not api.history.findings({"ada": 3, "bob": 2}).broken
        assert not api.faults


@pytest.mark.parametrize("fault", sorted(name for name in FAULTS if name.startswith("status_")))
def test_a_status_is_answered_and_a_retry_after_with_it(fault: str) -> None:
    with FaultyApi(chance={fault: 1.0}) as api, a_client(api) as client:
        answer = post(client, "ada")

    number = int(fault.split("_")[1])
    assert answer.status_code in ({429, 503} if number == 429 else {number})
    assert ("retry-after" in answer.headers) == (number == 429)
    assert api.faults == {fault: 1}
    assert api.fault_of == {0: fault}
    assert applied_to(api) == 0 or number in (500, 502, 504)


@pytest.mark.parametrize("fault", ["status_500", "status_502", "status_504", "never"])
def test_what_fails_in_the_middle_has_taken_some_requests_and_not_others(fault: str) -> None:
    with FaultyApi(chance={fault: 1.0}) as api, a_client(api, timeout=0.05) as client:
        for number in range(8):
            with contextlib.suppress(httpx.TimeoutException):
                post(client, f"record-{number}", key=str(number))
    api.wait_until_left()
    assert 0 < applied_to(api) < 8


@pytest.mark.parametrize(
    ("fault", "applied"),
    [("drop_before", 0), ("reset_before", 0), ("drop_after", 1), ("reset_after", 1), ("half_close", 1)],
)
def test_a_connection_is_dropped_before_or_after_the_request_took_effect(fault: str, applied: int) -> None:
    error = httpx.ReadError if fault.startswith("reset") else httpx.RemoteProtocolError
    with FaultyApi(chance={fault: 1.0}) as api, a_client(api) as client:
        with pytest.raises(error):
            post(client, "ada")
        api.misbehave({})
        assert post(client, "bob").status_code == 200
        assert [request.json[0]["id"] for request in api.applied] == ["ada", "bob"][1 - applied :]


@pytest.mark.parametrize(("fault", "applied"), [("late", 1), ("applied_late", 0)])
def test_an_answer_comes_too_late(fault: str, applied: int) -> None:
    """And what the client has given up on may yet take effect."""
    with FaultyApi(chance={fault: 1.0}, patience=30.0) as api:
        with a_client(api, timeout=0.1) as client, pytest.raises(httpx.ReadTimeout):
            post(client, "ada")
        assert applied_to(api) == applied
    api.wait_until_left()
    assert applied_to(api) == 1


@pytest.mark.parametrize("fault", ["slow_headers", "slow_interim", "slow_body"])
def test_an_answer_trickles_for_longer_than_the_client_has_patience(fault: str) -> None:
    """No pause in it is that long, so only who looks at the whole gives up in time."""
    with FaultyApi(chance={fault: 1.0}, patience=0.06) as api, a_client(api) as client:
        answer = post(client, "ada")
    assert answer.elapsed.total_seconds() > 0.1
    assert statuses(answer) == {"ada": 200}


@pytest.mark.parametrize("fault", ["truncated", "huge_body", "no_body", "broken_json", "not_json"])
def test_an_answer_cannot_be_read_though_the_request_took_effect(fault: str) -> None:
    with FaultyApi(chance={fault: 1.0}) as api, a_client(api) as client:
        with pytest.raises((httpx.RemoteProtocolError, ValueError)):
            post(client, "ada").json()
        assert applied_to(api) == 1


def test_an_idle_connection_is_closed_without_a_word() -> None:
    with FaultyApi(chance={"close_idle": 1.0}) as api, a_client(api) as client:
        for number in range(3):
            answer = post(client, f"record-{number}", key=str(number))
            assert "connection" not in answer.headers
            api.wait_until_left()
        assert api.connections == 3


def test_a_redirect_leads_elsewhere() -> None:
    with FaultyApi(chance={"redirect": 1.0}) as api, a_client(api) as client:
        answer = post(client, "ada")

    assert answer.is_redirect
    assert "elsewhere" in answer.headers["location"]


def test_a_token_is_refused_until_there_is_a_new_one() -> None:
    """For its bearer alone: whoever has renewed is served."""
    with FaultyApi(chance={"unauthorized_until_renewed": 1.0}) as api:
        with a_client(api, authorization="Bearer old") as client:
            assert post(client, "ada").status_code == 401
            api.misbehave({"unauthorized_until_renewed": 0.0})
            assert [post(client, "ada").status_code for _ in range(3)] == [401] * 3
            token = client.post("/token", data={"grant_type": "client_credentials"}).json()
        with a_client(api, authorization=f"{token['token_type']} {token['access_token']}") as client:
            assert post(client, "ada").status_code == 200
        assert (api.revocations, api.renewals) == (1, 1)
        api.misbehave({})
        with a_client(api, authorization="Bearer old") as client:
            assert post(client, "ada").status_code == 200
        assert api.history.findings({"ada": 1}).requests == 6  # tokens are not the records' business


# What it says of records ----------------------------------------------------------------------------------------------


def test_records_that_are_refused_are_named_or_not() -> None:
    for way, expected in (("reject_named", 200), ("reject_unnamed", {400, 422})):
        with FaultyApi(chance={way: 1.0}, bad_keys=["eve"]) as api, a_client(api) as client:
            answer = post(client, "ada", "eve", "bob")
            if way == "reject_named":
                assert answer.status_code == expected
                assert statuses(answer) == {"ada": 200, "eve": 422, "bob": 200}
                assert not api.history.findings({"ada": 1, "bob": 3}).broken
            else:
                assert answer.status_code in (400, 422)
                assert applied_to(api) == 0
            assert api.history.findings({"ada": 1}).strangers in ([], ["bob"])


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - SLOW - {"huge_body"}))
def test_a_bad_record_is_never_taken(fault: str) -> None:
    """Whatever happens to the request that it is in, and when the target is well again."""
    with FaultyApi(chance={"reject_named": 1.0} | {fault: 1.0}, bad_keys=["eve"]) as api:
        for key in ("1", "2", "3"):
            with a_client(api) as client, contextlib.suppress(httpx.TransportError):
                post(client, "ada", "eve", key=key)
        api.misbehave({})
        with a_client(api) as client:
            post(client, "ada", "eve")
    assert "eve" not in api.history.findings({}).strangers


def test_a_batch_is_taken_in_part_and_what_is_said_of_it_is_true() -> None:
    ids = [f"record-{number}" for number in range(40)]
    with FaultyApi(chance={"partial_items": 1.0}) as api, a_client(api) as client:
        said = statuses(post(client, *ids))
        taken = {name for name, status in said.items() if status == 200}
        assert set(said.values()) == {200, 429, 503}
        assert len(said) < len(ids)  # of some it says nothing
        assert taken == set(api.history.findings({}).strangers)

        again = statuses(post(client, *ids))
        assert {again[name] for name in taken} == {200}  # under the same key what it has taken stays taken


def test_a_batch_is_taken_in_part_and_nobody_is_told_which() -> None:
    ids = [f"record-{number}" for number in range(40)]
    with FaultyApi(chance={"partial_truncated": 1.0}) as api, a_client(api) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            post(client, *ids)
        assert 0 < applied_to(api) < 40


def test_who_sends_one_record_is_told_of_it_by_the_status() -> None:
    chance = {"partial_items": 1.0, "reject_named": 1.0}
    with FaultyApi(chance=chance, bad_keys=["eve"]) as api, a_client(api) as client:
        assert client.post("/rows", json={"id": "ada", "change": 1}).status_code == 503
        api.misbehave({})
        assert client.post("/rows", json={"id": "eve", "change": 1}).status_code == 422


def test_a_request_that_is_too_large_is_too_large_at_each_attempt() -> None:
    with FaultyApi(chance={"too_large": 0.5}) as api, a_client(api) as client:
        said = [{post(client, f"ada-{n}", "bob", key=str(n)).status_code for _ in range(3)} for n in range(12)]
        assert {200} in said
        assert {413} in said
        assert {200, 413} not in said
        api.misbehave({"too_large": 1.0})
        assert post(client, "ada", key="alone").status_code == 200


def test_what_was_taken_is_not_refused_as_a_whole_under_the_same_key() -> None:
    with FaultyApi(chance={"reject_named": 1.0}, bad_keys=["eve"]) as api, a_client(api) as client:
        post(client, "ada", "eve")
        api.misbehave({"reject_named": 0.0, "reject_unnamed": 1.0, "too_large": 1.0})
        assert statuses(post(client, "ada", "eve")) == {"ada": 200, "eve": 422}


# Chance ---------------------------------------------------------------------------------------------------------------


CHANCE = dict.fromkeys(("status_500", "status_503", "drop_after", "not_json", "partial_items", "too_large"), 0.12)


def met(
    seed: int, *, order: int = 0, keys: str = "", chance: Mapping[str, float] = CHANCE
) -> dict[str, list[tuple[str | None, str]]]:
    """Return what 20 requests met in three attempts each, whichever of them came first, whatever their keys."""
    requests = [(number, attempt) for attempt in range(3) for number in range(20)]
    random.Random(order).shuffle(requests)
    found: dict[str, list[tuple[str | None, str]]] = {}
    with FaultyApi(seed=seed, chance=chance) as api, a_client(api) as client:
        for number, _ in requests:
            before = len(api.requests)
            with_key = {"Idempotency-Key": f"{keys}{number}"}
            try:
                body = client.post("/rows", json=[{"id": str(number), "change": number}], headers=with_key).text
            except httpx.TransportError:
                body = "-"
            found.setdefault(str(number), []).append((api.fault_of.get(before), body))
    return found


def test_the_same_requests_meet_the_same_faults() -> None:
    """In whatever order they come or chances are written, and whatever their idempotency keys are."""
    first = met(1)

    assert met(1, order=7, keys="other-", chance=dict(reversed(CHANCE.items()))) == first
    assert len({fault for faults in first.values() for fault, _ in faults}) > 4
    assert any(len({fault for fault, _ in faults}) > 1 for faults in first.values())


def test_another_seed_brings_other_faults() -> None:
    assert met(1) != met(2)


def test_it_can_be_well_again() -> None:
    with FaultyApi(chance={"status_500": 1.0}) as api, a_client(api) as client:
        assert post(client, "ada").status_code == 500
        api.misbehave({})
        assert post(client, "ada").status_code == 200
        api.misbehave({"status_503": 1.0})
        assert post(client, "ada").status_code == 503
    assert api.faults == {"status_500": 1, "status_503": 1}


def test_chances_that_cannot_be_are_refused() -> None:
    with FaultyApi() as api:
        with pytest.raises(ValueError, match="there is no fault 'typhoon'; there are status_408"):
            api.misbehave({"typhoon": 0.5})
        with pytest.raises(ValueError, match="must not exceed 1"):
            api.misbehave({"late": 0.7, "never": 0.7})


def test_all_groups_are_made_of_faults() -> None:
    assert FAULTS.keys() > PAUSING | SLOW | ABOUT_RECORDS | NEEDS_RESULTS


# Its own affairs ------------------------------------------------------------------------------------------------------


def test_another_answer_may_be_what_is_well() -> None:
    def answer(request: Request) -> Reply:
        return Reply.json({"saved": len(request.records)}, status=201)

    with FaultyApi(answer=answer) as api, a_client(api) as client:
        assert (post(client, "ada").status_code, post(client, "ada").json()) == (201, {"saved": 1})


def test_it_can_forget_what_it_was_sent_and_still_judge_it() -> None:
    with FaultyApi(keep=False, chance={"status_500": 0.5}) as api, a_client(api) as client:
        for number in range(5):
            post(client, f"record-{number}", key=str(number))
        assert api.requests == api.applied == []
        assert not api.fault_of
        assert api.history.findings({}).requests == 5


def test_what_goes_wrong_inside_is_told_in_the_end() -> None:
    """Else a request that it cannot read would look like a connection that breaks, for ever."""
    api = FaultyApi()
    with a_client(api) as client, pytest.raises(httpx.TransportError):
        client.post("/rows", content=b"[{")

    with pytest.raises(json.JSONDecodeError), api:
        pass
