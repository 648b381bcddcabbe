"""The asset checks of a reconciliation: `nothing_missing`, `nothing_stale`, `nothing_extra`, `conservation`."""

from collections.abc import Iterator

import dagster as dg

from pipelines.reconciliation.report import Verdict

_OF_A_STREAM = {
    "nothing_missing": "The target has every record that it should have, but for those on their way.",
    "nothing_stale": "What the target has is as it should be, in every field that is sent.",
    "nothing_extra": "The target has nothing that the source has not got.",
}


def stream_checks(asset: dg.AssetKey) -> Iterator[dg.AssetCheckSpec]:
    """Yield the checks of one stream's asset."""
    for name, description in _OF_A_STREAM.items():
        yield dg.AssetCheckSpec(name, asset=asset, description=description)


def conservation_check(asset: dg.AssetKey) -> dg.AssetCheckSpec:
    """Return the check of a target's own asset."""
    return dg.AssetCheckSpec(
        "conservation",
        asset=asset,
        description="captured = accepted + superseded + filtered + dead + claimed + pending",
    )


def result_of(verdict: Verdict, asset: dg.AssetKey, *, critical: bool) -> dg.AssetCheckResult:
    """Return what Dagster is told of *verdict*."""
    metadata: dict[str, dg.MetadataValue] = {
        "what to do": dg.MetadataValue.text(verdict.what_to_do),
        **{name: dg.MetadataValue.int(count) for name, count in verdict.numbers.items()},
    }
    if verdict.keys:
        metadata["sample keys"] = dg.MetadataValue.json(list(verdict.keys))
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=verdict.name,
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.ERROR if critical else dg.AssetCheckSeverity.WARN,
        description=verdict.sentence,
        metadata=metadata,
    )
