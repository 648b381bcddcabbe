"""What a drain does must be the same whether its lanes' requests go by a multiplexer or not."""

import pytest

from pipelines_tests.fakes.target import ScriptedTarget


@pytest.fixture(params=[False, True], ids=["lane by lane", "multiplexed"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a test run with and without a multiplexer."""
    monkeypatch.setattr(ScriptedTarget, "multiplexed", request.param)
