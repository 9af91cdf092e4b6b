"""Lifting: a Megatron command line read back as a recipe.

What the command line says is read into recipe fields; the recipe is then lowered again, and
every difference from what was given is refused by name: a flag that has no place in a recipe,
one that nothing reads, one whose absence means what no recipe says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.recipe import HybridRecipe, with_paths
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.arguments import Arguments, dead_flags, parse
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.ownership import version_of
from megacpp_nemo.lowering.plan import Plan, make_plan
from megacpp_nemo.lowering.releases import Release, load_release
from megacpp_nemo.lowering.structure import structure_of
from megacpp_nemo.lowering.table import ROWS, TABLE, Row

GROUPS = "--group-query-attention"
# Megatron's fallback where a flag is absent and its default is None.
FALLBACK: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model.attention.num_query_groups": lambda args: args.get("--num-attention-heads"),
    "model.attention.head_dim": lambda args: (
        (args.get("--hidden-size") or 0) // (args.get("--num-attention-heads") or 1) or None
    ),
    "model.ffn_hidden_size": lambda args: 4 * (args.get("--hidden-size") or 0) or None,
}


def lift(
    argv: Sequence[str],
    release: str | Release,
    *,
    num_nodes: int = 1,
    devices_per_node: int | None = None,
) -> HybridRecipe:
    """Return the recipe that a Megatron command line describes.

    Args:
        argv: Arguments of the release's entry script for hybrid models.
        release: The release's name, or the path of a release file.
        num_nodes: Machines, which the command line does not say.
        devices_per_node: Processes on each; the fewest that the parallel sizes allow if not
            given.

    Returns:
        A recipe whose lowering is `argv` up to order, and up to flags that only repeat
        Megatron's own default.

    Raises:
        LoweringError: Naming each flag that is unknown, dead, missing or without a place.
        PatternError, RecipeError: If the settings do not make a recipe.
    """
    known = release if isinstance(release, Release) else load_release(release)
    arguments = parse(argv, known)
    values = dict(arguments)
    structure = structure_of(values, known)
    fields = {
        **_given(values, known),
        **structure,
        "parallelism.num_nodes": num_nodes,
        "parallelism.devices_per_node": devices_per_node or _fewest(values, num_nodes),
        **_sizes(values),
        **_switches(values),
    }
    recipe = with_paths(HybridRecipe(), fields)
    plan = make_plan(recipe, known)
    fields |= _read(values, plan)
    recipe = with_paths(HybridRecipe(), fields)
    _compare(arguments, lower(recipe, release=known), known)
    return recipe


def _given(values: Mapping[str, Any], release: Release) -> dict[str, Any]:
    """Return what each given flag says by itself, whether or not a layer reads it."""
    version = version_of(release.package_version)
    return {
        row.field: row.flags[-1].back(_single(values[row.flags[-1].flag], row))
        for row in ROWS
        if row.owner not in ("policy", "pattern") and row.field not in SEVERAL and row.flags
        if row.flags[-1].flag in values and row.flags[-1].in_version(version)
    }


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parallel sizes, which decide how the pattern may be cut."""
    found = {
        row.field: values[spelling.flag]
        for row in ROWS
        if row.field.startswith("parallelism.")
        for spelling in row.flags
        if spelling.flag in values
    }
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        found.setdefault(f"parallelism.{name}", False)
    return found


def _fewest(values: Mapping[str, Any], num_nodes: int) -> int:
    """Return the fewest processes per machine that the parallel sizes allow."""

    def product(*kinds: str) -> int:
        sizes = [values.get(f"--{kind}-parallel-size") or 1 for kind in kinds]
        return max(1, math.prod(map(int, sizes)))

    tensor = "expert-tensor" if values.get("--expert-tensor-parallel-size") else "tensor-model"
    dense = product("tensor-model", "pipeline-model", "context")
    experts = product("expert-model", tensor, "pipeline-model")
    nodes = num_nodes if isinstance(num_nodes, int) and num_nodes > 0 else 1
    return math.lcm(dense, experts, nodes) // nodes


