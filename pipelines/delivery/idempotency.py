"""Name a request so that sending it twice is the same as sending it once."""

from collections.abc import Sequence
from uuid import UUID, uuid5

import msgspec

from pipelines.changes.record import ChangeRecord, original_ids


def idempotency_key(log_id: UUID, target: str, fingerprint: str, changes: Sequence[ChangeRecord]) -> UUID:
    """Return the key sent with *changes*: the same on every attempt and after every crash.

    It is a UUIDv5 (RFC 9562 §5.5), in the log's namespace, of the target, the mapping's *fingerprint* and the changes'
    ids, in order; a replayed change counts as its original. There is no attempt number and no run id in it, for a
    retry must not look like a new request. Another mapping is another key, so no target sees one key with two bodies.
    """
    ids = msgspec.json.encode(list(original_ids(changes)))[1:-1].decode()  # "1,2,3", in a tenth of the time of a join
    return uuid5(log_id, f"{target}:{fingerprint}:{ids}")
