"""A curve as a line of small bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*%#"


def spark(values: Sequence[float], width: int, *, unicode: bool = True) -> str:
    """Return values as at most `width` bars from their lowest to their highest.

    Neighbours are averaged where there are more values than bars; `?` stands for what is no
    number.
    """
    size = len(values) / width if len(values) > width else 1.0
    bars = min(len(values), width)
    parts = [values[round(i * size) : max(round((i + 1) * size), 1)] for i in range(bars)]
    means = [sum(part) / len(part) for part in parts if part]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return "?" * len(means)
    low, high = min(finite), max(finite)
    letters = BARS if unicode else PLAIN
    return "".join(_bar(value, low, high, letters) for value in means)


def _bar(value: float, low: float, high: float, letters: str) -> str:
    if not math.isfinite(value):
        return "?"
    place = (value - low) / (high - low) if high > low else 0.5
    return letters[min(int(place * len(letters)), len(letters) - 1)]
