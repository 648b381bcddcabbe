"""The pictures show what was measured: each point is where its numbers say."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plots
from benchmarks.plots import Line
from benchmarks.throughput import Measured, as_json
from benchmarks.workload import Workload

SVG = "{http://www.w3.org/2000/svg}"


def measured(seconds: float, **work: float) -> dict[str, object]:
    found = Measured(
        sender="one",
        workload=Workload(changes=1000, **work),  # type: ignore[arg-type]
        seconds=seconds,
        sending_seconds=seconds,
        sender_cpu=1.0,
        database_cpu=1.0,
        receiver_cpu=1.0,
        peak_bytes=1,
        verdicts={},
    )
    return json.loads(json.dumps(as_json(found)))  # type: ignore[no-any-return]


def points(picture: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(picture).iter(f"{SVG}polyline")
    return [[tuple(map(float, place.split(","))) for place in one.attrib["points"].split()] for one in found]  # type: ignore[misc]


def test_each_latency_has_a_line_and_what_it_allows_another() -> None:
    numbers = [
        measured(2, targets=1, in_flight=2, latency=0.1),
        measured(4, targets=1, in_flight=1, latency=0.1),
        measured(1, targets=1, in_flight=1),
    ]

    found = plots.lines(numbers, "in_flight")

    assert [(one.points, one.dashed) for one in found] == [
        ([(1, 1000)], False),
        ([(1, 250), (2, 500)], False),
        ([(1, 1000), (2, 2000)], True),
    ]


def test_a_point_is_where_its_numbers_say() -> None:
    picture = plots.chart([Line(label="a < b", points=[(1, 0), (10, 50), (100, 100)])], x="across", y="up")

    (places,) = points(picture)
    (left, bottom), (middle, half), (right, top) = places
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert half == pytest.approx((bottom + top) / 2, abs=0.1)
    assert bottom > top
    assert {"a < b", "across", "up", "1", "10", "100", "0", "20", "80"} <= {
        text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")
    }


@pytest.mark.parametrize(("value", "top"), [(99, 100), (100, 100), (101, 150), (183_000, 200_000), (7, 7.5)])
def test_the_axis_ends_at_a_number_that_is_easily_read(value: float, top: float) -> None:
    picture = plots.chart([Line(label="one", points=[(1, value)])], x="", y="")

    assert f"{top:,.0f}" in [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_there_is_a_picture_for_each_question_that_was_measured(tmp_path: Path) -> None:
    assert plots.main(["--from", str(tmp_path), "--to", str(tmp_path / "images")]) == 1
    (tmp_path / "by-batch.json").write_text(json.dumps([measured(1, batch=10), measured(2, batch=100)]))

    assert plots.main(["--from", str(tmp_path), "--to", str(tmp_path / "images")]) == 0

    (picture,) = (tmp_path / "images").iterdir()
    assert picture.name == "by-batch.svg"
    assert len(points(picture.read_text())) == 1
