"""What a run is, in a file of its folder from its first step on.

Written where training starts, read without torch. The checkpoints of a run say more, and come
later.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

FILE_NAME = "run.json"
SCHEMA = 1
# Beyond any number that a run has.
MOST = 2**63


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What is needed to name a run and to read its curves.

    Args:
        pattern: Layer pattern, as in `AEMEAEMEAEMR`.
        num_layers: Layers that it is tiled to.
        hidden_size: Model width.
        seq_length: Tokens of a sample.
        global_batch_size: Samples of an optimizer step.
        max_steps: Optimizer steps after which the run is over; -1 for no end.
        processes: Ranks.
        start_step: Step at which this process took the run up.
        started: When it did, in seconds since 1970.
    """

    pattern: str
    num_layers: int
    hidden_size: int
    seq_length: int
    global_batch_size: int
    max_steps: int
    processes: int
    start_step: int
    started: float

    def write(self, folder: Path) -> None:
        """Write the card into a run's folder.

        Raises:
            OSError: If that cannot be written.
        """
        data = {"schema": SCHEMA, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_card(folder: Path) -> RunCard | None:
    """Return the card in a run's folder, or None if it has none that can be read."""
    try:
        data = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            return None
        card = RunCard(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    kinds = get_type_hints(RunCard)
    return card if all(_is(kind, getattr(card, name)) for name, kind in kinds.items()) else None


def _is(kind: type, value: object) -> bool:
    """Return whether a value read from a file is one of its field."""
    if kind is str:
        return isinstance(value, str)
    numbers = (int, float) if kind is float else (int,)
    return isinstance(value, numbers) and not isinstance(value, bool) and abs(value) < MOST
