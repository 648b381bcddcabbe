"""What happened to one key of one stream."""

from datetime import datetime
from typing import Literal, NamedTuple

Operation = Literal["insert", "update", "delete", "snapshot"]


class ChangeRecord(NamedTuple):
    """One row of `change_log`. A tuple, because a drain makes one for every change that it reads."""

    change_id: int
    stream: str
    key: str
    operation: Operation
    payload: bytes
    """The row as JSON text (UTF-8), byte for byte as Postgres wrote it; of a delete, the row as it was."""
    changed_at: datetime
    replays: int | None = None
    """The change that this one sends again, under the original's idempotency key."""
