"""The receiver of the throughput benchmark sees what is lost, repeated or out of order: its verdict is the proof."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.receiver import Target
from benchmarks.throughput import receiver


def verdict(*requests: tuple[bytes | None, str], ids: int = 2, versions: int = 2) -> dict[str, int]:
    """Examine *requests*: a key, and records written `id.version`."""
    target = Target()
    for key, records in requests:
        rows = [dict(zip(("id", "version"), map(int, record.split(".")), strict=True)) for record in records.split()]
        target.bodies.append((key, json.dumps(rows).encode()))
    found = target.verdict(ids=ids, versions=versions)
    return {name: value for name in found.__slots__ if (value := getattr(found, name))}


def test_everything_once_and_in_order_is_flawless() -> None:
    assert verdict((b"a", "1.1 2.1"), (b"b", "2.2 1.2")) == {"records": 4}


def test_what_never_came_is_missing_and_its_id_wrong_at_the_end() -> None:
    assert verdict((b"a", "1.1 2.1"), (b"b", "1.2")) == {"records": 3, "missing": 1, "wrong_at_the_end": 1}


def test_a_repeat_under_its_key_is_known_and_under_another_is_not() -> None:
    sent = [(b"a", "1.1 2.1"), (b"b", "1.2 2.2")]

    assert verdict(*sent, (b"b", "1.2 2.2")) == {"records": 4, "known_repeats": 2}
    assert verdict(*sent, (b"c", "1.2 2.2")) == {"records": 6, "repeats": 2}
    assert verdict((None, "1.1 2.1 1.2 2.2"), (None, "1.2")) == {"records": 5, "repeats": 1}


def test_an_older_version_after_a_newer_is_stale_though_a_repeat_may_set_it_right() -> None:
    assert verdict((b"a", "1.2 2.1 2.2"), (b"b", "1.1")) == {"records": 4, "stale": 1, "wrong_at_the_end": 1}
    assert verdict((b"a", "1.2 2.1 2.2"), (b"b", "1.1"), (b"c", "1.2")) == {"records": 5, "stale": 1, "repeats": 1}


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[httpx.Client]:
    with receiver(tmp_path, refuse=3, lose_answer=4) as url, httpx.Client(base_url=url, timeout=5) as client:
        yield client


def test_it_refuses_and_loses_answers_as_it_is_told(faulty: httpx.Client) -> None:
    for path in ("/one/orders", "/two/orders"):
        assert faulty.post(path, json=[{"id": 1, "version": 1}]).status_code == 200
    assert faulty.post("/one/orders", json=[{"id": 2, "version": 1}]).status_code == 503
    with pytest.raises(httpx.RemoteProtocolError):
        faulty.post("/two/orders", json=[{"id": 2, "version": 1}])

    seen = faulty.get("/seen").json()["targets"]
    found = faulty.get("/verdict", params={"ids": 2, "versions": 1}).json()

    assert {name: (one["requests"], one["refused"]) for name, one in seen.items()} == {"one": (1, 1), "two": (2, 0)}
    assert (found["one"]["missing"], found["two"]["missing"]) == (1, 0)


def test_what_hangs_is_applied_and_never_answered(tmp_path: Path) -> None:
    with receiver(tmp_path, hang=1) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/one/orders", json=[{"id": 1, "version": 1}], timeout=0.2)

        found = httpx.get(f"{url}/verdict", params={"ids": 1, "versions": 1}).json()

    assert (found["one"]["records"], found["one"]["missing"]) == (1, 0)


def test_a_request_that_comes_in_pieces_is_one(faulty: httpx.Client) -> None:
    records = [{"id": number, "version": 1, "note": "x" * 100_000} for number in range(1, 6)]

    faulty.post("/one/orders", json=records).raise_for_status()

    found = faulty.get("/verdict", params={"ids": 5, "versions": 1}).json()
    assert found["one"] == dict.fromkeys(found["one"], 0) | {"records": 5}
