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
from megacpp_nemo.lowering.arguments import MANY, Arguments, dead_flags, parse
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.plan import Plan, make_plan
from megacpp_nemo.lowering.releases import Flag, Release, load_release
from megacpp_nemo.lowering.structure import structure_of
from megacpp_nemo.lowering.table import ROWS, Row

GROUPS = "--group-query-attention"
# Megatron's fallback where a flag is absent and its default is None.
FALLBACK: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "model.attention.num_query_groups": lambda args: args.get("--num-attention-heads"),
    "model.attention.head_dim": lambda args: (
        (args.get("--hidden-size") or 0) // (args.get("--num-attention-heads") or 1) or None
    ),
    "model.ffn_hidden_size": lambda args: 4 * (args.get("--hidden-size") or 0) or None,
    "model.experts.shared_expert_size": lambda args: 0,
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
    said = {**structure_of(values, known), **_switches(values)}
    fewest = _fewest(values, num_nodes) if devices_per_node is None else devices_per_node
    fields = {
        **said,
        "parallelism.num_nodes": num_nodes,
        "parallelism.devices_per_node": fewest,
        **_sizes(values),
        **_read(values, make_plan(_outline(said, values), known)),
    }
    recipe = with_paths(HybridRecipe(), fields)
    _compare(arguments, lower(recipe, release=known), known)
    return recipe


def _outline(said: Mapping[str, Any], values: Mapping[str, Any]) -> HybridRecipe:
    """Return a recipe with these layers and stages, and no other size of the command.

    It is there to tell which flags are read. Until that is known nothing stands for a flag that
    is not given, and the rules between sizes would speak of sizes that nobody gave.
    """
    stages = values.get("--pipeline-model-parallel-size", 1)
    outline = {
        **{path: value for path, value in said.items() if not path.startswith("plasticity.")},
        "model.latent.layernorm": bool(values.get("--qk-layernorm")),
        "parallelism.pipeline_model_parallel_size": stages,
        "parallelism.devices_per_node": max(stages, 1),
        "batch.micro_batch_size": 1,
        "batch.global_batch_size": max(stages, 1),
    }
    return with_paths(HybridRecipe(), outline)


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parallel sizes, which decide how the pattern may be cut."""
    found = {
        row.field: values[spelling.flag]
        for row in ROWS
        if row.field.startswith("parallelism.") and row.field not in SEVERAL
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
    found = {
        "precision": precision,
        "model.experts.activation": activation,
    }
    # Absent, the name of the spec may still say it.
    recompute = values.get("--recompute-granularity")
    return found | ({RECOMPUTE: recompute} if recompute else {})


RECOMPUTE = "parallelism.recompute"
SEVERAL = ("precision", "model.experts.activation", RECOMPUTE)


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
        flag = plan.release.flags[spelling.flag]
        value = _value(row, flag, values)
        if value is not None:
            fields[row.field] = spelling.back(_listed(value, flag))
        elif not _optional(row.field):
            missing.append(spelling.flag)
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


def _value(row: Row, flag: Flag, values: Mapping[str, Any]) -> Any:
    """Return what a flag says for a row, given or not; None where Megatron has no value either."""
    value = values.get(flag.name, flag.default)
    if row.field == "model.attention.num_query_groups" and not values.get(GROUPS):
        value = None
    return FALLBACK[row.field](values) if value is None and row.field in FALLBACK else value


def _optional(field: str) -> bool:
    return field.startswith("files.") or field == "parallelism.expert_tensor_parallel_size"


def _read_by(spelling: Any, row: Row, plan: Plan) -> bool:
    if spelling.flag not in plan.release.flags:  # of a release file of one's own
        return False
    if row.field.startswith("files."):
        # Whether these are given is what is being asked.
        return True
    return bool(spelling.holds(plan))


def _listed(value: Any, flag: Flag) -> Any:
    """Return a value of a flag that takes several as a tuple, also a default that is just one."""
    return (value,) if flag.nargs in MANY and not isinstance(value, (tuple, list)) else value


def _compare(given: Arguments, lowering: Lowering, release: Release) -> None:
    """Refuse every difference between what was given and what the recipe lowers to."""
    written = parse(lowering.argv, release)
    theirs, ours = dict(given), dict(written)
    dead = {item.flag: item.why for item in dead_flags(given, release)}
    problems: list[tuple[str, str]] = []
    missing: list[str] = []
    for flag in sorted(theirs.keys() | ours.keys()):
        default = release.flags[flag].default
        here, there = theirs.get(flag, default), ours.get(flag, default)
        if flag in dead:
            problems.append((flag, f"is dead: {dead[flag]}"))
        elif _alike(here, there) or (flag not in theirs and _implied(flag, there, theirs)):
            continue
        elif flag not in ours:
            problems.append((flag, "has no place in a recipe"))
        elif flag not in theirs:
            missing.append(" ".join(written.words(flag)))
            takes = "" if isinstance(there, bool) else f" Megatron takes {here!r};"
            problems.append((flag, f"is not given:{takes} add {missing[-1]}"))
        else:
            problems.append((flag, f"is {here!r}, and a recipe can only say {there!r}"))
    if problems:
        raise _unsayable(problems, missing)


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same, a single one and a list of just that included."""
    listed = [tuple(v) if isinstance(v, (tuple, list)) else (v,) for v in (one, other)]
    return listed[0] == listed[1]


def _unsayable(problems: Sequence[tuple[str, str]], missing: Sequence[str]) -> LoweringError:
    hints = ["add " + " ".join(missing)] if missing else []
    if len(problems) > len(missing):
        others = "the other" if missing else "these"
        hints.append(f"without {others} flags, or with the values above")
    return LoweringError(
        "This command line is not one that a recipe can say:\n    "
        + "\n    ".join(f"{flag} {why}" for flag, why in problems),
        given=" ".join(flag for flag, _ in problems),
        allowed="the flags of the correspondence table (megacpp table)",
        hint="; ".join(hints),
    )


def _implied(flag: str, value: Any, theirs: Mapping[str, Any]) -> bool:
    """Whether Megatron would take this value for a flag that is not given."""
    hidden, heads = theirs.get("--hidden-size"), theirs.get("--num-attention-heads")
    implied = {
        "--kv-channels": hidden // heads if hidden and heads else None,
        "--ffn-hidden-size": 4 * hidden if hidden else None,
    }
    return flag in implied and implied[flag] == value
