"""`megacpp plan`: what a recipe costs in its layout, before it runs."""

from __future__ import annotations

import argparse
from typing import Any

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.cli.lower import release_of, to_json
from megacpp_nemo.cli.parts import drawn
from megacpp_nemo.cli.planning import add_efficiency, add_gpu, in_options, number
from megacpp_nemo.cli.usage import Parser, add_recipe_options
from megacpp_nemo.contract import HybridRecipe
from megacpp_nemo.contract.parallelism import RECOMPUTE

FORMATS = ("text", "json", "md")


def parser(name: str) -> Parser:
    """Return what `megacpp plan` takes."""
    made = Parser(
        name,
        "RECIPE [FIELD=VALUE ...] [--gpu G] [--recompute R] [--tokens-per-second X] ...",
        "Print what a recipe costs in its layout: parameters and operations by family, memory of\n"
        "a rank of each pipeline stage, what ranks send in a step, how evenly the stages are\n"
        "loaded, and a predicted step. With a measured rate, MFU and its formula.",
        (
            "megacpp plan nam56r",
            "megacpp plan nam56r pipeline_model_parallel_size=4 recompute=full --format json",
            "megacpp plan nam56r --mode author_dp --gpu h100 --tokens-per-second 74000",
        ),
        FORMATS,
    )
    add_recipe_options(made)
    add_gpu(made)
    add_efficiency(made)
    made.add(
        "--recompute", metavar="R", help=f"{', '.join(RECOMPUTE)}; the recipe's field by default"
    )
    made.add(
        "--tokens-per-second",
        metavar="X",
        help="a measured rate of all GPUs together, for the utilization",
    )
    made.add("--step-seconds", metavar="S", help="a measured step, in its place")
    made.add("--layers", action="store_true", help="also list every layer")
    made.add(
        "--release", metavar="R", help="also say which layers this release of Megatron-LM owns"
    )
    return made


def run(given: argparse.Namespace) -> str:
    """Return the plan in the format asked for.

    Raises:
        MegaCppError: If the words mean no recipe, GPU, release or recomputation.
    """
    if not given.words:
        parser(given.command).refuse("plan needs a recipe", "none", hint="megacpp plan nam56r")
    from megacpp_nemo.planner.plan import plan
    from megacpp_nemo.planner.prediction import EFFICIENCY

    recipe = read_recipe(given.words[0], given.words[1:], given.mode)
    share = number("--efficiency", given.efficiency, "0.3", most=1)
    with in_options():
        rate = _rate(recipe, given)
        found = plan(
            recipe,
            gpu=given.gpu,
            recompute=given.recompute,
            tokens_per_second=rate,
            efficiency=share or EFFICIENCY,
        )
    owned = None if given.release is None else _owned(recipe, given.release)
    if given.format == "json":
        return to_json(found.to_dict() | {"release": owned})
    from megacpp_nemo.cli.plan_report import parts, title

    shown = parts(found, layers=given.layers, owned=owned)
    return drawn(title(found), shown, given.format, given.screen)


def _rate(recipe: HybridRecipe, given: argparse.Namespace) -> float | None:
    rate = number("--tokens-per-second", given.tokens_per_second, "74000")
    seconds = number("--step-seconds", given.step_seconds, "3.5")
    if seconds is None:
        return rate
    if rate is not None:
        parser(given.command).refuse(
            "A rate and a step say the same",
            f"--tokens-per-second {given.tokens_per_second}, --step-seconds {given.step_seconds}",
            f"--tokens-per-second {given.tokens_per_second} alone",
        )
    from megacpp_nemo.planner.utilization import tokens_per_second

    return tokens_per_second(recipe, seconds)


def _owned(recipe: HybridRecipe, release: str) -> dict[str, Any]:
    """Return how many layers a release owns, and what else is to be said of it."""
    from megacpp_nemo.lowering.lower import lower

    lowering = lower(recipe, release=release_of(release))
    layers = lowering.layers
    return {
        "name": lowering.release,
        "native_layers": [layer.number for layer in layers if layer.native],
        "custom_layers": [layer.number for layer in layers if not layer.native],
        "seams": [seam.id for seam in lowering.seams],
    }
