"""Say in words how a run's deliveries ended, and whether that is a failure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.delivery.config import TargetConfig
from pipelines.delivery.ledger import Owed
from pipelines.delivery.report import DrainReport

_LESSER_COUNTS: Sequence[Literal["superseded", "filtered", "dead"]] = ("superseded", "filtered", "dead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """One line per target, and the sentences that fail the run or only warn."""

    lines: Sequence[str]
    failures: Sequence[str]
    warnings: Sequence[str]


def conclude(
    reports: Sequence[DrainReport], *, configs: Mapping[str, TargetConfig], owed: Sequence[Owed], scope: frozenset[str]
) -> Conclusion:
    """Judge a run: it fails if a critical target is not caught up or a record was dead-lettered.

    *owed* is what the ledger says after the drains; *scope* the targets that were asked for. A target with
    `critical: false` only warns; one that its file pauses or disables is named and left in peace.
    """
    by_target = {report.target: report for report in reports}
    state_of = {state.target: state for state in owed}
    lines: list[str] = []
    failures: list[str] = []
    warnings: list[str] = []
    width = max((len(name) for name in configs), default=0)
    for name, config in configs.items():
        if name not in scope:
            continue
        text, trouble = _describe(by_target.get(name), state_of.get(name), config)
        lines.append(f"{name:<{width}}  {text}")
        for sentence in trouble:
            (failures if config.critical else warnings).append(f"{name}: {sentence}")
    return Conclusion(lines=lines, failures=failures, warnings=warnings)


def _describe(report: DrainReport | None, state: Owed | None, config: TargetConfig) -> tuple[str, list[str]]:
    if config.status != "active":
        return f"{config.status} in its file", []
    if report is None:
        if state is None or not state.has_work:
            return "up to date", []
        if state.held:
            return "another run is delivering to it", []
        why = f"not caught up: {state.reason or 'it has work, and no drain took it up'}"
        return why, [why]
    trouble: list[str] = []
    match report.end:
        case "caught_up":
            ending = "caught up"
        case "held":
            if state is not None and state.has_work:
                ending = "another run holds it, and it is not caught up yet"
                trouble.append(ending)
            else:
                ending = "caught up by another run"
        case "deferred":
            ending = f"deferred: {report.reason}"
            trouble.append(f"not caught up, {ending}")
        case "paused":
            ending = f"paused: {report.reason}"
            trouble.append(f"not caught up, {ending}")
        case "stopped":
            ending = f"stopped: {report.reason}"
            if state is not None and state.has_work:
                trouble.append(f"not caught up, {ending}")
    dead = report.total("dead")
    if dead:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(report.refusals.items()))
        trouble.append(f"{dead} dead-lettered ({reasons})")
    return f"{_numbers(report)}  {ending}", trouble


def _numbers(report: DrainReport) -> str:
    parts = [f"{report.total('accepted')} delivered"]
    parts += [f"{count} {name}" for name in _LESSER_COUNTS if (count := report.total(name))]
    parts.append(f"{report.requests} requests")
    if report.retries:
        parts.append(f"{report.retries} retries")
    if report.total("accepted"):
        parts.append(f"{report.records_per_second:,.0f} records/s")
    return ", ".join(parts)
