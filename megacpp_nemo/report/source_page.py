"""A source file as one HTML page: its tokens on the colours of a channel, all channels in it."""

from __future__ import annotations

import json
from typing import Any

from markupsafe import Markup

from megacpp_nemo import __version__
from megacpp_nemo.report.channels import ABSENT_PAINT, TITLES, keys, mixed, paints
from megacpp_nemo.report.rendering import TEMPLATES, environment, policy
from megacpp_nemo.report.source import Source

INK = "#111111"
# Of `--paper` in style.css where it is dark; colours are text there, on a shade of themselves.
DARK_PAPER = "#14161a"
SHADE = 0.12


def source_page(source: Source, channel: str) -> str:
    """Return the page of a file, or of the lines of it that are shown.

    Args:
        source: The file. A browser takes seconds for each hundred thousand tokens.
        channel: The channel that it is coloured by until another is chosen.
    """
    css = "".join((TEMPLATES / name).read_text("utf-8") for name in ("style.css", "source.css"))
    style = Markup(css + _paints())
    script = Markup((TEMPLATES / "source.js").read_text(encoding="utf-8"))
    legends = {name: keys(name, source.of_shown(name)) for name in source.channels}
    own = legends[channel]
    first, last = source.line_numbers
    return (
        environment()
        .get_template("source.html")
        .render(
            title=source.name,
            about=_about(source),
            notes=[*source.notes, *_left_out(source)],
            titles=TITLES,
            legends=legends,
            chosen=channel,
            numbers=Markup("\n").join(str(number) for number in range(first, last + 1)),
            pieces=[
                (own[source.value(channel, token)].paint, text) for token, text in source.pieces()
            ],
            data=Markup(_data(source)),
            policy=policy(style, script),
            style=style,
            script=script,
            version=__version__,
        )
    )


def _about(source: Source) -> str:
    count, first, last = source.last - source.first, *source.line_numbers
    what = "pieces" if source.ids is None else "tokens"
    return f"{count:,} {what}, lines {first:,} to {last:,} of {len(source.line_starts):,}"


def _left_out(source: Source) -> list[str]:
    """Return what says how to see the rest, where there is one."""
    first, last = source.line_numbers
    if first == 1 and last == len(source.line_starts):
        return []
    if last < len(source.line_starts):
        return [f"Lines {last + 1:,} and on are not on this page: --lines {last + 1}: has them."]
    return [f"Lines 1 to {first - 1:,} are not on this page."]


def _data(source: Source) -> str:
    """Return what the page says of each token when pointed at, as JSON that HTML may hold."""
    span = slice(source.first, source.last)
    found: dict[str, Any] = {
        "first": source.first,
        "starts": source.starts[span].tolist(),
        "ids": None if source.ids is None else source.ids[span].tolist(),
        "channels": {name: source.of_shown(name).tolist() for name in source.channels},
        "keys": {
            name: {
                key.id: [key.paint, key.name] for key in keys(name, source.of_shown(name)).values()
            }
            for name in source.channels
        },
    }
    # Nothing in it ends the element that it stands in.
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def _paints() -> str:
    """Return the style of every colour: a ground for dark text, and on a dark page an ink."""
    light, dark = [], []
    for name, fill in paints().items():
        light.append(f".{name} {{ background: {fill}; color: {INK}; }}")
        dark.append(f".{name} {{ background: {mixed(DARK_PAPER, fill, SHADE)}; color: {fill}; }}")
    light.append(f".{ABSENT_PAINT} {{ color: var(--quiet); }}")
    rules = "\n".join(dark)
    return "\n".join(light) + f"\n@media (prefers-color-scheme: dark) {{\n{rules}\n}}\n"
