"""The receiver's one promise: it knows what came once, what came again, and what a key was misused for."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo.receiver import PAGE_SIZE, Inbox, make_server


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[httpx.Client]:
    server = make_server(0, Inbox(tmp_path / "inbox.db"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as client:
        yield client
    server.shutdown()
    server.server_close()
    thread.join()


def post(client: httpx.Client, ids: list[int], *, key: str) -> int:
    events = [{"event_id": id_, "row": {"n": id_}} for id_ in ids]
    return client.post("/events", json=events, headers={"Idempotency-Key": key}).status_code


def test_events_are_read_back_as_they_came(receiver: httpx.Client) -> None:
    assert post(receiver, [2, 1], key="a") == 200
    assert post(receiver, [3], key="b") == 200

    page = receiver.get("/events").json()
    assert [event["event_id"] for event in page["events"]] == [2, 1, 3]
    assert page["next"] is None


def test_a_request_that_comes_again_is_counted_and_not_taken_again(receiver: httpx.Client) -> None:
    assert [post(receiver, [1, 2], key="a") for _ in range(3)] == [200, 200, 200]

    assert receiver.get("/summary").json() == {
        "requests": 3,
        "repeated_requests": 2,
        "keys_with_another_body": 0,
        "events": 2,
        "repeated_events": 0,
    }


def test_an_event_that_comes_again_under_another_key_is_taken_and_shows(receiver: httpx.Client) -> None:
    post(receiver, [1, 2], key="a")
    post(receiver, [2, 3], key="b")

    summary = receiver.get("/summary").json()
    assert (summary["events"], summary["repeated_events"]) == (4, 1)


def test_a_key_that_comes_with_another_body_is_refused(receiver: httpx.Client) -> None:
    post(receiver, [1], key="a")

    assert post(receiver, [2], key="a") == 422
    summary = receiver.get("/summary").json()
    assert (summary["keys_with_another_body"], summary["events"]) == (1, 1)


@pytest.mark.parametrize("body", ["", "{}{", '{"event_id": 1}', '[{"id": 1}]', "[1]", '[{"event_id": null}]'])
def test_what_is_not_a_list_of_events_is_refused(receiver: httpx.Client, body: str) -> None:
    answer = receiver.post("/events", content=body, headers={"Idempotency-Key": "a"})

    assert answer.status_code == 400
    assert receiver.get("/summary").json()["events"] == 0


def test_a_request_without_a_key_is_refused(receiver: httpx.Client) -> None:
    assert receiver.post("/events", content="[]").status_code == 400


def test_events_come_a_page_at_a_time(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox.db")
    inbox.take("a", json.dumps([{"event_id": id_} for id_ in range(PAGE_SIZE + 1)]).encode())

    first = inbox.events(0)
    assert len(first["events"]) == PAGE_SIZE
    assert [event["event_id"] for event in inbox.events(first["next"])["events"]] == [PAGE_SIZE]
