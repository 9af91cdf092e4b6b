"""Refusals before training starts: what would be silently wrong, or cannot run here.

Each check collects every reason it finds, so that one message names all there is to change.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.rules import check_layout

BUILT = (
    BlockFamily.ATTENTION,
    BlockFamily.SPARSE_ATTENTION,
    BlockFamily.EXPERTS,
    BlockFamily.MAMBA,
    BlockFamily.RECURRENT,
)


def missing_packages(names: Iterable[str]) -> list[str]:
    """Return those of the import names that are not installed, as package names."""
    return [name.replace("_", "-") for name in names if importlib.util.find_spec(name) is None]


def require_packages(config: Any) -> None:
    """Refuse a configuration whose required packages are not installed.

    Raises:
        RuntimeRefusal: Naming the missing packages.
    """
    if missing := missing_packages(config.required_packages):
        raise RuntimeRefusal(
            f"This model needs packages that are not installed: {', '.join(missing)}",
            given=f"required_packages={tuple(config.required_packages)}",
            allowed="a machine with these packages, such as a GPU container",
            hint="the _tiny or _smoke recipes, which train without them; or "
            "pip install 'megacpp-nemo[gpu]' on a CUDA machine",
        )


def refuse_unbuilt(config: Any, *, engine: bool | None = None) -> None:
    """Refuse what a configuration asks for and no layer would carry out.

    Upstream takes several of these settings and builds nothing for them.

    Args:
        config: The model's.
        engine: Whether Transformer Engine is where it will run; looked for here if not given.

    Raises:
        RuntimeRefusal: Naming every such setting and what turns it off.
    """
    asked = [reason for reason in _unbuilt(config, engine) if reason is not None]
    if asked:
        raise RuntimeRefusal(
            "The model asks for what is not built here:\n    "
            + "\n    ".join(what for what, _, _ in asked),
            given=", ".join(given for _, given, _ in asked),
            allowed="settings that a layer of the model carries out",
            hint=", ".join(off for _, _, off in asked),
        )


def _unbuilt(config: Any, engine: bool | None) -> list[tuple[str, str, str] | None]:
    from megacpp_nemo.host.compat import transformer_engine_available

    if engine is None:
        engine = transformer_engine_available()
    families = [f for f in config.families if f not in BUILT]
    depth = f", mtp_pattern {config.mtp_pattern}" if config.mtp_num_layers else ""
    return [
        _when(
            families,
            "layers of these families: " + ", ".join(f.name.lower() for f in families),
            f"pattern {config.hybrid_override_pattern}{depth}",
            "a pattern of A, D, E, M and R",
        ),
        _when(
            config.context_parallel_size > 1,
            f"{_whole_rows(config)} under context parallelism",
            f"context_parallel_size={config.context_parallel_size}",
            "context_parallel_size=1",
        ),
        _when(
            config.virtual_pipeline_model_parallel_size,
            "virtual pipeline stages of a hybrid model",
            f"virtual_pipeline_model_parallel_size={config.virtual_pipeline_model_parallel_size}",
            "virtual_pipeline_model_parallel_size=None",
        ),
        _when(
            config.fp8 and not engine,
            "FP8 without Transformer Engine",
            f"fp8={config.fp8!r}",
            "precision='bf16', or install transformer-engine",
        ),
        _when(
            config.fp8 and not config.experts,
            "FP8 in expert layers, of which the model has none",
            f"fp8={config.fp8!r}, experts=False",
            "precision='bf16'",
        ),
        _when(
            config.reset_attention_mask and engine,
            "attention within documents on Transformer Engine's attention",
            "reset_attention_mask=True",
            "reset_attention_mask=False",
        ),
    ]


def _whole_rows(config: Any) -> str:
    """Return what of the model reads whole rows, of which context parallelism leaves parts."""
    parts = ["recurrent layers"]
    if config.ngram_hash:
        parts.append("an n-gram memory")
    if config.structure:
        parts.append("structure channels")
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if parts[1:] else parts[0]


def _when(asked: Any, what: str, given: str, off: str) -> tuple[str, str, str] | None:
    return (what, given, off) if asked else None


def refuse_layout(config: Any, *, world_size: int) -> None:
    """Refuse parallel sizes that the model does not divide over, or that train wrongly.

    Raises:
        RecipeError: If heads, experts, layers or tokens do not divide.
        RuntimeRefusal: If every expert-parallel rank would draw the same experts.
    """
    from megacpp_nemo.model.shape import parallelism_of, shape_of

    model, features = shape_of(config)
    check_layout(config.layers, model, features, parallelism_of(config, world_size=world_size))
    if config.expert_model_parallel_size > 1 and config.use_cpu_initialization:
        raise RuntimeRefusal(
            "Megatron's CPU initialization draws the same experts on every expert-parallel rank",
            given=f"use_cpu_initialization=True, "
            f"expert_model_parallel_size={config.expert_model_parallel_size}",
            allowed="use_cpu_initialization=False, which seeds each rank's experts apart",
            hint="model.config.use_cpu_initialization=False",
        )


def refuse_resume(*, resuming: bool, distributed_optimizer: bool, on_cpu: bool) -> None:
    """Refuse to resume the distributed optimizer on a CPU, where it diverges.

    Without a fused optimizer, Megatron restores one `step` tensor shared by all parameters.

    Raises:
        RuntimeRefusal: If that combination is about to run.
    """
    if resuming and distributed_optimizer and on_cpu:
        raise RuntimeRefusal(
            "Resuming the distributed optimizer on a CPU diverges from the second step",
            given="use_distributed_optimizer=True, a checkpoint to resume, no CUDA device",
            allowed="the plain optimizer on a CPU, or a CUDA device",
            hint="use_distributed_optimizer=False from the start of the run",
        )


def refuse_other_optimizers(optimizers: Any, states: Any, expert_parallel: int) -> None:
    """Refuse optimizer state that was saved by another number of Megatron optimizers.

    Megatron gives experts an optimizer of their own where they are split over ranks; n-gram
    tables in host memory have one, too.

    Raises:
        RuntimeRefusal: If the numbers differ.
    """
    for optimizer, state in zip(optimizers, states, strict=False):
        inner = getattr(optimizer, "mcore_optimizer", optimizer)
        have = len(getattr(inner, "chained_optimizers", [inner]))
        saved = _saved_optimizers(state, have)
        if have != saved:
            raise RuntimeRefusal(
                "The optimizer state belongs to another expert-parallel layout, or to n-gram "
                "tables in another place",
                given=f"state of {saved} optimizers, and "
                f"expert_model_parallel_size={expert_parallel} makes {have}",
                allowed="the expert_model_parallel_size and ngram_placement the checkpoint was "
                "saved with",
                hint="those, or the checkpoint's weights alone: "
                "resume.restore_config=RestoreConfig(path=...)",
            )


def _saved_optimizers(state: Any, have: int) -> int:
    """Return by how many optimizers a state was saved that was read into one of `have`.

    One has its state by names, several by number. What was asked for stays where the checkpoint
    has nothing: names beside numbers, and moments without a step count.
    """
    numbered = [part for key, part in state.items() if isinstance(key, int)]
    if len(numbered) < len(state):
        return 1 if have > 1 or not numbered else len(numbered)
    asked = [part for part in numbered if part.get("state") and "common_step" not in part["state"]]
    return len(numbered) - len(asked)


def check_optimizer_steps(optimizer: Any, *, expected: int) -> None:
    """Check that every restored optimizer step count is the checkpoint's.

    Args:
        optimizer: Megatron's optimizer, chained or not.
        expected: Steps taken when the checkpoint was saved.

    Raises:
        RuntimeRefusal: If any parameter's step count is another.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        for state in getattr(inner, "state", {}).values():
            step = state.get("step")
            if step is not None and int(step) != expected:
                raise RuntimeRefusal(
                    "The optimizer was restored with a wrong step count",
                    given=f"step {int(step)} after loading a checkpoint of step {expected}",
                    allowed=f"step {expected} for every parameter",
                    hint="another checkpoint, or start the optimizer anew",
                )
