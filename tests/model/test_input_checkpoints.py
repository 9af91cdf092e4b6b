"""A checkpoint has the input embedding once, however many pipeline stages hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.dist_checkpointing import validation
from megatron.core.dist_checkpointing.mapping import apply_factories

from megacpp_nemo.model import hybrid, ngram, structure
from tests.model.building import build_model, megatron, small_config
from tests.model.test_input_layouts import DEPTHS, inputs_of
from tests.model.test_sharding import PIPELINE, TENSOR, load, read_whole, save
from tests.support.processes import in_processes

pytestmark = pytest.mark.two_process

BOTH = {**TENSOR, **PIPELINE}


def resave(pattern: str, layout: dict[str, Any], start: Path | None, folder: Path) -> None:
    """Save the weights of `start`, or shaken initial ones, from this layout."""
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    with megatron(**sizes):
        model = build_model(small_config(pattern, **layout, **DEPTHS))
        if start is not None:
            load(model, start)
        save(model, folder)


def test_a_checkpoint_moves_between_tensor_ranks_and_stages_with_copies(tmp_path):
    moves = [("AE|MR", BOTH, 4), ("AE|MR", PIPELINE, 2), ("AEMR", TENSOR, 2)]
    start, folders = None, []
    for number, (pattern, layout, ranks) in enumerate(moves):
        folders.append(tmp_path / str(number))
        in_processes(resave, pattern, layout, start, folders[-1], ranks=ranks)
        start = folders[-1]
    first, *others = read_whole(*folders)
    inputs = {key: value for key, value in first.items() if key.startswith("embedding.")}
    assert len(inputs) == 6
    assert inputs["embedding.ngram_hash.table.weight"].shape[1] == DEPTHS["ngram_dim"]
    for other in others:
        assert first.keys() == other.keys()
        assert not [key for key in first if not numpy.array_equal(first[key], other[key])]


def refusal_of_shards(main: str) -> str | None:
    """Return why the shards of two stages are refused, when `main` has the first replica."""
    with megatron(**PIPELINE):
        if main == "both":
            hybrid.as_replicas = lambda *_: None
        model = build_model(small_config("A|M", **PIPELINE, **DEPTHS))
        state = model.sharded_state_dict()
        apply_factories(state)
        if main == "neither":
            hybrid.as_replicas(state, "embedding.")
        _, metadata = validation.determine_global_metadata(state)
        try:
            validation.validate_sharding_integrity(metadata)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None


@pytest.mark.parametrize("main", ["first", "both", "neither"])
def test_each_tensor_has_one_main_replica_or_the_save_is_refused(main):
    said = in_processes(refusal_of_shards, main, ranks=2)[0]
    if main == "first":
        assert said is None
    else:
        assert said.startswith("CheckpointingException: Invalid access pattern")


def test_a_stages_initial_copy_is_the_first_stages_whatever_either_draws():
    def initial() -> dict[str, Any]:
        def draw(weight: Any, *_: object, **__: object) -> None:
            weight.data.normal_()

        ngram.normal_rows = structure.normal_rows = draw
        with megatron(**PIPELINE):
            model = build_model(small_config("A|M", **PIPELINE, **DEPTHS), shake=False)
            return {
                name: (weight.detach().numpy(), getattr(weight, "shared", False))
                for name, weight in inputs_of(model).items()
            }

    first, last = in_processes(initial, ranks=2)
    assert first.keys() == last.keys()
    for name, (weight, counts_elsewhere) in first.items():
        assert numpy.array_equal(weight, last[name][0]), name
        # The norm of the gradients counts each once.
        assert (counts_elsewhere, last[name][1]) == (False, True), name
