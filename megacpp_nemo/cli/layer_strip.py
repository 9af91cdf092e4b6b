"""The strip of the layers: one cell a layer, and below it who builds it.

     1  *EME*EME*EMM*EME*EME*EMM
        1...2...2..31...2...2..3

A dot is a layer of the release's own; a digit, the seam of that number in the report.
"""

from __future__ import annotations

from collections.abc import Sequence

from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.lowering.lower import Lowering
from megacpp_nemo.lowering.plan import PlannedLayer
from megacpp_nemo.lowering.seams import NEMO_ONLY, Seam

MARKS = "123456789abcdefghijklmnopqrstuvwxyz"
LABEL, STEP = 5, 10
NATIVE_STYLE, BUILT_STYLE, MISSING_STYLE = "green", "yellow", "red"


def marks(seams: Sequence[Seam]) -> dict[str, str]:
    """Return the mark of each seam by its id."""
    return dict(zip((seam.id for seam in seams), MARKS, strict=False))


def style_of(seam: Seam | None) -> str:
    """Return how a seam, or a native layer, is painted."""
    if seam is None:
        return NATIVE_STYLE
    return BUILT_STYLE if seam.built else MISSING_STYLE


def layer_strip(lowering: Lowering, screen: Screen) -> list[str]:
    """Return the lines of the main pattern's strip, and of a prediction depth's."""
    lines = _strip(lowering.layers, lowering.seams, screen)
    if lowering.prediction:
        lines += ["", "One multi-token prediction depth:"]
        lines += _strip(lowering.prediction, lowering.seams, screen)
    return lines


def legend(lowering: Lowering, screen: Screen) -> str:
    """Return what the marks below the layers mean."""
    native = screen.paint(f"{screen.mark('·', '.')} native", NATIVE_STYLE)
    by_id = {seam.id: seam for seam in lowering.seams}
    owners = {layer.owner for layer in (*lowering.layers, *lowering.prediction)}
    parts = [native]
    for name, mark in marks(lowering.seams).items():
        if name in owners:
            missing = "" if by_id[name].built else f" ({NEMO_ONLY})"
            parts.append(screen.paint(f"{mark} {name}{missing}", style_of(by_id[name])))
    bar = f"{_bar(screen)} pipeline stage" if lowering.layers[-1].stage else ""
    return "   ".join(filter(None, [*parts, bar]))


def _strip(layers: Sequence[PlannedLayer], seams: Sequence[Seam], screen: Screen) -> list[str]:
    by_id, names = {seam.id: seam for seam in seams}, marks(seams)
    lines = []
    for part in _parts(layers, screen.width - LABEL):
        above, below = "", ""
        for layer in part:
            if layer.number > 1 and layers[layer.number - 2].stage != layer.stage:
                above, below = above + _bar(screen), below + " "
            style = style_of(by_id.get(layer.owner))
            mark = screen.mark("·", ".") if layer.native else names.get(layer.owner, "?")
            above += screen.paint(layer.symbol, style)
            below += screen.paint(mark, style)
        lines += [f"{part[0].number:>{LABEL - 2}}  {above}", " " * LABEL + below]
    return lines


def _bar(screen: Screen) -> str:
    return screen.mark("│", "|")


def _parts(layers: Sequence[PlannedLayer], room: int) -> list[Sequence[PlannedLayer]]:
    """Return the layers in lines that fit, of a round number of layers where they are several."""
    bars = layers[-1].stage - layers[0].stage
    if len(layers) + bars <= room:
        return [layers]
    # Where every layer began a stage, each would take two columns.
    most = room - bars if bars < room // 2 else room // 2
    size = max(most // STEP * STEP, STEP)
    return [layers[start : start + size] for start in range(0, len(layers), size)]
