"""A request's name: the same whenever it is the same request, another whenever it is another."""

from functools import partial
from uuid import UUID

from pipelines.changes.record import ChangeRecord
from pipelines.delivery import idempotency
from pipelines_tests.fakes.ledger import LOG_ID

idempotency_key = partial(idempotency.idempotency_key, LOG_ID)


def change(change_id: int, *, replays: int | None = None, payload: bytes = b"{}", key: str = "k") -> ChangeRecord:
    return ChangeRecord(change_id, "customers", key, "update", payload, 0, replays)


def test_it_is_pinned_across_releases() -> None:
    """A release that named requests otherwise would make every target take its in-flight batches twice."""
    key = idempotency_key("crm", "v1", [change(1), change(2)])

    assert key == UUID("fdb84741-da08-51a7-a426-79fad599a475")
    assert key.version == 5


def test_it_depends_on_the_changes_alone_not_on_their_payloads() -> None:
    assert idempotency_key("crm", "v1", [change(1)]) == idempotency_key("crm", "v1", [change(1, payload=b'{"a":1}')])


def test_another_target_mapping_set_or_order_of_changes_is_another_key() -> None:
    keys = {
        idempotency_key("crm", "v1", [change(1), change(2)]),
        idempotency_key("email", "v1", [change(1), change(2)]),
        idempotency_key("crm", "v2", [change(1), change(2)]),
        idempotency_key("crm", "v1", [change(2), change(1)]),
        idempotency_key("crm", "v1", [change(1)]),
        idempotency_key("crm", "v1", [change(12)]),
    }

    assert len(keys) == 6


def test_a_replay_goes_under_its_originals_key() -> None:
    assert idempotency_key("crm", "v1", [change(99, replays=1)]) == idempotency_key("crm", "v1", [change(1)])


def test_ids_do_not_run_together() -> None:
    """1,23 and 12,3 are two requests."""
    first, second = [change(1), change(23)], [change(12), change(3)]

    assert idempotency_key("crm", "v1", first) != idempotency_key("crm", "v1", second)


def test_another_log_is_another_key() -> None:
    """In another database the same ids are other changes: a target that serves both must not take them for repeats."""
    other = UUID("11111111-1111-4111-8111-111111111111")

    assert idempotency.idempotency_key(other, "crm", "v1", [change(1)]) != idempotency_key("crm", "v1", [change(1)])
