"""TensorBoard's files as curves: the files of a resumed run, joined to one.

    history = read_history(run.events, run.start_step)
    history.curves["reduced_train_loss"]     # points by optimizer step

Files are read with the tensorboard package's own loader. A file that a killed run cut short gives
what is whole in it, and a note. Where a run went on from an earlier step, what was written beyond
that step is left out: it is no part of what the weights went through.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megacpp_nemo.contract.errors import DataError

# Length, checksum of the length and checksum of the data around each record.
FRAME_BYTES = 16
# Lightning numbers its values by the step that begins, our layers and levers by steps done.
BY_STEPS_DONE = ("experts/", "dsa_indexer", "stp_loss", "fire/", "dash/", "shrink/", "redo/")
IGNORED = ("hp_metric",)


class Point(NamedTuple):
    """A value of a curve.

    Args:
        step: Optimizer steps done.
        value: The value.
        time: When it was written, in seconds since 1970.
        session: Which of the run's processes wrote it, from 0.
    """

    step: int
    value: float
    time: float
    session: int


@dataclass(frozen=True, kw_only=True)
class History:
    """The curves of a run.

    Args:
        curves: Points by TensorBoard's tag, in the order of steps.
        resumed: Steps from which later processes went on.
        notes: What could not be read, in words.
    """

    curves: Mapping[str, Sequence[Point]]
    resumed: Sequence[int]
    notes: Sequence[str]

    @property
    def last_step(self) -> int:
        """The last step that any curve has; 0 without curves."""
        return max((points[-1].step for points in self.curves.values()), default=0)

    @property
    def last_time(self) -> float:
        """When the last point was written, in seconds since 1970; 0 without curves."""
        return max((points[-1].time for points in self.curves.values()), default=0.0)


def read_history(files: Iterable[Path], start_step: int | None = None) -> History:
    """Return the curves in TensorBoard's files of one run.

    Args:
        files: The files.
        start_step: Step at which the last process took the run up, if that is known; otherwise it
            is taken to have logged its first step.

    Raises:
        DataError: If tensorboard is not installed, or no file has a record that can be read.
    """
    loader = _loader()
    read = sorted((_file(path, loader) for path in files), key=lambda file: file.began)
    if read and not any(file.records for file in read):
        raise DataError(
            "TensorBoard's file is damaged from its beginning",
            given=", ".join(str(file.path) for file in read),
            allowed="a file whose first records are whole",
            hint="a copy of it, or the run's log: nemo_log_globalrank-0_localrank-0.txt",
        )
    curves: dict[str, list[Point]] = {}
    resumed: list[int] = []
    told = [file for file in read if file.scalars]
    for file in told:
        start = min(step for _, step, _, _ in file.scalars) - 1
        if file is told[-1] and start_step is not None:
            start = min(start, start_step)
        if curves:
            resumed.append(start)
            curves = {tag: [p for p in points if p.step <= start] for tag, points in curves.items()}
        for tag, step, value, time in file.scalars:
            curves.setdefault(tag, []).append(Point(step, value, time, len(resumed)))
    ordered = {tag: _ordered(points) for tag, points in curves.items() if points}
    return History(curves=ordered, resumed=resumed, notes=[n for file in read for n in file.notes])


class _File(NamedTuple):
    path: Path
    began: float
    records: int
    scalars: list[tuple[str, int, float, float]]
    notes: list[str]


def _file(path: Path, loader: Any) -> _File:
    """Return a file's scalars `(tag, step, value, time)` and what of it cannot be read."""
    from tensorboard.compat.proto.event_pb2 import Event

    records, consumed, began = 0, 0, 0.0
    scalars: list[tuple[str, int, float, float]] = []
    why = ""
    try:
        size = path.stat().st_size
        for record in loader(str(path)).Load():
            event = Event.FromString(record)
            began = began or event.wall_time
            records, consumed = records + 1, consumed + len(record) + FRAME_BYTES
            scalars += _scalars(event)
    except OSError as error:
        raise DataError(
            "A file of TensorBoard cannot be read",
            given=f"{path}: {(error.strerror or str(error)).lower()}",
            allowed="a file that this user may read",
            hint=f"chmod +r {path}",
        ) from None
    except Exception as error:  # what protobuf raises depends on its implementation
        why = f": {type(error).__name__}"
    rest = size - consumed
    notes = []
    if rest:
        part = f"the last {rest:,} of {size:,} bytes"
        notes.append(f"{part} of {path.name}, which are cut short or damaged{why}")
    return _File(path, began, records, scalars, notes)


def _scalars(event: Any) -> Iterator[tuple[str, int, float, float]]:
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            number = value.simple_value
        elif kind == "tensor" and len(value.tensor.float_val) == 1:
            number = value.tensor.float_val[0]
        else:
            continue
        if value.tag not in IGNORED:
            done = 0 if value.tag.startswith(BY_STEPS_DONE) else 1
            yield value.tag, int(event.step) + done, float(number), float(event.wall_time)


def _ordered(points: Sequence[Point]) -> list[Point]:
    """Return points by step, the one written last where a step has several."""
    return [point for _, point in sorted({point.step: point for point in points}.items())]


def _loader() -> Any:
    """Return tensorboard's reader of records, and keep it from looking for TensorFlow."""
    # tensorboard imports TensorFlow, for seconds, where it is installed, unless this module is.
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, types.ModuleType(name))
    try:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    except ImportError as error:
        raise DataError(
            "Curves are read with the tensorboard package",
            given=f"{type(error).__name__}: {error}",
            allowed="an environment that it is installed in",
            hint="pip install tensorboard",
        ) from None
    return RawEventFileLoader
