"""Keep account of the memory and the handles of daemon, code server and drains while the soak goes on."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from soak.curve import sparkline
from soak.processes import Seen

_MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the processes had at one moment; memory in bytes."""

    at: float
    daemon_resident: int
    daemon_handles: int
    code_server_resident: int
    code_server_handles: int
    runs: int
    drains: int
    largest_drain_resident: int
    largest_drain_handles: int


@dataclass(slots=True, kw_only=True)
class Life:
    """One drain's process, from the first look at it to the last."""

    first_at: float
    last_at: float
    resident: list[int]
    handles: list[int]


@dataclass(slots=True)
class Watch:
    """Every sample, and every drain's life."""

    samples: list[Sample] = field(default_factory=list)
    lives: dict[int, Life] = field(default_factory=dict)

    def look(self, at: float, seen: Sequence[Seen]) -> None:
        """Take a sample at *at* seconds."""
        drains = [one for one in seen if one.kind == "drain"]

        def total(kind: str, of: Callable[[Seen], int]) -> int:
            return sum(of(one) for one in seen if one.kind == kind)

        self.samples.append(
            Sample(
                at=round(at, 1),
                daemon_resident=total("daemon", lambda one: one.resident),
                daemon_handles=total("daemon", lambda one: one.handles),
                code_server_resident=total("code server", lambda one: one.resident),
                code_server_handles=total("code server", lambda one: one.handles),
                runs=total("run", lambda _: 1),
                drains=len(drains),
                largest_drain_resident=max((one.resident for one in drains), default=0),
                largest_drain_handles=max((one.handles for one in drains), default=0),
            )
        )
        for one in drains:
            life = self.lives.setdefault(one.pid, Life(first_at=at, last_at=at, resident=[], handles=[]))
            life.last_at = at
            life.resident.append(one.resident)
            life.handles.append(one.handles)

    def write(self, path: Path) -> None:
        """Write the samples as CSV."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [one.name for one in fields(Sample)])
            writer.writeheader()
            writer.writerows(asdict(sample) for sample in self.samples)

    def curves(self) -> Sequence[str]:
        """Return a line for each curve, from nought to its highest, and what became of the longest-lived drain."""

        def curve(name: str, values: Sequence[float], unit: str) -> str:
            highest = f"up to {max(values):,.0f}{unit}, at the end {values[-1]:,.0f}{unit}"
            return f"{name:<22} {sparkline(values)} {highest}"

        if not self.samples:
            return []
        lines = []
        for who, label in (("daemon", "daemon"), ("code_server", "code server"), ("largest_drain", "largest drain")):
            memory = [getattr(sample, f"{who}_resident") / _MEGABYTE for sample in self.samples]
            lines.append(curve(f"{label}, memory", memory, " MB"))
            lines.append(curve(f"{label}, handles", [getattr(one, f"{who}_handles") for one in self.samples], ""))
        lines.append(curve("drains", [sample.drains for sample in self.samples], ""))
        if self.lives:
            oldest = max(self.lives.values(), key=lambda life: life.last_at - life.first_at)
            # The first looks see it start.
            settled = min(2, len(oldest.resident) - 1)
            lines.append(
                f"{len(self.lives)} drains were seen; the longest-lived, of {oldest.last_at - oldest.first_at:.0f} s, "
                f"went from {oldest.resident[settled] / _MEGABYTE:.0f} to {oldest.resident[-1] / _MEGABYTE:.0f} MB "
                f"and from {oldest.handles[settled]} to {oldest.handles[-1]} handles."
            )
        return lines
