"""The soak's target holds what a careful API would hold, and goes away and comes back with its memory."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from demo.processes import free_port
from soak.target import Controlled


class Target:
    """One that runs in this process, and a client on each of its two ports."""

    def __init__(self) -> None:
        port, control = free_port(0), free_port(0)
        self.served = Controlled(port=port, control=control, seed=1, patience=1.0, bad_keys=["bad"])
        self.wire = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5)
        self.keeper = httpx.Client(base_url=f"http://127.0.0.1:{control}", timeout=5)

    def send(self, key: str, *records: dict[str, Any]) -> int:
        return self.wire.post("/rows", json=list(records), headers={"Idempotency-Key": key}).status_code

    def behave(self, chance: dict[str, float], *, listens: bool = True) -> None:
        self.keeper.post("/behave", json={"chance": chance, "listens": listens}).raise_for_status()

    def held(self) -> Any:
        return self.keeper.get("/held").json()

    def findings(self, expected: dict[str, Any]) -> Any:
        return self.keeper.post("/findings", json={"expected": expected}).json()


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    with target.wire, target.keeper:
        yield target
    target.served.close()


def record(key: str, change: int, *, deleted: bool = False) -> dict[str, Any]:
    return {"id": key, "change": change, "deleted": deleted, "row": {"id": key, "revision": change}}


def test_it_holds_the_latest_state_and_not_what_was_deleted(target: Target) -> None:
    target.send("k1", record("ada", 1), record("bob", 2))
    target.send("k2", record("ada", 3), record("bob", 4, deleted=True))
    target.send("k3", record("eve", 5))
    target.wire.delete("/rows/eve?change=6", headers={"Idempotency-Key": "k4"})

    assert target.held() == {"ada": {"id": "ada", "revision": 3}}


def test_what_comes_again_under_its_key_is_passed_over(target: Target) -> None:
    target.send("k1", record("ada", 1))
    target.send("k2", record("ada", 2))
    target.send("k1", record("ada", 1))

    assert target.held() == {"ada": {"id": "ada", "revision": 2}}
    found = target.findings({"ada": [1, 2]})
    assert (found["repeats"], found["lost"], found["broken"]) == (1, [], {"out_of_order_if_careless": 1})


def test_a_bad_record_is_never_held(target: Target) -> None:
    assert target.send("k1", record("ada", 1), record("bad", 2)) in (400, 422)
    assert target.held() == {}


def test_gone_it_refuses_connections_and_back_it_knows_what_it_took(target: Target) -> None:
    target.send("k1", record("ada", 1))

    target.behave({}, listens=False)
    with pytest.raises(httpx.ConnectError):
        target.send("k2", record("ada", 2))
    target.behave({"status_503": 1.0})
    assert target.send("k2", record("ada", 2)) == 503
    target.behave({})
    target.send("k2", record("ada", 2))
    target.send("k1", record("ada", 1))

    assert target.held() == {"ada": {"id": "ada", "revision": 2}}
    assert target.findings({"ada": [1, 2], "bob": [3]})["lost"] == [["bob", [3], None]]
    assert target.keeper.get("/faults").json() == {"status_503": 1}
