"""The curves of a run by what they mean: which belong in one picture, and the throughput."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megacpp_nemo.runs.events import History, Point

LOSS, VALIDATION, RATE, SAMPLES = "reduced_train_loss", "val_loss", "lr", "consumed_samples"
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that are drawn in one picture.

    Args:
        key: Stable name.
        title: What it shows.
        unit: What its values are measured in.
        curves: Curves by their names in the legend, the leading one first.
        faint: Curves drawn thin behind them, such as those of single layers.
        level: A value that is marked as a level line, or None.
        logarithmic: Whether values span orders of magnitude.
        from_zero: Whether the axis begins at zero.
    """

    key: str
    title: str
    unit: str
    curves: Mapping[str, Curve]
    faint: Mapping[str, Curve] = field(default_factory=dict)
    level: float | None = None
    logarithmic: bool = False
    from_zero: bool = False


def panels(history: History, seq_length: int | None) -> list[Panel]:
    """Return what a run has to show; the loss is always the first."""
    curves = {tag: [(p.step, p.value) for p in points] for tag, points in history.curves.items()}

    def found(names: Mapping[str, str]) -> dict[str, Curve]:
        return {name: curves[tag] for name, tag in names.items() if tag in curves}

    loads, dropped = _layers(curves, "experts", "most"), curves.get("experts/dropped", [])
    depths = {f"depth {n}": curve for n, curve in _numbered(curves, r"mtp_(\d+)_loss").items()}
    kl = {f"layer {n}": c for n, c in _numbered(curves, r"dsa_indexer_kl/layer_(\d+)").items()}
    rate = {"tokens per second": throughput(history, seq_length)} if seq_length else {}
    indexer = found({"all indexers, weighted": "dsa_indexer_loss"})
    candidates = [
        Panel(
            key="loss",
            title="Loss",
            unit="nats per token",
            curves=found({"training": LOSS, "validation": VALIDATION}),
        ),
        Panel(
            key="learning_rate",
            title="Learning rate",
            unit="learning rate",
            curves=found({"learning rate": RATE}),
        ),
        Panel(
            key="throughput",
            title="Throughput",
            unit="tokens per second",
            curves=rate,
            level=mean_throughput(history, seq_length),
            from_zero=True,
        ),
        Panel(
            key="expert_load",
            title="Expert load",
            unit="tokens of an expert over the mean",
            curves=found({"busiest": "experts/most", "idlest": "experts/least"}),
            faint={**loads, **_layers(curves, "experts", "least")},
            level=1.0,
        ),
        Panel(
            key="dropped",
            title="Assignments beyond the experts' capacity",
            unit="share",
            curves={"worst layer": dropped} if any(value for _, value in dropped) else {},
        ),
        Panel(
            key="gradient",
            title="Gradient norm",
            unit="before clipping",
            curves=found({"gradient norm": "grad_norm"}),
            logarithmic=True,
        ),
        Panel(
            key="prediction",
            title="Multi-token prediction",
            unit="nats per token",
            curves=depths,
        ),
        Panel(
            key="indexer",
            title="Sparse attention: indexer against attention",
            unit="KL divergence, nats",
            curves=kl or indexer,
            logarithmic=True,
        ),
        Panel(
            key="stp",
            title="Semantic tube prediction",
            unit="1 - cos along a document",
            curves=found({"STP loss": "stp_loss"}),
        ),
    ]
    return [panel for panel in candidates if panel.key == "loss" or any(panel.curves.values())]


def throughput(history: History, seq_length: int | None) -> list[tuple[int, float]]:
    """Return tokens per second between logged steps, of every process by itself.

    An interval in which a validation ran, or a checkpoint was written, counts in full.
    """
    if not seq_length:
        return []
    pairs = _intervals(history.curves.get(SAMPLES, ()))
    return [
        (later.step, (later.value - earlier.value) * seq_length / (later.time - earlier.time))
        for earlier, later in pairs
    ]


def mean_throughput(history: History, seq_length: int | None) -> float | None:
    """Return the tokens of all intervals over their seconds; None where nothing says."""
    pairs = _intervals(history.curves.get(SAMPLES, ()))
    seconds = sum(later.time - earlier.time for earlier, later in pairs)
    if not seq_length or not seconds:
        return None
    return sum(later.value - earlier.value for earlier, later in pairs) * seq_length / seconds


def _intervals(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Return neighbouring points of one process between which time and samples went by."""
    return [
        (earlier, later)
        for earlier, later in pairwise(points)
        if earlier.session == later.session
        and later.time > earlier.time
        and later.value > earlier.value
    ]


def last(history: History, tag: str) -> float | None:
    """Return the last value of a curve, or None if the run has none."""
    points = history.curves.get(tag)
    return points[-1].value if points else None


def _layers(curves: Mapping[str, Curve], group: str, name: str) -> dict[str, Curve]:
    numbered = _numbered(curves, rf"{group}/layer_(\d+)/{name}")
    return {f"layer {number}, {name}": curve for number, curve in numbered.items()}


def _numbered(curves: Mapping[str, Curve], pattern: str) -> dict[int, Curve]:
    """Return the curves whose tags match a pattern, by the number in it."""
    match: Callable[[str], re.Match[str] | None] = re.compile(pattern).fullmatch
    found = {int(m[1]): curve for tag, curve in curves.items() if (m := match(tag))}
    return dict(sorted(found.items()))
