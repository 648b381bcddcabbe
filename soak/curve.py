"""Draw numbers over time in one line of text."""

from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], *, width: int = 60) -> str:
    """Return *values* as bars from nought to the highest; of more than *width* each bar is the highest of several."""
    if not values:
        return ""
    bars = min(width, len(values))
    groups = [values[len(values) * i // bars : len(values) * (i + 1) // bars] for i in range(bars)]
    highest = max(values) or 1.0
    return "".join(_BARS[min(7, int(8 * max(group) / highest))] for group in groups)
