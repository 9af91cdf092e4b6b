"""A launch that is not started, as text and as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megacpp_nemo.cli.screen import Screen
from megacpp_nemo.launch.experiment import Dry
from megacpp_nemo.launch.kinds import KINDS
from megacpp_nemo.launch.memory import needed_bytes
from megacpp_nemo.launch.plan import LaunchPlan
from megacpp_nemo.planner.gpus import GIB, GPUS

SCHEMA = 1
LANES = {"nemo": "a NeMo recipe", "megatron": "Megatron-LM's own command"}
INDENT = " " * 11


def launch_text(
    plan: LaunchPlan, dry: Dry, lacking: Sequence[str], *, lane: str, screen: Screen
) -> str:
    """Return a launch for reading: what it is, its environment and its sources, what would run."""
    parts = [
        "\n".join(f"{name:<{len(INDENT) - 1}} {screen.wrapped(text, INDENT)}"
                  for name, text in _facts(plan, lane, dry)),
        *([f"{screen.heading('Still open')}\n" + "\n".join(lacking)] if lacking else []),
        f"{screen.heading('Environment')}\n{_environment(plan, screen)}",
        *(f"{screen.heading(name)}\n{text}" for name, text in dry.scripts.items()),
        f"{screen.heading('What would run')}\n{dry.command}",
    ]  # fmt: skip
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def launch_data(plan: LaunchPlan, dry: Dry, lacking: Sequence[str], *, lane: str) -> dict[str, Any]:
    """Return a launch as JSON's types; `schema` changes when a key changes meaning."""
    layout = plan.layout
    return {
        "schema": SCHEMA,
        "recipe": plan.recipe.name,
        "as": lane,
        "profile": plan.profile and plan.profile.name,
        "hardware": plan.profile and plan.profile.hardware,
        "executor": plan.executor.name,
        "kind": plan.executor.kind,
        "options": dict(plan.executor.options),
        "num_nodes": layout.num_nodes,
        "devices_per_node": layout.devices_per_node,
        "needed_bytes": needed_bytes(plan.recipe),
        "environment": [variable._asdict() for variable in plan.variables],
        "open": list(lacking),
        "scripts": dry.scripts,
        "command": dry.command,
        "folder": dry.folder,
    }


def _facts(plan: LaunchPlan, lane: str, dry: Dry) -> list[tuple[str, str]]:
    layout, batch, profile = plan.layout, plan.recipe.batch, plan.profile
    executor = plan.executor
    options = ", ".join(f"{k}={_word(v)}" for k, v in executor.options.items() if v not in ([], {}))
    size = layout.data_parallel_size * batch.micro_batch_size
    facts = [
        ("recipe", f"{plan.recipe.name}, as {LANES[lane]}"),
        ("profile", f"{profile.name}: {profile.hardware}" if profile else "none"),
        ("executor", f"{executor.name}: {KINDS[executor.kind].what}"),
        ("options", options or "none"),
        ("layout", _layout(plan)),
        ("batch", f"micro {batch.micro_batch_size}, global {batch.global_batch_size}, "
                  f"accumulation {batch.global_batch_size // size}"),
        ("precision", plan.recipe.precision.value),
    ]  # fmt: skip
    needed = needed_bytes(plan.recipe)
    if needed is not None and profile and profile.gpu:
        have = GPUS[profile.gpu].memory_gib
        facts.append(
            ("memory", f"{needed / GIB:.1f} of {have} GiB, on the most loaded process, as planned")
        )
    return [*facts, ("folder", dry.folder)]


def _layout(plan: LaunchPlan) -> str:
    layout = plan.layout
    sequence = " with sequence parallel" if layout.sequence_parallel else ""
    virtual = layout.virtual_pipeline_model_parallel_size
    chunks = f" x {virtual} chunks" if virtual else ""
    nodes = f"{layout.num_nodes} x {layout.devices_per_node} processes"
    return (
        f"{nodes} = tensor {layout.tensor_model_parallel_size}{sequence}, "
        f"pipeline {layout.pipeline_model_parallel_size}{chunks}, "
        f"context {layout.context_parallel_size}, data {layout.data_parallel_size}; "
        f"expert {layout.expert_model_parallel_size}"
    )


def _environment(plan: LaunchPlan, screen: Screen) -> str:
    if not plan.variables:
        return "nothing is set"
    rows = [
        (item.name, item.value, item.source + (f", for {item.instead}" if item.instead else ""))
        for item in plan.variables
    ]
    return screen.table(("variable", "value", "from"), rows)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    return ",".join(value) if isinstance(value, list) else str(value)
