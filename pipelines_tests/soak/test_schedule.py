"""The soak's plan: every target gets well in time, and what is to be killed is killed often enough."""

import pytest

from pipelines_tests.fakes.faulty_api import FaultyApi
from soak.schedule import OutageTooLong, blows, misbehaviours
from soak.world import ROUTES


@pytest.mark.parametrize("seconds", [10.0, 60.0, 600.0])
def test_in_the_end_every_target_is_well(seconds: float) -> None:
    last = {change.target: change for change in misbehaviours(seconds)}

    assert set(last) <= set(ROUTES)
    for change in last.values():
        assert (change.what, change.chance, change.listens) == ("", {}, True)
        assert change.at <= seconds


def test_changes_of_behaviour_come_in_order_and_a_target_has_one_trouble_at_a_time() -> None:
    changes = misbehaviours(600)

    assert [change.at for change in changes] == sorted(change.at for change in changes)
    for target in ROUTES:
        moods = [bool(change.what) for change in changes if change.target == target]
        assert moods == [True, False] * (len(moods) // 2)


def test_every_trouble_is_one_that_a_target_can_have() -> None:
    with FaultyApi() as api:
        for change in misbehaviours(600):
            api.misbehave(change.chance)  # refuses faults that there are not, and chances of more than 1


def test_an_outage_is_as_long_as_asked_for() -> None:
    down, well = [change for change in misbehaviours(720, outage=600) if change.target == "away"]

    assert (down.listens, well.listens) == (False, True)
    assert well.at - down.at == pytest.approx(600)


def test_an_outage_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OutageTooLong, match="600 s does not fit into 650 s"):
        misbehaviours(650, outage=600)


def test_a_short_soak_has_six_blows_and_a_long_one_each_kind_at_least_twice() -> None:
    assert len(blows(60)) == 6
    attacks = [blow.attack for blow in blows(600)]
    assert all(attacks.count(attack) >= 2 for attack in attacks)
    assert all(0 < blow.at < 600 for blow in blows(600))
