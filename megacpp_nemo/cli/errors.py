"""Errors as a shell shows them: the four parts, with options and words where Python has code."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from megacpp_nemo.cli.screen import Screen, in_color, visible
from megacpp_nemo.contract.errors import MegaCppError

# What Python calls `lower(..., release="0.19.0")` is `--release 0.19.0` here.
OPTIONS = {
    "release": "--release",
    "seams": "--seams",
    "mode": "--mode",
    "gpu": "--gpu",
    "name": "--name",
    "out": "--out",
    "target": "--target",
    "cache_dir": "--cache-dir",
    "--as": "--as",
    "--channel": "--channel",
    "--format": "--format",
    "--color": "--color",
}
WORDS = {
    "megacpp_nemo.contract.field_paths()": "megacpp table",
    "`add_release`": "megacpp releases add",
    "overwrite=True": "--replace",
    "max_new_tokens=": "--max-new-tokens ",
    "no cuda_graphs": "no --cuda-graphs",
    "cuda_graphs=": "--cuda-graphs ",
    "LaunchOptions.cuda_graphs": "--cuda-graphs",
    "LaunchOptions.cache_dir": "--cache-dir",
}
_KEYWORD = re.compile(rf"(?<![\w.-])({'|'.join(OPTIONS)})='([^']*)'")
_TUPLE = re.compile(r"(?<==)\(([^()]*)\)")
_EMPTY = "''"
_STYLES = {"given": "", "allowed": "", "try": "green"}


def told(error: MegaCppError, words: Sequence[str]) -> str:
    """Return an error as text, coloured if standard error is a terminal."""
    screen = Screen(color=in_color(_color(words), sys.stderr))
    first, *rest = visible(as_words(error.what)).split("\n")
    lines = [f"{screen.paint('megacpp:', 'red')} {screen.paint(first, 'bold')}", *rest]
    for name, part in (("given", error.given), ("allowed", error.allowed), ("try", error.hint)):
        if part is not None:
            text = visible(as_words(part if isinstance(part, str) else repr(part)))
            label = screen.paint(f"{name + ':':<8}", "dim")
            lines.append(f"  {label} {screen.paint(text, _STYLES[name])}")
    return "\n".join(lines)


def as_words(text: str) -> str:
    """Return a part of an error as one would type it in a shell."""
    for code, word in WORDS.items():
        text = text.replace(code, word)
    text = _KEYWORD.sub(lambda match: f"{OPTIONS[match[1]]} {match[2] or _EMPTY}", text)
    text = _TUPLE.sub(lambda match: _listed(match[1]), text)
    # A lone name in quotes, as Python writes it.
    return re.sub(r"^'([\w.-]+)'$", r"\1", text)


def _listed(items: str) -> str:
    """Return the items of a tuple as `read_value` reads them."""
    plain = [item.strip().strip("'") for item in items.split(",") if item.strip()]
    return ",".join(plain) or "[]"


def _color(words: Sequence[str]) -> str:
    """Return what the words say about colour, also where they cannot be read as a whole."""
    joined = " ".join(words)
    return next((c for c in ("never", "always") if re.search(rf"--color[= ]{c}\b", joined)), "auto")
