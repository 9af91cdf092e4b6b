"""The commands that the documentation shows in its indented blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
CONTINUED = re.compile(r"\\\n\s*")


def shown_commands(program: str) -> list[list[str]]:
    """Return the arguments of every shown command that begins with `program`, up to a pipe."""
    prompt = f"    {program} "
    lines = [
        line
        for page in PAGES
        for line in CONTINUED.sub("", page.read_text(encoding="utf-8")).splitlines()
        if line.startswith(prompt)
    ]
    every = [shlex.split(line.removeprefix(prompt), comments=True) for line in dict.fromkeys(lines)]
    return [words[: words.index("|")] if "|" in words else words for words in every]