def _switches(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that several flags, or the absence of one, say."""
    precision = Precision.BF16 if values.get("--bf16") else Precision.FP32
    if values.get("--fp8-format"):
        precision = Precision.FP8_EXPERTS
    activation = "gelu"
    for flag, name in (("--swiglu", "swiglu"), ("--squared-relu", "squared_relu")):
        activation = name if values.get(flag) else activation
    return {
        "precision": precision,
        "model.experts.activation": activation,
    }


SEVERAL = ("precision", "model.experts.activation")


def _read(values: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the fields that one flag says, where a layer reads it."""
    fields: dict[str, Any] = {}
    missing = []
    for row in ROWS:
        if row.owner in ("policy", "pattern") or row.field in SEVERAL:
            continue
        spelling = next((s for s in reversed(row.flags) if _read_by(s, row, plan)), None)
        if spelling is None:
            continue
        value = values.get(spelling.flag, plan.release.flags[spelling.flag].default)
        if row.field == "model.attention.num_query_groups" and not values.get(GROUPS):
            value = None
        if value is None and row.field in FALLBACK:
            value = FALLBACK[row.field](values)
        if value is None and row.field in ("model.experts.shared_expert_size",):
            value = 0
        if value is None and _optional(row.field):
            continue
        if value is None:
            missing.append(spelling.flag)
            continue
        fields[row.field] = spelling.back(_single(value, row))
    if missing:
        raise LoweringError(
            "The command line leaves open what a recipe has to say",
            given="no " + ", ".join(missing),
            allowed="each of them once",
            hint=" ".join(f"{flag} ..." for flag in missing),
        )
    if plan.release.mtp_separator is None or not plan.native_mtp:
        fields.pop("model.mtp.loss_scaling_factor", None)
    return fields


def _optional(field: str) -> bool:
    return field.startswith("files.") or field == "parallelism.expert_tensor_parallel_size"


def _read_by(spelling: Any, row: Row, plan: Plan) -> bool:
    if row.field.startswith("files."):
        # Whether these are given is what is being asked.
        return True
    return bool(spelling.holds(plan))


def _single(value: Any, row: Row) -> Any:
    """Return a default that stands for a list as a list."""
    several = row.field == "model.experts.aux_loss_coeff"
    return (value,) if several and not isinstance(value, (tuple, list)) else value


def _compare(given: Arguments, lowering: Lowering, release: Release) -> None:
    """Refuse every difference between what was given and what the recipe lowers to."""
    ours = dict(parse(lowering.argv, release))
    theirs = dict(given)
    problems: list[tuple[str, str]] = []
    dead = {item.flag: item.why for item in dead_flags(given, release)}
    fixed = {s.flag for row in TABLE if not row.field for s in row.flags}
    for flag in theirs.keys() | ours.keys():
        default = release.flags[flag].default
        here, there = theirs.get(flag, default), ours.get(flag, default)
        if flag in dead:
            problems.append((flag, f"is dead: {dead[flag]}"))
        elif here == there or (flag not in theirs and _implied(flag, there, theirs)):
            continue
        elif flag not in ours:
            problems.append((flag, "has no place in a recipe"))
        elif flag in fixed and flag not in theirs:
            problems.append((flag, f"is not given: Megatron takes {here!r}, recipes {there!r}"))
        else:
            problems.append((flag, f"is {here!r}, and a recipe can only say {there!r}"))
    if problems:
        problems.sort()
        raise LoweringError(
            "This command line is not one that a recipe can say:\n    "
            + "\n    ".join(f"{flag} {why}" for flag, why in problems),
            given=" ".join(flag for flag, _ in problems),
            allowed="the flags of the correspondence table (megacpp table)",
            hint="without these flags, or with the values above",
        )


def _implied(flag: str, value: Any, theirs: Mapping[str, Any]) -> bool:
    """Whether Megatron would take this value for a flag that is not given."""
    hidden, heads = theirs.get("--hidden-size"), theirs.get("--num-attention-heads")
    implied = {
        "--kv-channels": hidden // heads if hidden and heads else None,
        "--ffn-hidden-size": 4 * hidden if hidden else None,
        "--max-position-embeddings": None,
    }
    return flag in implied and implied[flag] == value
