"""The feature placement receipt: where each feature attaches, and whose it is."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.plasticity import StpLever
from megacpp_nemo.lowering.plan import NATIVE, Plan
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.rows_plasticity import NAMES as LEVER_NAMES
from megacpp_nemo.lowering.rows_plasticity import lever_of
from megacpp_nemo.lowering.seams import SEAMS


class Status(str, enum.Enum):
    """Whose a feature is. An experimental one is a seam that only a NeMo run has yet."""

    NATIVE = "native"
    SEAM = "seam"
    EXPERIMENTAL = "experimental"
    OFF = "off"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature of a model on a release.

    Args:
        name: The feature.
        status: Whose it is.
        place: Where it attaches: layers, A-ranks, ranks or a stage; and when, for a lever.
        seam: Id of its seam; empty if it is native or off.
    """

    name: str
    status: Status
    place: str
    seam: str = ""


MAMBA = (Role.MAMBA, Role.AUTHOR_MAMBA)


def placement(plan: Plan) -> tuple[Feature, ...]:
    """Return every feature, those that are off included."""
    recipe = plan.recipe
    tensor = recipe.parallelism.tensor_model_parallel_size
    embedding = "embedding, first stage" + (f", {tensor} tensor ranks" if tensor > 1 else "")
    depth = recipe.model.mtp.num_layers
    return (
        _of_layers(plan, "MLA", Role.LATENT_ATTENTION),
        _of_layers(plan, "DSA", Role.SPARSE_ATTENTION),
        _of_layers(plan, "MoE", Role.EXPERTS),
        _of_layers(plan, "Mamba path", *MAMBA),
        _of_layers(plan, "M2RNN", Role.RECURRENT),
        _of_seam(
            "MTP",
            depth > 0,
            f"{depth} after the last layer, last stage",
            "" if plan.native_mtp else "mtp",
        ),
        _of_seam("n-gram hash", recipe.features.ngram_hash, embedding, "ngram-hash"),
        _of_seam("structure", bool(recipe.features.structure), embedding, "structure"),
        *(_of_lever(plan, lever, name) for lever, name in LEVER_NAMES.items()),
    )


def _of_layers(plan: Plan, name: str, *roles: Role) -> Feature:
    own = [layer for layer in plan.layers if layer.role in roles]
    if not own:
        return Feature(name=name, status=Status.OFF, place="")
    place = f"layers {ranges(layer.number for layer in own)}"
    if name == "DSA":
        ranks = {number: rank for rank, number in plan.recipe.layers.a_ranks().items()}
        chosen = [ranks[layer.number] for layer in own if layer.number in ranks]
        place += f"; A-ranks {ranges(chosen)}" if chosen else ""
    if name == "Mamba path":
        place += f"; {_mamba_path(plan)}"
    owners = {layer.owner for layer in own} - {NATIVE}
    return _of_seam(name, True, place, min(owners, default=""))


def _mamba_path(plan: Plan) -> str:
    """Return in words how Mamba layers run, as far as a recipe decides it."""
    if plan.has(Role.MAMBA) and plan.is_native(Role.MAMBA):
        return "fused, Megatron's only path"
    demanded = plan.recipe.features.mamba_path
    if demanded != "auto":
        return f"{demanded}, demanded"
    ways = "fused or portable" if plan.has(Role.AUTHOR_MAMBA) else "fused, split or portable"
    return f"{ways}, the first that the machine has"


def _of_lever(plan: Plan, lever: str, name: str) -> Feature:
    own = [seam for seam in plan.seams if seam.id == lever]
    if not own:
        return Feature(name=name, status=Status.OFF, place="")
    place = f"layers {ranges(own[0].layers)}; {_when(lever_of(plan.recipe, lever))}"
    return _of_seam(name, True, place, lever)


def _when(lever: Any) -> str:
    """Return in words when a lever that is on acts."""
    words = []
    if steps := getattr(lever, "steps", ()):
        words.append(f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}")
    if boundaries := getattr(lever, "boundaries", ()):
        words.append(f"{' and '.join(boundaries)} boundaries")
    if interval := getattr(lever, "interval", 0):
        words.append(f"every {interval} steps")
    if interval := getattr(lever, "report_interval", 0):
        words.append(f"reports every {interval} steps")
    if isinstance(lever, StpLever):
        words.append(f"after step {lever.start_step}" if lever.weight else "measured only")
    return ", ".join(words)


def _of_seam(name: str, on: bool, place: str, seam: str) -> Feature:
    if not on:
        return Feature(name=name, status=Status.OFF, place="")
    if not seam:
        return Feature(name=name, status=Status.NATIVE, place=place)
    status = Status.SEAM if SEAMS[seam].built else Status.EXPERIMENTAL
    return Feature(name=name, status=status, place=place, seam=seam)


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text, runs joined: `1, 3-5, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
