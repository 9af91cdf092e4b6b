"""Run folders as training leaves them, their TensorBoard files written record by record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megacpp_nemo.contract.run_card import RunCard

SECONDS = 2.0
BATCH, LENGTH = 4, 32


def write_events(
    folder: Path, values: Iterable[tuple[str, int, float]], *, began: float, name: str = "host"
) -> Path:
    """Write `(tag, step, value)` as a process that began then does, two seconds a step."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{int(began)}.{name}.1.0"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for tag, step, value in values:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            event = Event(wall_time=began + SECONDS * step, step=step, summary=summary)
            writer.write(event.SerializeToString())
    return path


def steps(first: int, last: int, loss: float = 8.0) -> list[tuple[str, int, float]]:
    """Return what Lightning writes for steps `first` to `last`, both done: numbered from 0."""
    written = []
    for step in range(first, last + 1):
        written += [
            ("reduced_train_loss", step - 1, loss - 0.125 * step),
            ("lr", step - 1, 1e-3),
            ("consumed_samples", step - 1, float(BATCH * step)),
            ("experts/most", step, 1.5),
            ("experts/least", step, 0.5),
            ("experts/layer_2/most", step, 1.5),
        ]
    return written


def write_card(folder: Path, **changes: object) -> None:
    """Write the card of `nam56r_tiny` that is to make ten steps."""
    fields: Mapping[str, object] = {
        "pattern": "AEMEAEMEAEMR",
        "num_layers": 12,
        "hidden_size": 128,
        "seq_length": LENGTH,
        "global_batch_size": BATCH,
        "max_steps": 10,
        "processes": 1,
        "start_step": 0,
        "started": time.time(),
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    RunCard(**fields).write(folder)  # type: ignore[arg-type]


def write_run(folder: Path, last: int = 10, **changes: object) -> Path:
    """Write a run of so many steps, with a validation at its end."""
    write_card(folder, **changes)
    values = [*steps(1, last), ("val_loss", last - 1, 6.5)]
    write_events(folder / "tensorboard", values, began=time.time() - 3600)
    return folder
