"""The curves: what is drawn of memory and handles."""

from pathlib import Path

from soak.curve import sparkline
from soak.processes import Kind, Seen
from soak.watch import Watch


def seen(pid: int, kind: Kind, megabytes: int, handles: int) -> Seen:
    return Seen(pid=pid, kind=kind, resident=megabytes * 1_000_000, handles=handles, connected_to=())


def test_a_curve_goes_from_nought_to_its_highest() -> None:
    assert sparkline([0, 50, 100]) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"


def test_of_a_long_curve_no_peak_is_lost() -> None:
    values = [1.0] * 1000
    values[777] = 100.0

    drawn = sparkline(values, width=50)

    assert len(drawn) == 50
    assert drawn.count("█") == 1


def test_the_largest_drain_is_drawn_and_the_longest_lived_is_told_of() -> None:
    watch = Watch()
    for at in range(10):
        young = [seen(3, "drain", 150, 30)] if at == 9 else []
        watch.look(float(at), [seen(1, "daemon", 140, 5), seen(2, "drain", 100 + at, 20), *young])

    lines = "\n".join(watch.curves())

    assert "daemon, memory" in lines
    assert "up to 150 MB, at the end 150 MB" in lines
    assert "2 drains were seen; the longest-lived, of 9 s, went from 102 to 109 MB and from 20 to 20 handles." in lines


def test_samples_are_written_as_a_table(tmp_path: Path) -> None:
    watch = Watch()
    watch.look(1.0, [seen(1, "daemon", 140, 5)])

    watch.write(tmp_path / "samples.csv")

    head, row = (tmp_path / "samples.csv").read_text().splitlines()
    assert head.split(",")[:3] == ["at", "daemon_resident", "daemon_handles"]
    assert row.split(",")[:3] == ["1.0", "140000000", "5"]


def test_without_a_sample_there_is_nothing_to_draw() -> None:
    assert Watch().curves() == []
