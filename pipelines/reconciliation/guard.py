"""Whether a list is believed, and what it calls for repaired. A list that was cut short must cost nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipelines.delivery.reading import ReconcileConfig, Repair

Repaired = Literal["missing", "stale", "extra"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be repaired, and what a person who launched the run has vouched for."""

    repair: Repair
    delete_extra: bool
    max_repair_fraction: float
    min_listed_fraction: float
    trust_listing: bool = False
    """The list is as short as it seems: a person says so."""
    dry_run: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)
    """What the route could not put right, and why."""

    @classmethod
    def of(
        cls,
        settings: ReconcileConfig,
        *,
        repair: Repair | None = None,
        delete_extra: bool | None = None,
        max_repair_fraction: float | None = None,
        trust_listing: bool = False,
        dry_run: bool = False,
        cannot: Mapping[str, str] | None = None,
    ) -> "Limits":
        """Return the route's limits, with what a run sets in their place."""
        return cls(
            repair=settings.repair if repair is None else repair,
            delete_extra=settings.delete_extra if delete_extra is None else delete_extra,
            max_repair_fraction=settings.max_repair_fraction if max_repair_fraction is None else max_repair_fraction,
            min_listed_fraction=settings.min_listed_fraction,
            trust_listing=trust_listing,
            dry_run=dry_run,
            cannot=cannot or {},
        )

    @property
    def kinds(self) -> tuple[Repaired, ...]:
        """What is repaired, if the guard has nothing against it."""
        chosen: dict[Repair, tuple[Repaired, ...]] = {
            "off": (),
            "missing": ("missing",),
            "stale": ("stale",),
            "all": ("missing", "stale"),
        }
        deletes: tuple[Repaired, ...] = ("extra",) if self.delete_extra and self.repair == "all" else ()
        return tuple(kind for kind in chosen[self.repair] + deletes if kind not in self.cannot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What is decided."""

    believed: bool
    """The list is whole, as far as one can tell."""
    kinds: tuple[Repaired, ...] = ()
    """What is repaired now."""
    would: dict[Repaired, int] = field(default_factory=dict)
    """How many records of each kind are to be repaired, whether they are now or not."""
    refused: str | None = None
    """Why nothing is."""
    cannot: Mapping[str, str] = field(default_factory=dict)
    """What the route could not put right, and why."""


def guard(
    limits: Limits,
    *,
    source: int,
    listed: int,
    owed: int,
    missing: int,
    stale: int,
    extra: int,
    confirmed: bool,
    refuted: bool = False,
) -> Guard:
    """Decide. *source* and *listed* are how many records there are; *owed*, how many of the source's should be listed;
    *confirmed*, if the target's own total agrees, or records that are not listed are not there; *refuted*, if some are.
    """
    believed = not refuted and (
        confirmed or limits.trust_listing or _is_long_enough(owed - missing, owed, limits.min_listed_fraction)
    )
    found: dict[Repaired, int] = {"missing": missing, "stale": stale, "extra": extra}
    would = {kind: found[kind] for kind in limits.kinds if found[kind]}
    count = sum(would.values())
    if not count:
        return Guard(believed=believed, cannot=limits.cannot)
    if not believed:
        return Guard(
            believed=False,
            would=would,
            cannot=limits.cannot,
            refused=f"the list lacks {missing:,} of {owed:,} records and is not believed, so nothing is repaired",
        )
    records = max(source, listed)
    # Of ten records one is more than a twentieth, and may be repaired all the same; but 0 is none.
    most = max(int(limits.max_repair_fraction * records), 1 if limits.max_repair_fraction > 0 else 0)
    if count > most:
        return Guard(
            believed=True,
            would=would,
            cannot=limits.cannot,
            refused=f"{count:,} of {records:,} records would be repaired, more than max_repair_fraction "
            f"({limits.max_repair_fraction:g}) allows ({most:,}), so none is; if that is right, launch this again with "
            "a higher max_repair_fraction",
        )
    if limits.dry_run:
        return Guard(believed=True, would=would, cannot=limits.cannot, refused="dry_run: nothing is repaired")
    return Guard(believed=True, would=would, cannot=limits.cannot, kinds=tuple(would))


def _is_long_enough(held: int, owed: int, fraction: float) -> bool:
    # Of three records one is more than a fifth, and may be missing all the same; but an empty list tells nothing.
    return held >= fraction * owed or (held == owed - 1 > 0 and fraction < 1)
