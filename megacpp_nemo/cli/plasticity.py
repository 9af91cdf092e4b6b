"""`megacpp plasticity`: what a lever would touch in a recipe's model; what one did in a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.screen import Cell, Screen
from megacpp_nemo.cli.usage import Parser, UsageError, add_recipe_options, whole_number
from megacpp_nemo.contract.parameters import TARGETS, Selection
from megacpp_nemo.lowering.features import ranges
from megacpp_nemo.planner.levers import FireCost, Placed, fire_cost, placement
from megacpp_nemo.planner.parameters import parameters

REPORT = "report"


def parser(name: str) -> Parser:
    """Return what `megacpp plasticity` takes."""
    made = Parser(
        name,
        "RECIPE [FIELD=VALUE ...] [--target T] [--families F] [--layers L] ... | report RUN",
        "Print which matrices of a recipe's model a lever acts on, and why it leaves the rest\n"
        "alone. A fused matrix is told by its parts.\n\n"
        "`report RUN` draws what the levers of a run did and measured, from its journal.\n\n"
        "targets:\n"
        + "\n".join(f"  {target:<13} {words}" for target, (words, _) in TARGETS.items()),
        (
            "megacpp plasticity nam56r",
            "megacpp plasticity nam56r --target attention_qk --format json",
            "megacpp plasticity nam56r_tiny --target experts --layers 2,4",
            "megacpp plasticity report runs/nam56r_tiny --folder report",
        ),
        ("text", "json"),
    )
    add_recipe_options(made)
    made.add("--folder", metavar="DIR", help="where `report` writes; the run's own by default")
    made.add("--target", metavar="T", default="all", help=f"{', '.join(TARGETS)}; all by default")
    made.add("--families", metavar="F", default="", help="letters or names, as in A,M")
    made.add("--layers", metavar="L", default="", help="1-based numbers, as in 1,5,9")
    made.add(
        "--iterations",
        metavar="N",
        type=whole_number(1),
        help="FIRE's iterations to count a matrix with; what was measured by default",
    )
    return made


def run(given: argparse.Namespace) -> str:
    """Return the placement of a lever, or draw a run's report.

    Raises:
        MegaCppError: If the words mean no recipe or run, or nothing is selected.
    """
    if not given.words:
        parser(given.command).refuse(
            "plasticity needs a recipe, or a run to report on", "none", "megacpp plasticity nam56r"
        )
    if given.words[0] == REPORT:
        from megacpp_nemo.cli.plasticity_report import report

        return report(given)
    recipe = read_recipe(given.words[0], given.words[1:], given.mode)
    selection = Selection(
        target=given.target,
        families=tuple(filter(None, given.families.split(","))),
        layers=_numbers(given.layers),
    )
    placed = placement(parameters(recipe), selection)
    chosen = [item for item in placed if item.refusal is None]
    selection.check(recipe.layers, len(chosen))
    cost = fire_cost(placed, iterations=given.iterations)
    if given.format == "json":
        return to_json(_data(recipe.name, selection, placed, cost))
    return _text(f"{recipe.name}, target {selection.target}", placed, cost, given)


def _numbers(text: str) -> tuple[int, ...]:
    words = list(filter(None, text.split(",")))
    if not all(word.strip().isdecimal() for word in words):
        raise UsageError(
            "Layers are given by their numbers",
            given=f"--layers {text}",
            allowed="1-based numbers with commas between",
            hint="--layers 1,5,9",
        )
    return tuple(int(word) for word in words)


class _Group(NamedTuple):
    """Matrices that are alike in all layers."""

    what: str
    shape: tuple[int, ...]
    kind: str
    family: str
    refusal: str | None


def _groups(placed: Iterable[Placed]) -> dict[_Group, list[Placed]]:
    found: dict[_Group, list[Placed]] = {}
    for item in placed:
        parameter = item.parameter
        what = re.sub(r"^decoder\.layers\.\d+\.", "", item.name)
        what = re.sub(r"^mtp\.layers\.\d+\.", "mtp.layers.*.", what)
        what = re.sub(r"\.experts\.\d+\.", ".experts.*.", what)
        family = parameter.family.letter if parameter.family else ""
        # Layers that are left alone by number are one group, whatever their numbers.
        refusal = item.refusal and re.sub(r"^layer \d+ is", "its layer is", item.refusal)
        key = _Group(what, item.shape, parameter.kind.value, family, refusal)
        found.setdefault(key, []).append(item)
    return found


def _text(
    title: str,
    placed: Sequence[Placed],
    cost: FireCost,
    given: argparse.Namespace,
) -> str:
    screen: Screen = given.screen
    groups = _groups(placed)
    chosen = [item for item in placed if item.refusal is None]
    total = sum(item.size for item in placed)
    share = sum(item.size for item in chosen)
    parts = [
        screen.heading(title),
        f"{len(chosen)} matrices, {share:,} of {total:,} parameters ({share / total:.1%}).",
        "",
        screen.heading("Touched"),
        _table(screen, {key: own for key, own in groups.items() if key.refusal is None}),
        "",
        screen.heading("Left alone"),
        _table(screen, {key: own for key, own in groups.items() if key.refusal is not None}),
    ]
    parts += [
        "",
        screen.wrapped(
            f"One pass of FIRE: about {cost.flops / 1e12:,.3g} TFLOP, and "
            f"{cost.extra_bytes / 2**20:,.1f} MiB beside the weights."
        ),
    ]
    return "\n".join(parts) + "\n"


def _table(screen: Screen, groups: dict[_Group, list[Placed]]) -> str:
    if not groups:
        return "nothing"
    reasons = any(key.refusal for key in groups)
    rows: list[list[str | Cell]] = []
    for key, own in groups.items():
        numbers = sorted({item.parameter.layer for item in own if item.parameter.layer})
        shape = " x ".join(map(str, key.shape))
        last = Cell(key.refusal, "dim") if key.refusal else Cell(key.kind)
        rows.append([key.family, key.what, shape, str(len(own)), ranges(numbers), last])
    head = ["", "matrix", "shape", "count", "layers", "why" if reasons else "what it is"]
    return screen.table(head, rows)


def _data(
    name: str,
    selection: Selection,
    placed: Sequence[Placed],
    cost: FireCost,
) -> dict[str, Any]:
    return {
        "schema": 1,
        "recipe": name,
        "selection": vars(selection),
        "fire": vars(cost),
        "matrices": [
            {
                "name": item.name,
                "shape": item.shape,
                "kind": item.parameter.kind.value,
                "layer": item.parameter.layer,
                "family": item.parameter.family.letter if item.parameter.family else None,
                "touched": item.refusal is None,
                "why": item.refusal,
            }
            for item in placed
        ],
    }
