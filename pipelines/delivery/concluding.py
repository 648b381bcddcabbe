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
    reports: Sequence[DrainReport],
    *,
    configs: Mapping[str, TargetConfig],
    owed: Sequence[Owed],
    scope: frozenset[str],
    asked_by_sensor: bool = False,
) -> Conclusion:
    """Judge a run: it fails if a critical target is not caught up or a record was dead-lettered.

    *owed* is what the ledger says after the drains; *scope* the targets that were asked for. A target with
    `critical: false` only warns, and so does a drain that was asked to stop; one that its file pauses or disables is
    named and left in peace. One that another run is at, and that is not caught up yet, fails a person's run (which is
    to answer that very question) but not a sensor's: there it is the other run's to judge.
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
        told = _describe(by_target.get(name), state_of.get(name), config, asked_by_sensor=asked_by_sensor)
        lines.append(f"{name:<{width}}  {told.line}")
        (failures if config.critical else warnings).extend(f"{name}: {sentence}" for sentence in told.faults)
        warnings.extend(f"{name}: {sentence}" for sentence in told.remarks)
    return Conclusion(lines=lines, failures=failures, warnings=warnings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What there is to say of one target."""

    line: str
    faults: Sequence[str] = ()
    remarks: Sequence[str] = ()


def _describe(report: DrainReport | None, state: Owed | None, config: TargetConfig, *, asked_by_sensor: bool) -> _Told:
    if config.status != "active":
        return _Told(line=f"{config.status} in its file")
    has_work = state is not None and state.has_work
    if report is None or report.end == "held":
        if state is None or not has_work:
            return _Told(line="up to date")
        return _describe_untouched(state, asked_by_sensor=asked_by_sensor)
    faults: list[str] = []
    remarks: list[str] = []
    match report.end:
        case "caught_up":
            ending = "caught up"
        case "stopped":
            ending = f"stopped: {report.reason}"
            if has_work:
                remarks.append(f"not caught up, {ending}")
        case end:
            ending = f"{end}: {report.reason}"
            faults.append(f"not caught up, {ending}")
    dead = report.total("dead")
    if dead:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(report.refusals.items()))
        faults.append(f"{dead} dead-lettered ({reasons})")
    return _Told(line=f"{_numbers(report)}  {ending}", faults=faults, remarks=remarks)


def _describe_untouched(state: Owed, *, asked_by_sensor: bool) -> _Told:
    """Describe a target with work that this run had no drain for."""
    if state.held:
        line = "another run is delivering to it"
        return _Told(line=line, faults=[] if asked_by_sensor else [f"not caught up: {line}"])
    why = f"not caught up: {state.reason or 'it has work, and no drain took it up'}"
    return _Told(line=why, faults=[why])


def _numbers(report: DrainReport) -> str:
    parts = [f"{report.total('accepted')} delivered"]
    parts += [f"{count} {name}" for name in _LESSER_COUNTS if (count := report.total(name))]
    parts.append(f"{report.requests} requests")
    if report.retries:
        parts.append(f"{report.retries} retries")
    if report.total("accepted"):
        parts.append(f"{report.records_per_second:,.0f} records/s")
    return ", ".join(parts)
