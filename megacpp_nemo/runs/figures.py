"""Curves drawn by matplotlib: all of a run as one PNG, or each as SVG for a page.

An SVG names its colours as variables of the page's style sheet, so that one drawing serves light
and dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from megacpp_nemo.runs.curves import Curve, Panel

# Okabe and Ito's colours, which most colour-blind readers tell apart: as drawn, and on dark paper.
COLORS = {
    "blue": ("#0072b2", "#5ab4ee"),
    "vermilion": ("#d55e00", "#ff9150"),
    "green": ("#009e73", "#3fd0a4"),
    "purple": ("#b0578d", "#e39ac6"),
    "orange": ("#c48a00", "#f0b93a"),
    "ink": ("#22262b", "#e4e7ea"),
    "quiet": ("#5d656e", "#a0a8b0"),
    "grid": ("#dfe3e7", "#353b42"),
    "faint": ("#c3cad1", "#4d565f"),
    "paper": ("#ffffff", "#1b1f24"),
}
LINES = ("blue", "vermilion", "green", "purple", "orange")
MOST_POINTS, FEW_POINTS = 1200, 12
WIDTH, HEIGHT = 5.2, 3.1
DPI = 150


def png(panels: Sequence[Panel], title: str, subtitle: str, resumed: Sequence[int] = ()) -> bytes:
    """Return all panels as one picture on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(WIDTH * columns, HEIGHT * rows + 0.7)
    FigureCanvasAgg(figure)
    ink, quiet = COLORS["ink"][0], COLORS["quiet"][0]
    inches = HEIGHT * rows + 0.7
    figure.text(0.012, 1 - 0.14 / inches, title, fontsize=14, color=ink, va="top", weight="bold")
    figure.text(0.012, 1 - 0.42 / inches, subtitle, fontsize=9, color=quiet, va="top")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.65 / inches), w_pad=0.12, h_pad=0.1)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        draw(axes, panel, resumed, last_step=_last_step(panels))
    buffer = io.BytesIO()
    # A letter of a run's name that matplotlib's font lacks becomes a box; nothing is to be done.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=COLORS["paper"][0])
    return buffer.getvalue()


def svgs(panels: Sequence[Panel], resumed: Sequence[int] = ()) -> dict[str, str]:
    """Return each panel as an SVG element by its title; colours are `var(--blue)` and so on."""
    return {panel.title: _svg(panel, resumed, _last_step(panels)) for panel in panels}


def _svg(panel: Panel, resumed: Sequence[int], last_step: int) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure = _figure(WIDTH, HEIGHT)
    FigureCanvasSVG(figure)
    draw(figure.add_subplot(), panel, resumed, last_step=last_step, titled=False)
    buffer = io.StringIO()
    # Text stays text; the salt keeps the ids of several drawings on a page apart, and alike
    # whenever it is drawn.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    for name, (drawn, _) in COLORS.items():
        text = text.replace(drawn, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(xmlns:xlink|xmlns|version)="[^"]*"\s*', "", text, count=3)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("xlink:href", "href")
    head = f'<svg role="img" aria-label="{panel.title}, {panel.unit}, by optimizer step" '
    return text.replace("<svg ", head, 1)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw(
    axes: Any, panel: Panel, resumed: Sequence[int], *, last_step: int, titled: bool = True
) -> None:
    """Draw a panel into matplotlib's axes, from step 0 to `last_step`."""
    _plain(axes, panel, titled)
    quiet = COLORS["quiet"][0]
    for curve in panel.faint.values():
        _line(axes, curve, COLORS["faint"][0], linewidth=0.8)
    for color, (name, curve) in zip(_colors(len(panel.curves)), panel.curves.items(), strict=True):
        style = {"marker": "o", "markersize": 4} if len(curve) <= FEW_POINTS else {}
        _line(axes, curve, color, linewidth=1.6, label=name, zorder=3, **style)
    if not any(panel.curves.values()):
        axes.text(0.5, 0.5, "not logged yet", ha="center", color=quiet, transform=axes.transAxes)
    if panel.level is not None:
        axes.axhline(panel.level, color=quiet, linewidth=0.9, linestyle=(0, (1, 2)))
    for step in resumed:
        axes.axvline(step, color=quiet, linewidth=0.8, linestyle=(0, (4, 3)))
    _limits(axes, panel, last_step)
    if len(panel.curves) > 1:
        axes.legend(
            frameon=False,
            fontsize=8.5,
            labelcolor=COLORS["ink"][0],
            ncols=min(len(panel.curves), 4),
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.2,
            handlelength=1.4,
        )


def _limits(axes: Any, panel: Panel, last_step: int) -> None:
    axes.set_xlim(0, max(last_step, 1) * 1.01)
    if panel.logarithmic and _spans(panel):
        axes.set_yscale("log")
        axes.tick_params(which="both", length=0)
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    else:
        axes.margins(y=0.08)


def _last_step(panels: Sequence[Panel]) -> int:
    curves = [curve for panel in panels for curve in panel.curves.values() if curve]
    return max((curve[-1][0] for curve in curves), default=0)


def _plain(axes: Any, panel: Panel, titled: bool) -> None:
    """Give axes their words, a quiet frame and level lines."""
    ink, quiet = COLORS["ink"][0], COLORS["quiet"][0]
    if titled:
        axes.set_title(panel.title, loc="left", fontsize=11, color=ink, weight="bold")
    axes.set_xlabel("optimizer step", fontsize=9, color=quiet)
    axes.set_ylabel(panel.unit, fontsize=9, color=quiet)
    axes.grid(True, axis="y", color=COLORS["grid"][0], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["grid"][0])
    axes.tick_params(colors=quiet, labelsize=8.5, length=0)
    axes.locator_params(axis="x", nbins=7, integer=True)


def _line(axes: Any, curve: Curve, color: str, **style: Any) -> None:
    steps, values = thinned(curve)
    axes.plot(steps, values, color=color, solid_capstyle="round", **style)


def thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """Return steps and values, neighbours averaged where there are more than can be seen."""
    size = math.ceil(len(curve) / MOST_POINTS) if len(curve) > MOST_POINTS else 1
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    steps = [sum(step for step, _ in part) / len(part) for part in parts]
    return steps, [sum(value for _, value in part) / len(part) for part in parts]


def _colors(count: int) -> list[str]:
    return [COLORS[LINES[number % len(LINES)]][0] for number in range(count)]


def _spans(panel: Panel) -> bool:
    """Return whether all values are positive and far enough apart for a logarithmic axis."""
    values = [v for curve in panel.curves.values() for _, v in curve if math.isfinite(v)]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)
