"""Which targets should a run deliver to now? Pure: the ledger's answer and the unfinished runs in, names out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.delivery.ledger import Owed


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The targets to launch a run for, and why the others with work are left out."""

    targets: Sequence[str]
    left_out: Mapping[str, str]


def choose_targets(
    owed: Sequence[Owed],
    *,
    on_their_way: frozenset[str] = frozenset(),
    impatient: bool = False,
    insist_on: frozenset[str] = frozenset(),
) -> Choice:
    """Choose the targets that have work and nobody at it, and whose time has come.

    *on_their_way* are those that a run which has not reached them yet will deliver to. A person's run is *impatient*:
    it does not wait for a held-back target's time; and those it names (*insist_on*) it tries even if they are disabled.
    """
    chosen: list[str] = []
    left_out: dict[str, str] = {}
    for target in owed:
        if not target.has_work:
            continue
        if target.held:
            left_out[target.target] = "a drain is at it"
        elif target.target in on_their_way:
            left_out[target.target] = "a run is on its way"
        elif target.target in insist_on:
            chosen.append(target.target)
        elif target.status == "disabled":
            left_out[target.target] = f"disabled: {target.reason}"
        elif target.waiting and not impatient:
            left_out[target.target] = f"held back: {target.reason}"
        else:
            chosen.append(target.target)
    return Choice(targets=chosen, left_out=left_out)
