"""What the planner's commands share: options, numbers, and errors in a shell's words."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from megacpp_nemo.cli.given import parts_of, read_changes, words_of
from megacpp_nemo.cli.usage import Parser, UsageError
from megacpp_nemo.contract import HybridRecipe, field_paths
from megacpp_nemo.planner.gpus import DEFAULT_GPU, GPUS, PlanError

# What Python calls `balance(recipe, pp=4)` is `--pp 4` here.
_NAMES = "pp|vpp|count|gpu|recompute|reserve|tokens_per_second|step_seconds"
_KEYWORD = re.compile(rf"(?<![\w.-])({_NAMES})(?:_gib)?=('?)([^\s,']*)\2")


def add_gpu(made: Parser) -> None:
    """Add the GPU that is planned for."""
    names = f"{', '.join(GPUS)}; {DEFAULT_GPU} by default"
    made.add("--gpu", metavar="G", default=DEFAULT_GPU, help=names)


def add_efficiency(made: Parser) -> None:
    """Add the share of the peak that a prediction takes arithmetic to reach."""
    from megacpp_nemo.planner.prediction import EFFICIENCY

    made.add(
        "--efficiency",
        metavar="E",
        help=f"share of the peak that the prediction takes; {EFFICIENCY} by default",
    )


def number(
    option: str,
    text: str | None,
    example: str,
    *,
    zero: bool = False,
    most: float = math.inf,
) -> float | None:
    """Return the number that an option was given; None if it was not.

    Args:
        option: The option.
        text: Its value.
        example: A value that it takes.
        zero: Whether it may be 0; it is above otherwise.
        most: What it is at most.

    Raises:
        UsageError: If it is no such number.
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if (value > 0 or (zero and value == 0)) and value <= most and math.isfinite(value):
        return value
    allowed = "a number, 0 or more" if zero else "a number above 0"
    if most < math.inf:
        allowed += f", at most {most:g}"
    raise UsageError(
        f"{option} takes {allowed}",
        given=f"{option} {text!r}",
        allowed=allowed,
        hint=f"{option} {example}",
    )


def plan_command(
    given: argparse.Namespace, recipe: HybridRecipe, changes: Mapping[str, Any]
) -> str:
    """Return the command that plans the recipe of some words with fields set otherwise."""
    name, *own = parts_of(given.words[0])
    fields, mode = read_changes([*own, *given.words[1:]])
    mode, leaves = mode or given.mode, field_paths(recipe)
    new = {path: value for path, value in changes.items() if str(leaves[path]) != str(value)}
    words = words_of({_short(path): value for path, value in {**fields, **new}.items()})
    command = ["megacpp plan", name, *map(shlex.quote, words)]
    return " ".join([*command, *([f"--mode {mode}"] if mode else [])])


def _short(path: str) -> str:
    """Return a field of the layout or the batch by its own name, which no other field has."""
    head, _, name = path.partition(".")
    return name if head in ("parallelism", "batch") else path


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Say what the planner refuses with options where it has keywords.

    Raises:
        PlanError: What was refused.
    """
    try:
        yield
    except PlanError as error:
        parts = {
            name: None if part is None else _KEYWORD.sub(_option, str(part))
            for name, part in (
                ("given", error.given),
                ("allowed", error.allowed),
                ("hint", error.hint),
            )
        }
        raise PlanError(error.what, **parts) from None


def _option(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')} {match[3]}"
