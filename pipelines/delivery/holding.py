"""Keys whose later changes must wait, because an earlier one is undecided or dead: what keeps a key in order.

A key is *held* while a change of it was given up on and may still be accepted: later ones stay claimed with it. It is
*blocked* once a change of it is dead on a route with `on_dead: block`: later ones become dead letters too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

from pipelines.changes.record import ChangeRecord, keys, streams

Key = tuple[str, str]
"""Stream and key."""


def key_of(change: ChangeRecord) -> Key:
    """Return what *change*'s order is kept by."""
    return change.stream, change.key


@dataclass(slots=True)
class _Block:
    change_id: int
    last_batch: int | None = None
    """The last batch that was claimed before the ledger knew of the dead change; None while it does not know."""


class KeyHolds:
    """One drain's held and blocked keys, shared by its lanes. Thread-safe.

    The ledger keeps the blocks that were written down, and the loop asks it before it claims. What is kept here covers
    the batches that were claimed before: so a redrive, which lifts a block in the ledger, is not stopped by this.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._held: set[Key] = set()
        self._blocks: dict[Key, _Block] = {}

    def hold(self, changes: Iterable[ChangeRecord]) -> None:
        """Let later changes of these keys wait."""
        with self._lock:
            self._held.update(map(key_of, changes))

    def release_all(self) -> None:
        """Let go of the held keys: their undecided changes are about to be sent again, in order."""
        with self._lock:
            self._held.clear()

    def block(self, change: ChangeRecord) -> None:
        """Note that *change* is dead and later ones of its key are to follow it."""
        with self._lock:
            self._blocks[key_of(change)] = _Block(change.change_id)

    def written_down(self, changes: Iterable[ChangeRecord], *, last_batch: int) -> None:
        """Note that the ledger knows now that *changes* are dead; *last_batch* is the last that was claimed before."""
        with self._lock:
            for change in changes:
                block = self._blocks.get(key_of(change))
                if block is not None and block.change_id == change.change_id:
                    block.last_batch = last_batch

    @property
    def blocks_unwritten(self) -> bool:
        """Whether some key is blocked by a dead change that the ledger does not know of yet."""
        with self._lock:
            return any(block.last_batch is None for block in self._blocks.values())

    @property
    def empty(self) -> bool:
        """Whether nothing waits: what is nearly always so."""
        return not self._held and not self._blocks

    def concern(self, changes: Sequence[ChangeRecord]) -> bool:
        """Say whether one of *changes* may have to wait, or not to be sent."""
        with self._lock:
            if self.empty:
                return False
            theirs = set(zip(streams(changes), keys(changes), strict=True))
            return not (theirs.isdisjoint(self._held) and theirs.isdisjoint(self._blocks))

    def is_held(self, change: ChangeRecord) -> bool:
        """Say whether *change* must stay claimed."""
        with self._lock:
            return key_of(change) in self._held

    def blocked_by(self, change: ChangeRecord, *, batch_id: int) -> int | None:
        """Return the dead change that *change*, a member of the batch, is blocked by."""
        with self._lock:
            block = self._blocks.get(key_of(change))
            if block is None or block.change_id >= change.change_id:
                return None
            if block.last_batch is not None and batch_id > block.last_batch:
                del self._blocks[key_of(change)]  # from here on the ledger says what is blocked
                return None
            return block.change_id
