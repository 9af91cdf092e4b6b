"""A lowering as a report for people, in text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megacpp_nemo.cli.layer_strip import layer_strip, legend, marks, style_of
from megacpp_nemo.cli.screen import Cell, Screen
from megacpp_nemo.cli.script import launch
from megacpp_nemo.lowering.features import Feature, Status, ranges
from megacpp_nemo.lowering.lower import Lowering
from megacpp_nemo.lowering.seams import NEMO_ONLY, Seam

PACKAGE = "megacpp_nemo."
STATUS_STYLES = {
    Status.NATIVE: "green",
    Status.SEAM: "yellow",
    Status.EXPERIMENTAL: "red",
    Status.OFF: "dim",
}


def lowering_text(lowering: Lowering, screen: Screen) -> str:
    """Return the whole report: layers, seams, features, what is open, the command."""
    parts = [
        *seam_parts(lowering, screen),
        [screen.heading("Features"), features_table(lowering.features, screen)],
        [screen.heading("Still open"), *_open(lowering, screen)],
        [screen.heading("Command"), *launch(lowering)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def seams_text(lowering: Lowering, screen: Screen) -> str:
    """Return the seam report: layers, seams, and why each is one."""
    parts = seam_parts(lowering, screen)
    parts += [list(_reasons(seam, mark, screen)) for seam, mark in _marked(lowering)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def seam_parts(lowering: Lowering, screen: Screen) -> list[list[str]]:
    """Return the title, the strip of the layers and the table of the seams."""
    title = screen.heading(f"{lowering.name} on Megatron-LM {lowering.release}")
    strip = [*layer_strip(lowering, screen), "", legend(lowering, screen)]
    parts = [[title, summary(lowering)], strip]
    if lowering.seams:
        note = f"Owners are modules of {PACKAGE[:-1]}; a slot is the symbol that layers ride on."
        if not all(seam.built for seam in lowering.seams):
            note += " What is not built on Megatron's command line has its owner in a NeMo run."
        parts.append([screen.heading("Seams"), seams_table(lowering, screen), screen.wrapped(note)])
    return parts


def summary(lowering: Lowering) -> str:
    """Return how many layers are native, and how many seams there are, in a line."""
    custom = [layer.owner for layer in lowering.layers if not layer.native]
    missing = [seam.id for seam in lowering.seams if not seam.built]
    native = len(lowering.layers) - len(custom)
    words = f"{len(lowering.layers)} layers: {native} native, {len(custom)} custom. "
    if not lowering.seams:
        return words + "No seams: the release owns it whole."
    seams = f"{len(lowering.seams)} seam{'s' * (len(lowering.seams) > 1)}"
    return words + seams + (f", {len(missing)} {NEMO_ONLY}." if missing else ", all built.")


def covers(seam: Seam, lowering: Lowering) -> str:
    """Return the layers of a seam in words; what it is part of where it has none."""
    if seam.layers:
        return ranges(seam.layers)
    inner = any(layer.owner == seam.id for layer in lowering.prediction)
    return "prediction depths" if inner else str(seam.kind.value)


def seams_table(lowering: Lowering, screen: Screen) -> str:
    """Return the table of the seams."""
    head = ("#", "seam", "layers", "slot", "native", "built", "owner", "turned off by")
    rows = [
        (
            Cell(mark, style_of(seam)),
            Cell(seam.id, style_of(seam)),
            covers(seam, lowering),
            seam.slot or "-",
            f"from {seam.native_since}" if seam.native_since else "never",
            Cell("yes" if seam.built else "NeMo only", style_of(seam)),
            (seam.nemo_owner or seam.owner).removeprefix(PACKAGE),
            seam.off,
        )
        for seam, mark in _marked(lowering)
    ]
    return screen.table(head, rows)


def features_table(features: Sequence[Feature], screen: Screen) -> str:
    """Return the receipt of where each feature attaches, and whose it is."""
    rows = [
        (
            feature.name,
            Cell(feature.status.value, STATUS_STYLES[feature.status]),
            feature.seam or "-",
            feature.place or "-",
        )
        for feature in features
    ]
    return screen.table(("feature", "whose", "seam", "place"), rows)


def _marked(lowering: Lowering) -> list[tuple[Seam, str]]:
    names = marks(lowering.seams)
    return [(seam, names[seam.id]) for seam in lowering.seams]


def _reasons(seam: Seam, mark: str, screen: Screen) -> Iterator[str]:
    yield screen.paint(f"{mark} {seam.id}: {seam.what}", style_of(seam))
    rows = (
        ("why", seam.reason),
        ("graduates", f"with {seam.graduates}"),
        ("evidence", seam.evidence),
        *owners(seam),
        ("off", seam.off),
    )
    for name, text in rows:
        yield f"  {screen.paint(f'{name:<10}', 'dim')} " + screen.wrapped(text, " " * 13)


def owners(seam: Seam) -> Iterator[tuple[str, str]]:
    """Yield who builds a seam, and who refuses it where only a NeMo run has it."""
    if seam.built:
        yield "owner", seam.owner
    else:
        yield "owner", f"{seam.nemo_owner}, {NEMO_ONLY}"
        yield "refused", f"by {seam.owner} on Megatron's command line"


def _open(lowering: Lowering, screen: Screen) -> Iterator[str]:
    if not lowering.open:
        yield "  nothing: the command can start"
    for item in lowering.open:
        yield screen.wrapped(f"- {item.what}", "  ")
        yield f"  settled by {screen.paint(item.settle, 'green')}"
