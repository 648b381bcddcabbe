"""What the UI shows of each route, and that no run computes it."""

from datetime import UTC, datetime

import dagster as dg

from pipelines.operating.assets import DAYS, sync_assets
from pipelines_tests.fakes.catalog import target_config


def test_each_route_is_an_asset_named_for_its_target_and_stream():
    configs = [target_config("crm", streams=["people", "pets"]), target_config("email")]

    keys = [asset.key.path for asset in sync_assets(configs)]

    assert keys == [["crm", "people"], ["crm", "pets"], ["email", "people"]]


def test_an_asset_tells_what_its_targets_file_says():
    (asset,) = sync_assets([target_config("crm", status="paused", critical=False)])

    spec = asset.get_asset_spec()
    assert (spec.description or "").startswith("What crm (https://crm.example) was given of people, in mode state.")
    assert spec.metadata["mode"] == "state"
    assert spec.metadata["status"] == "paused"
    assert spec.metadata["critical"] is False
    assert spec.group_name == "crm"


def test_a_range_of_days_is_sent_again_by_one_run():
    (asset,) = sync_assets([target_config("crm")])

    assert asset.backfill_policy == dg.BackfillPolicy.single_run()


def test_the_calendar_has_today():
    """Its days are those of UTC, as in a drain's report; a change shows on the day on which it was made."""
    before = datetime.now(UTC).date().isoformat()
    last = DAYS.get_last_partition_key()

    assert last in (before, datetime.now(UTC).date().isoformat())  # midnight may have come between
    assert DAYS.timezone == "UTC"
