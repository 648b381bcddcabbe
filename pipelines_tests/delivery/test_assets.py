"""What the UI shows of each route, and that no run computes it."""

from datetime import UTC, datetime

import dagster as dg

from pipelines.delivery.assets import DAYS, sync_assets
from pipelines_tests.fakes.catalog import target_config


def test_each_route_is_an_asset_named_for_its_target_and_stream():
    configs = [target_config("crm", streams=["people", "pets"]), target_config("email")]

    keys = [asset.key.path for asset in sync_assets(configs)]

    assert keys == [["crm", "people"], ["crm", "pets"], ["email", "people"]]


def test_an_asset_tells_what_its_targets_file_says():
    (asset,) = sync_assets([target_config("crm", status="paused", critical=False)])

    assert asset.description == "What crm (https://crm.example) was given of people, in mode state."
    assert asset.metadata["mode"] == "state"
    assert asset.metadata["status"] == "paused"
    assert asset.metadata["critical"] is False
    assert asset.group_name == "crm"


def test_no_run_can_be_asked_to_compute_one():
    """Deliveries report them; a materialization that sent nothing would be a lie."""
    definitions = dg.Definitions(assets=sync_assets([target_config("crm")]))

    assert not definitions.resolve_asset_graph().executable_asset_keys


def test_the_calendar_has_today():
    """Its days are those of UTC, as in a drain's report; a change shows on the day on which it was made."""
    before = datetime.now(UTC).date().isoformat()
    last = DAYS.get_last_partition_key()

    assert last in (before, datetime.now(UTC).date().isoformat())  # midnight may have come between
    assert DAYS.timezone == "UTC"
