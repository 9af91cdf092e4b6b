"""A picture and a page of what the levers of a run did, from its journal.

- `Story`: the journal's events as curves and actions
- `draw`: the curves as PNG: loss, distance from isometry, dormancy, STP
- `page`: picture and tables as one HTML file that needs nothing else
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.runs.page import document

COLORS = {"fire": "tab:red", "dash": "tab:blue", "shrink": "tab:cyan", "redo": "tab:green"}
TOP_MATRICES = 12


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a journal tells.

    Args:
        curves: Points `(step, value)` of each value noted by step, such as `loss`.
        actions: Actions and reports, in order.
        starts: Steps at which training started or resumed.
    """

    curves: Mapping[str, Sequence[tuple[int, float]]]
    actions: Sequence[Mapping[str, Any]]
    starts: Sequence[int]

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]]) -> Story:
        """Return the story of events from `read_journal`.

        Raises:
            DataError: If nothing was ever noted in it.
        """
        curves: dict[str, list[tuple[int, float]]] = {}
        for event in events:
            for name, value in event.get("values", {}).items():
                curves.setdefault(name, []).append((event["step"], float(value)))
        actions = [event for event in events if event["event"] in ("action", "report")]
        if not curves and not actions:
            raise DataError(
                "The journal tells of nothing yet",
                given=f"{len(events)} events, none of them an action or a step's value",
                allowed="a run that trained for at least one logged step",
                hint="the report after some steps",
            )
        starts = [event["step"] for event in events if event["event"] == "start"]
        return cls(curves=curves, actions=actions, starts=starts)

    def total(self, quantity: str, lever: str | None = None) -> list[tuple[int, float]]:
        """Return points `(step, value)` of a quantity over all matrices."""
        return [
            (action["step"], float(action["totals"][quantity]))
            for action in self.actions
            if quantity in action["totals"] and lever in (None, action["lever"])
        ]


def draw(story: Story, title: str) -> bytes:
    """Return the curves of a run as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, isometry, dormancy, tube = figure.subplots(2, 2).flat
    _curve(loss, story.curves.get("loss", ()), "training loss", "nats per token")
    _marks(loss, story)
    _defects(isometry, story)
    _curve(dormancy, _dormancy(story), "dormant units of the expert MLPs", "share")
    _curve(tube, story.curves.get("stp_loss", ()), "STP: 1 - cos along a document", "loss")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _curve(axes: Any, points: Sequence[tuple[int, float]], title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 40 else None, linewidth=1)
    else:
        axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes)


def _marks(axes: Any, story: Story) -> None:
    """Draw a line where a lever acted, one legend entry a lever."""
    named: set[str] = set()
    for action in story.actions:
        lever = action["lever"]
        if action["event"] == "action":
            label = None if lever in named else lever
            axes.axvline(action["step"], color=COLORS.get(lever, "grey"), alpha=0.5, label=label)
            named.add(lever)
    if named:
        axes.legend()


def _defects(axes: Any, story: Story) -> None:
    """Draw the mean distance from isometry before and after each FIRE."""
    before, after = story.total("dfi_before", "fire"), story.total("dfi_after", "fire")
    _curve(axes, (), "distance from isometry", "mean DfI / min(out, in)")
    if not before:
        return
    axes.texts[0].remove()
    for points, label in ((before, "before FIRE"), (after, "after")):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, "o", label=label)
    axes.set_yscale("log")
    axes.legend()


def _dormancy(story: Story) -> list[tuple[int, float]]:
    units, dormant = story.total("units", "redo"), story.total("dormant", "redo")
    return [
        (step, count / whole)
        for (step, whole), (_, count) in zip(units, dormant, strict=True)
        if whole
    ]


def page(story: Story, title: str, picture: bytes) -> str:
    """Return picture and tables as one HTML file."""
    encoded = base64.b64encode(picture).decode()
    tables = "\n".join(_action(action) for action in story.actions if action["event"] == "action")
    body = (
        f'<img alt="Curves of the run" src="data:image/png;base64,{encoded}">\n'
        f"{tables or '<p>No lever has acted yet.</p>'}"
    )
    return document(title, body)


def _action(action: Mapping[str, Any]) -> str:
    """Return one action as a heading, its totals and its most touched matrices."""
    totals = ", ".join(f"{name} {_shown(value)}" for name, value in action["totals"].items())
    heading = f"{action['lever']} at step {action['step']} ({action['cause']})"
    matrices = dict(list(action["matrices"].items())[:TOP_MATRICES])
    columns = list(next(iter(matrices.values()), {}))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["matrix", *columns])
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_shown(values.get(column, ''))}</td>" for column in columns)
        + "</tr>"
        for name, values in matrices.items()
    )
    more = len(action["matrices"]) - len(matrices)
    rest = f"<p>and {more} more in the journal</p>" if more else ""
    return (
        f"<h2>{html.escape(heading)}</h2><p>{html.escape(totals)}; {action['seconds']:.2f} s, "
        f"{action['bytes'] / 2**20:.1f} MiB of parameters</p>"
        f"<table><tr>{head}</tr>{rows}</table>{rest}"
    )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
