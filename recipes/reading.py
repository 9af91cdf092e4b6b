"""How NeMo-Run reads text, mended where it stops short of our recipes.

- It cuts the arguments of a factory at every comma, also inside a list. A comma that is not
  between two arguments is hidden from it: `nam56r(plasticity__fire__steps=[100,200])`.
- It cannot read what a lever's field is annotated with (`tuple[Positive, ...]`). Such a field
  takes any literal, and the lever's own rule says whether it can be that:
  `trainer.callbacks[2].plasticity.fire.steps=[100,200]`.

Both concern text that NeMo-Run refuses when left alone.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from nemo_run.cli import cli_parser

from megacpp_nemo.contract.plasticity import Plasticity

HIDDEN = "\ue000"  # of Unicode's private use: stands for a comma, and means nothing itself
CLOSING = {"(": ")", "[": "]", "{": "}"}


def install() -> None:
    """Read so from now on; a second call changes nothing."""
    parse_factory, parse = cli_parser.parse_factory, cli_parser.TypeParser.parse
    if getattr(parse_factory, "hides", False):
        return

    @functools.wraps(parse_factory)
    def whole(parent: Any, arg_name: str, arg_type: Any, value: str) -> Any:
        return parse_factory(parent, arg_name, arg_type, hidden(shown(value)))

    @functools.wraps(parse)
    def typed(self: cli_parser.TypeParser, value: str, annotation: Any) -> Any:
        return parse(self, shown(value), annotation)

    whole.hides = True  # type: ignore[attr-defined]
    cli_parser.parse_factory = whole
    cli_parser.TypeParser.parse = typed
    for lever in dataclasses.fields(Plasticity):
        for item in dataclasses.fields(getattr(Plasticity(), lever.name)):
            cli_parser.type_parser.register_parser(item.type)(_literal)


def _literal(value: str, annotation: str) -> Any:
    """Return a value as an annotation that is text says, or as any literal."""
    return cli_parser.type_parser.parse(value, getattr(builtins, annotation, Any))


def hidden(text: str) -> str:
    """Return text whose commas within the arguments of a call are hidden, between them not."""
    letters = list(text)
    for mark in _marks(text):
        if letters[mark.at] == "," and "call" in mark.within[:-1]:
            letters[mark.at] = HIDDEN
    return "".join(letters)


def shown(text: str) -> str:
    """Return text with hidden commas as they were."""
    return text.replace(HIDDEN, ",")


def elements(text: str) -> list[str]:
    """Return the elements of a list that is written as text; the text itself if it is none."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    cuts = [mark.at for mark in _marks(text) if text[mark.at] == "," and mark.within == ("[",)]
    bounds = zip([0, *cuts], [*cuts, len(text) - 1], strict=True)
    return [part for begin, end in bounds if (part := text[begin + 1 : end].strip())]


class _Mark(NamedTuple):
    """A letter of text, and what it lies within: `call`, an opening bracket or a quote."""

    at: int
    within: tuple[str, ...]


def _marks(text: str) -> Iterator[_Mark]:
    """Yield every letter of text that lies within something."""
    within: list[str] = []
    for at, letter in enumerate(text):
        before = text[at - 1] if at else ""
        if within and within[-1] in "'\"":
            if letter == within[-1]:
                within.pop()
        elif letter in "'\"" and (not before or before in "=([{, "):
            within.append(letter)
        elif letter in CLOSING:
            calls = letter == "(" and (before.isalnum() or before == "_")
            within.append("call" if calls else letter)
        elif within and letter == CLOSING.get("(" if within[-1] == "call" else within[-1]):
            within.pop()
        if within:
            yield _Mark(at, tuple(within))
