"""Reports in Markdown, in ASCII and the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megacpp_nemo.cli.lowering_report import covers, owners, summary
from megacpp_nemo.cli.script import launch
from megacpp_nemo.lowering.lower import Lowering


def code(text: str) -> str:
    """Return text as code, also in a table; nothing for no text."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", "\\|") if text else ""


def codes(texts: Iterable[str]) -> str:
    """Return texts as code, one a line of a table's cell."""
    return "<br>".join(map(code, texts))


def plain(text: str) -> str:
    """Return text that Markdown leaves as it is."""
    for letter in "\\|*_<>`":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in lines)


def lowering_markdown(lowering: Lowering) -> str:
    """Return the whole report: layers, seams, features, what is open, the command."""
    parts = [
        *_head(lowering),
        "## Features",
        table(
            ("feature", "whose", "seam", "place"),
            [(plain(f.name), f.status.value, code(f.seam), f.place) for f in lowering.features],
        ),
        "## Still open",
        "\n".join(f"- {plain(item.what)}: {code(item.settle)}" for item in lowering.open)
        or "Nothing: the command can start.",
        "## Command",
        "```sh\n" + "\n".join(launch(lowering)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def seams_markdown(lowering: Lowering) -> str:
    """Return the seam report: layers, seams, and why each is one."""
    parts = _head(lowering)
    for seam in lowering.seams:
        parts.append(f"### {seam.id}: {plain(seam.what)}")
        parts.append(
            f"- why: {plain(seam.reason)}\n"
            f"- graduates with: {plain(seam.graduates)}\n"
            f"- evidence: {plain(seam.evidence)}\n"
            + "".join(f"- {name}: {plain(text)}\n" for name, text in owners(seam))
            + f"- turned off by: {code(seam.off)}"
        )
    return "\n\n".join(parts) + "\n"


def _head(lowering: Lowering) -> list[str]:
    parts = [
        f"# {plain(lowering.name)} on Megatron-LM {plain(lowering.release)}",
        summary(lowering),
        "## Layers",
        _layers(lowering),
    ]
    if lowering.seams:
        parts += ["## Seams", _seams(lowering)]
    return parts


def _layers(lowering: Lowering) -> str:
    """Return the layers by what they are and who owns them."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for layer in lowering.layers:
        groups.setdefault((layer.role.words, layer.symbol, layer.owner), []).append(layer.number)
    rows = [
        (words, code(symbol), code(owner), str(len(numbers)), ", ".join(map(str, numbers)))
        for (words, symbol, owner), numbers in groups.items()
    ]
    return table(("what", "symbol", "owner", "count", "layers"), rows)


def _seams(lowering: Lowering) -> str:
    head = ("seam", "layers", "slot", "native", "built", "owner", "turned off by")
    rows = [
        (
            code(seam.id),
            covers(seam, lowering),
            code(seam.slot),
            f"from {seam.native_since}" if seam.native_since else "never",
            "yes" if seam.built else "**NeMo only**",
            code(seam.nemo_owner or seam.owner),
            code(seam.off),
        )
        for seam in lowering.seams
    ]
    return table(head, rows)
