"""A run in a few figures: how far it is, how well it does, how fast, and whether it is over."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.runs.curves import LOSS, RATE, VALIDATION, last, mean_throughput
from megacpp_nemo.runs.events import History, read_history
from megacpp_nemo.runs.folders import Run

# A run that says nothing for as long as this many of its intervals, and at least so many
# seconds, is taken to have stopped: a checkpoint or a validation takes its time.
QUIET_INTERVALS, QUIET_SECONDS = 10, 180.0


class End(Enum):
    """Whether a run is over, as its files tell: `RUNNING` is a guess from when it last wrote."""

    FINISHED = "finished"
    RUNNING = "running"
    STOPPED = "stopped"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a run; None where its files do not say.

    Args:
        path: Its folder.
        name: The folder's name.
        recipe: Name of its recipe; its pattern if no recipe has it.
        end: Whether it is over.
        step: Optimizer steps done.
        max_steps: Steps after which it is over.
        loss: Training loss at the last logged step, nats per token.
        validation_loss: At the last validation, nats per token.
        learning_rate: At the last logged step.
        tokens_per_second: Mean over the run, validation and checkpoints included.
        written: When it last wrote, in seconds since 1970.
        checkpoint: Step of its newest complete checkpoint.
        notes: What of its files could not be read.
    """

    path: str
    name: str
    recipe: str
    end: End
    step: int
    max_steps: int | None
    loss: float | None
    validation_loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    written: float | None
    checkpoint: int | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {**asdict(self), "end": self.end.value, "notes": list(self.notes)}


def summarized(run: Run, now: float | None = None) -> Summary:
    """Return the figures of a run; files that cannot be read are told in its notes."""
    try:
        return summary(run, read_history(run.events, run.start_step), now)
    except DataError as error:
        empty = History(curves={}, resumed=(), notes=(f"{error.what}: {error.given}",))
        return summary(run, empty, now, End.UNREADABLE)


def summary(
    run: Run, history: History, now: float | None = None, end: End | None = None
) -> Summary:
    """Return the figures of a run and its curves.

    Args:
        run: The run.
        history: Its curves.
        now: The present, in seconds since 1970; the clock's if not given.
        end: Whether it is over, where that is known.
    """
    step = max(history.last_step, run.checkpoint or 0)
    return Summary(
        path=str(run.folder),
        name=run.name,
        recipe=run.recipe,
        end=end or _end(run, history, step, time.time() if now is None else now),
        step=step,
        max_steps=run.max_steps,
        loss=last(history, LOSS),
        validation_loss=last(history, VALIDATION),
        learning_rate=last(history, RATE),
        tokens_per_second=mean_throughput(history, run.seq_length),
        written=history.last_time or _touched(run),
        checkpoint=run.checkpoint,
        notes=tuple(history.notes),
    )


def _end(run: Run, history: History, step: int, now: float) -> End:
    if run.max_steps is not None and step >= run.max_steps:
        return End.FINISHED
    times = [point.time for point in history.curves.get(LOSS, ())]
    gaps = [b - a for a, b in pairwise(times) if b > a]
    patience = max(QUIET_SECONDS, QUIET_INTERVALS * statistics.median(gaps) if gaps else 0.0)
    written = history.last_time or _touched(run) or 0.0
    return End.RUNNING if now - written < patience else End.STOPPED


def _touched(run: Run) -> float | None:
    """Return when the folder's files were last written, for a run without curves."""
    times = []
    for path in (*run.events, run.folder):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)
