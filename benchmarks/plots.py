"""Draw throughput against requests in flight, batch size and number of targets: `make bench-plots`.

It takes what `python -m benchmarks.throughput --json …` wrote and writes one SVG for each question. An SVG is text and
two dozen lines of arithmetic: no library is needed for it.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.throughput import FOLDER
from demo.processes import ROOT

IMAGES = ROOT / "docs" / "images"
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 50, 60
_COLOURS = ("#1b6ca8", "#c8553d", "#3f8f4f", "#7b5ea7")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One picture: what is on its horizontal axis, and where the measurements are."""

    name: str
    """Of the files: `<name>.json` in, `<name>.svg` out."""
    field: str
    """Of the workload."""
    axis: str


QUESTIONS: Sequence[Question] = (
    Question(name="by-in-flight", field="in_flight", axis="requests in flight, to each target"),
    Question(name="by-batch", field="batch", axis="records a request"),
    Question(name="by-targets", field="targets", axis="targets"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what there are measurements for; returns 1 if there are none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", type=Path, default=FOLDER, dest="source", help="the folder of the measurements")
    parser.add_argument("--to", type=Path, default=IMAGES, help="the folder of the pictures")
    chosen = parser.parse_args(arguments)
    measured = [one for one in QUESTIONS if (chosen.source / f"{one.name}.json").exists()]
    if not measured:
        print(f"There are no measurements in {chosen.source}: make bench-plots makes them.", file=sys.stderr)
        return 1
    chosen.to.mkdir(parents=True, exist_ok=True)
    for question in measured:
        found = json.loads((chosen.source / f"{question.name}.json").read_text())
        picture = chosen.to / f"{question.name}.svg"
        picture.write_text(chart(lines(found, question.field), x=question.axis, y="records/s"), encoding="utf-8")
        print(f"{picture} is drawn.")
    return 0


def lines(measured: Iterable[Mapping[str, Any]], field: str) -> list[Line]:
    """Return, for each latency, what was reached by *field*, and dashed what latency and requests in flight allow."""
    reached: dict[float, dict[float, float]] = {}
    allowed: dict[float, dict[float, float]] = {}
    for one in measured:
        work = one["workload"]
        latency = work["latency"]
        reached.setdefault(latency, {})[work[field]] = one["per_second"]
        if latency:
            most = work["targets"] * work["in_flight"] * work["batch"] / latency
            allowed.setdefault(latency, {})[work[field]] = most
    found = []
    for latency in sorted(reached):
        name = f"answered in {latency * 1000:g} ms" if latency else "answered at once"
        found.append(Line(label=name, points=sorted(reached[latency].items())))
        if latency in allowed:
            most = sorted(allowed[latency].items())
            found.append(Line(label=f"the most in {latency * 1000:g} ms", points=most, dashed=True))
    return found


def chart(drawn: Sequence[Line], *, x: str, y: str) -> str:
    """Return an SVG. The horizontal axis is logarithmic; a dashed line that leaves the picture is cut off."""
    values = sorted({value for line in drawn for value, _ in line.points})
    highest = _round_up(max(height for line in drawn if not line.dashed for _, height in line.points))
    low, high = math.log(values[0]), math.log(values[-1])

    def across(value: float) -> float:
        share = (math.log(value) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def down(height: float) -> float:
        return _HEIGHT - _BOTTOM - height / highest * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#333">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<clipPath id="inside"><rect x="{_LEFT}" y="{_TOP - 5}" width="{_WIDTH - _LEFT - _RIGHT + 5}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM + 5}"/></clipPath>',
    ]
    for step in range(6):
        height = highest * step / 5
        parts.append(_rule(_LEFT, down(height), _WIDTH - _RIGHT, down(height)))
        parts.append(_text(_LEFT - 8, down(height) + 4, f"{height:,.0f}", anchor="end"))
    parts += [_text(across(value), _HEIGHT - _BOTTOM + 18, f"{value:g}") for value in values]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, x))
    parts.append(_text(_LEFT - 8, _TOP - 14, y, anchor="end"))
    colours = cycle(_COLOURS)
    for number, line in enumerate(drawn):
        colour = "#999" if line.dashed else next(colours)
        places = [(across(value), down(height)) for value, height in line.points]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes} '
            'clip-path="url(#inside)"/>'
        )
        if not line.dashed:
            parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}"/>' for left, top in places]
        left = _LEFT + 10 + 190 * number
        parts.append(f'<path d="M{left} 14h24" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(_text(left + 30, 18, line.label, anchor="start"))
    return "\n".join([*parts, "</svg>\n"])


def _round_up(value: float) -> float:
    """Return the next larger number that divides into five steps that are easily read."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if step * power >= value)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1:.1f}" x2="{x2}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    sys.exit(main())
