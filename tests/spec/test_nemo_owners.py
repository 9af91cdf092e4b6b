"""What only a NeMo run has: the classes that stand in its model are those that the seams name."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest

from megacpp_nemo.contract import recipe
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.seams import SEAMS, Kind
from tests.support.processes import in_process

ONE = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "devices_per_node": 1,
}
BARE: dict[str, Any] = {
    "features.ngram_hash": False,
    "features.structure": None,
    "features.reset_state": False,
    "model.mtp.num_layers": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("nam56r_tiny", BARE),
    "n-gram memory": ("nam56r_tiny", {**BARE, "features.ngram_hash": True}),
    "structure channels": ("nam56r_tiny", {**BARE, "features.structure": "core"}),
    "one channel": ("nam56r_tiny", {**BARE, "features.structure": "ast_depth"}),
    "prediction depths": ("nam56r_tiny", {**BARE, "model.mtp.num_layers": 2}),
    "all of it": (
        "nam56r_tiny",
        {
            **BARE,
            "features.ngram_hash": True,
            "features.structure": "all",
            "model.mtp.num_layers": 1,
        },
    ),
    "full size": ("nam56r", ONE),
    "full size with structure": ("nam56r_4096", {**ONE, "features.structure": "core"}),
}


def intent_of(case: str) -> Any:
    name, changes = CASES[case]
    return recipe(name, changes=changes)


def path_of(thing: type) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, str]]:
    """Class of every module of each case's NeMo model by name, all built in one process."""
    import tests.model.building
    import tests.planner.building  # noqa: F401  the process shares its imports

    return in_process(lambda: {case: _classes(case) for case in CASES})


def _classes(case: str) -> dict[str, str]:
    from tests.planner.building import build_stage, rank_of

    logging.disable()
    intent = intent_of(case)
    with rank_of(intent, 0):
        model = build_stage(intent)
        return {name: path_of(type(module)) for name, module in model.named_modules()}


def modules() -> dict[str, str]:
    """Return the seams that a NeMo run has as a module of its model, with its class."""
    from torch import nn

    found = {}
    for seam in SEAMS.values():
        if seam.nemo_owner and seam.kind is not Kind.CALLBACK:
            module, _, name = seam.nemo_owner.rpartition(".")
            if issubclass(getattr(importlib.import_module(module), name), nn.Module):
                found[seam.id] = seam.nemo_owner
    return found


def test_the_input_side_and_prediction_depths_are_modules():
    assert set(modules()) == {"mtp", "ngram-hash", "structure"}


@pytest.mark.parametrize("case", CASES)
def test_the_model_has_the_owners_of_its_seams_and_no_others(case, built):
    classes = list(built[case].values())
    asked = {seam.id for seam in lower(intent_of(case)).seams}
    for seam, owner in modules().items():
        assert classes.count(owner) == (1 if seam in asked else 0), seam


@pytest.mark.parametrize("case", CASES)
def test_the_embedding_is_ours_and_holds_what_is_asked_for(case, built):
    embedding = {
        name.removeprefix("embedding."): owner
        for name, owner in built[case].items()
        if name.startswith("embedding.") and name.count(".") == 1
    }
    features = intent_of(case).features
    own = built[case]["embedding"] == "megacpp_nemo.model.embedding.InputEmbedding"
    # Without any of it the model is Megatron's own.
    assert own == (case != "nothing")
    assert ("ngram_hash" in embedding) == features.ngram_hash
    assert ("structure" in embedding) == bool(features.structure)
    if features.ngram_hash:
        assert embedding["ngram_hash"] == SEAMS["ngram-hash"].nemo_owner
    if features.structure:
        assert embedding["structure"] == SEAMS["structure"].nemo_owner


@pytest.mark.parametrize("seam", [s for s in SEAMS.values() if s.nemo_owner], ids=lambda s: s.id)
def test_what_only_a_nemo_run_has_is_refused_on_megatrons_command_line(seam):
    assert not seam.built
    assert seam.owner == "megacpp_nemo.spec"
    asked = {"ngram-hash": "n-gram memory", "structure": "one channel"}.get(seam.id)
    if asked:
        (item,) = lower(intent_of(asked)).open[:1]
        assert (item.what, item.settle) == (
            f"{seam.what} works in a NeMo run only: the spec refuses it",
            seam.off,
        )
