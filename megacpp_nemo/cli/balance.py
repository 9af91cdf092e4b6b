"""`megacpp balance`: stage boundaries that even out a pipeline."""

from __future__ import annotations

import argparse

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.parts import Part, drawn
from megacpp_nemo.cli.planning import in_options, plan_command
from megacpp_nemo.cli.usage import Parser, add_recipe_options, whole_number
from megacpp_nemo.planner.balance import Balance, balance
from megacpp_nemo.report.numbers import share, work


def parser(name: str) -> Parser:
    """Return what `megacpp balance` takes."""
    made = Parser(
        name,
        "RECIPE [FIELD=VALUE ...] --pp N [--vpp N] [--mode M] [--format F] ...",
        "Print the stage boundaries with which the most loaded pipeline stage has least to do:\n"
        "the pattern with '|', the load of every stage, and how much better it is than the even\n"
        "cut. Embedding, output head and prediction depths count where they lie.",
        (
            "megacpp balance nam56r --pp 4",
            "megacpp balance nam56r --pp 2 --vpp 2 --format json",
        ),
        ("text", "json", "md"),
    )
    add_recipe_options(made)
    made.add("--pp", metavar="N", type=whole_number(1), required=True, help="pipeline stages")
    made.add(
        "--vpp",
        metavar="N",
        type=whole_number(1),
        default=1,
        help="virtual chunks on each stage; 1 by default",
    )
    return made


def run(given: argparse.Namespace) -> str:
    """Return the proposed boundaries in the format asked for.

    Raises:
        MegaCppError: If the words mean no recipe, or its layers cannot be cut so.
    """
    if not given.words:
        parser(given.command).refuse(
            "balance needs a recipe", "none", hint="megacpp balance nam56r --pp 2"
        )
    recipe = read_recipe(given.words[0], given.words[1:], given.mode)
    with in_options():
        found = balance(recipe, given.pp, given.vpp)
    if given.format == "json":
        return to_json({"schema": 1, "recipe": recipe.name, **found.to_dict()})
    chunks = f" x {given.vpp} chunks" if given.vpp > 1 else ""
    cut = f"{given.pp} stage{'s' * (given.pp > 1)}{chunks}"
    shown = _parts(found, plan_command(given, recipe, found.changes))
    return drawn(f"{recipe.name} in {cut}", shown, given.format, given.screen)


def _parts(found: Balance, command: str) -> list[Part]:
    mean = sum(found.loads) / found.stages
    segments, even = found.pattern.split("|"), found.even_pattern.split("|")
    rows = []
    for stage, (load, other) in enumerate(
        zip(found.stage_loads, found.even_stage_loads, strict=True)
    ):
        rows.append(
            (
                str(stage + 1),
                " ".join(segments[stage :: found.stages]),
                work(load),
                share(load, mean),
                " ".join(str(len(part)) for part in even[stage :: found.stages]),
                work(other),
                share(other, mean),
            )
        )
    head = ("stage", "layers", "training/token", "of the mean", "even", "training/token", "")
    most, worst = max(found.stage_loads), max(found.even_stage_loads)
    times = f"{found.factor:.2f} times as much" if found.factor > 1 else "the same"
    return [
        Part(
            head=head,
            rows=rows,
            notes=(
                f"The most loaded stage has {work(most)} per token to do. That of the even cut "
                f"has {work(worst)}, {times}. A stage's load includes what it has beside layers.",
            ),
        ),
        Part(title="Pattern", code=(found.pattern,)),
        Part(title="Take it", code=(command,)),
    ]
