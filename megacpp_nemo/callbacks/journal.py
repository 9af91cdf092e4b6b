"""The journal of a run's levers: one JSON line per event, in the run's folder.

A line is an action (what was done to which matrices, and what it measured), a report (what was
measured and left alone), a start or the loss of a step. A run that resumes says so, and what an
earlier attempt wrote beyond that step no longer counts (`contract.journal.read_journal`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.journal import FILE_NAME, SCHEMA


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing that a lever did or measured.

    Args:
        lever: `fire`, `dash`, `shrink`, `redo` or `stp`.
        step: Optimizer steps taken before it.
        cause: `step`, `data`, `context` or `python`; `report` if nothing was changed.
        matrices: What was measured of each matrix or MLP, by its name and the quantity's.
        totals: What was measured over all of them, by quantity.
        seconds: Wall-clock seconds it took.
        bytes: Size of the parameters that it changed, over the whole model.
    """

    lever: str
    step: int
    cause: str = "step"
    matrices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0


class Journal:
    """Writes the events of one run.

    Args:
        folder: The run's folder; None to write nothing, on every rank but one.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / FILE_NAME

    def start(self, step: int, levers: Mapping[str, Any]) -> None:
        """Note that training starts, or resumes, at a step."""
        self._append({"event": "start", "schema": SCHEMA, "step": step, "levers": levers})

    def action(self, action: Action) -> None:
        """Note what a lever did or measured."""
        event = "report" if action.cause == "report" else "action"
        self._append({"event": event, **asdict(action)})

    def curves(self, step: int, values: Mapping[str, float]) -> None:
        """Note values of one step, such as the loss."""
        self._append({"event": "curves", "step": step, "values": dict(values)})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line)) + "\n")


# Quantities of matrices that add up; all others are averaged.
COUNTED = ("rows", "shrunk", "units", "dormant", "recycled", "unseen")


def merged(action: Action, *, seconds: float | None = None) -> Action:
    """Return an action as all ranks together did it; collective over them.

    Each rank brings what it reports; totals are sums of counts and means of everything else.

    Args:
        action: This rank's part.
        seconds: What it took, if not as the action says.
    """
    import torch  # reading a journal needs none of it

    parts: list[Any] = [(dict(action.matrices), action.bytes)]
    if torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (dict(action.matrices), action.bytes))
    matrices = {name: values for own, _ in parts for name, values in sorted(own.items())}
    return replace(
        action,
        matrices=matrices,
        totals=_totals(matrices) if matrices else action.totals,
        seconds=action.seconds if seconds is None else seconds,
        bytes=sum(size for _, size in parts),
    )


def _totals(matrices: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    held: dict[str, list[float]] = {}
    for values in matrices.values():
        for name, value in values.items():
            held.setdefault(name, []).append(value)
    totals = {
        name: sum(values) if name in COUNTED else sum(values) / len(values)
        for name, values in held.items()
    }
    return {"matrices": len(matrices), **totals}


def _finite(value: Any) -> Any:
    """Return a value with what JSON has no word for as text."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
