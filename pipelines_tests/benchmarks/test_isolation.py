"""The isolation's benchmark, with next to no work: are the healthy served beside the sick, and is it told rightly?"""

from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks import isolation
from benchmarks.isolation import HEALTHY, Measured, Options, Recovery, Run
from soak import deployment


@pytest.mark.integration
def test_the_healthy_are_served_beside_the_sick(postgres_url: str, tmp_path: Path) -> None:
    options = Options(changes=60, delay=0.0, patience=0.2, folder=tmp_path, name=f"isolation_{uuid4().hex[:8]}")
    try:
        with isolation.stage(postgres_url, options, beside_sick=True) as stage:
            run = stage.run(1)
            sick = stage.states()
    finally:
        deployment.drop(postgres_url, options.name)

    assert run.beside_sick
    assert set(run.per_second) == set(HEALTHY)
    assert all(rate > 0 for rate in run.per_second.values())
    assert {name: (state.done, state.dead, state.failed_runs) for name, state in sick.items()} == dict.fromkeys(
        isolation.SICK, (0, 0, 1)
    )


def measured(*, beside: float, dead: int = 0) -> Measured:
    def run(number: int, rate: float, *, beside_sick: bool) -> Run:
        return Run(round=number, beside_sick=beside_sick, per_second={"steady_a": rate / 2, "steady_b": rate / 2})

    recovery = Recovery(target="gone", held_back=5.0, until_first=9.0, until_everything=12.0, delivered=60, dead=dead)
    return Measured(
        options=Options(changes=60),
        runs=[
            run(1, 1000, beside_sick=False),
            run(1, beside, beside_sick=True),
            run(2, 2 * beside, beside_sick=True),
            run(2, 2000, beside_sick=False),
            run(3, 1000, beside_sick=False),
            run(3, 10, beside_sick=True),
        ],
        recoveries=[recovery],
    )


def test_each_round_is_compared_with_itself_and_the_median_counts() -> None:
    """One round that the machine spoiled does not spoil the answer."""
    found = measured(beside=970)

    assert found.ratios == pytest.approx([0.97, 0.97, 0.01])
    assert found.ratio == pytest.approx(0.97)
    assert "0.970" in isolation.report(found)


def test_a_record_that_died_of_an_outage_is_told() -> None:
    assert measured(beside=970).all_delivered
    assert not measured(beside=970, dead=1).all_delivered
