"""Reports made of titled tables and sentences, as text or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_nemo.cli.screen import Cell, Screen


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a report.

    Args:
        title: Its heading; none for what stands at the top.
        head: Names of the columns.
        rows: Cells; none for a part without a table.
        notes: Sentences below the table, each on lines of its own.
        code: Lines to be copied, below all.
    """

    title: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str | Cell]] = ()
    notes: Sequence[str] = ()
    code: Sequence[str] = ()


def drawn(title: str, parts: Sequence[Part], form: str, screen: Screen) -> str:
    """Return a report in a format.

    Args:
        title: Heading of the whole.
        parts: Its parts.
        form: `text` or `md`.
        screen: Where text is drawn.
    """
    if form == "md":
        return _markdown(title, parts)
    blocks = [_heading(title, screen)]
    for part in parts:
        lines = [_heading(part.title, screen)] if part.title else []
        if part.rows:
            lines.append(screen.table(part.head, part.rows))
        lines += [screen.wrapped(note) for note in part.notes]
        lines += [f"  {line}" for line in part.code]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _heading(text: str, screen: Screen) -> str:
    return "\n".join(map(screen.heading, screen.wrapped(text).split("\n")))


def _markdown(title: str, parts: Sequence[Part]) -> str:
    from megacpp_nemo.cli.markdown import plain, table

    blocks = [f"# {plain(title)}"]
    for part in parts:
        blocks += [f"## {plain(part.title)}"] if part.title else []
        if part.rows:
            rows = [[plain(c.text if isinstance(c, Cell) else c) for c in row] for row in part.rows]
            blocks.append(table([plain(name) for name in part.head], rows))
        blocks += [plain(note) for note in part.notes]
        if part.code:
            blocks.append("```sh\n" + "\n".join(part.code) + "\n```")
    return "\n\n".join(blocks) + "\n"
