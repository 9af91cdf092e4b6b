"""Numbers on their way into JSON."""

from __future__ import annotations

import math
from typing import Any


def finite(data: Any) -> Any:
    """Return plain data with None for what JSON has no number for: a diverged loss is NaN."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data
