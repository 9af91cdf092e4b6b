"""Training with the n-gram memory and the structure channels, however it is laid over processes.

With prediction depths the last pipeline stage has a copy of the whole input embedding. Megatron's
own schedule, gradient buffers and optimizer run here, as in a training run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.model.tied import refuse_drift, with_copies
from tests.model.building import (
    boundaries_of,
    build_model,
    megatron,
    random_tokens,
    small_config,
)
from tests.model.test_sharding import ONE, PIPELINE, TENSOR, load, read_whole, save
from tests.support.processes import in_processes

pytestmark = pytest.mark.two_process

INPUTS: dict[str, Any] = {
    "ngram_hash": True,
    "ngram_table_size": 40,
    "ngram_dim": 4,
    "structure": "all",
    "structure_bottleneck": 8,
    # Its ratio depends on which tokens are seen together.
    "moe_aux_loss_coeff": 0.0,
}
DEPTHS = {**INPUTS, "mtp_num_layers": 2, "mtp_pattern": "AE"}
STEPS, MICRO_BATCHES, ROWS, SEQ = 4, 2, 2, 16
LENGTHS = [[5, 1, 10], [16], [3, 13], [8, 8]]


def train(
    folder: Path,
    pattern: str,
    layout: dict[str, Any],
    start: Path | None,
    changes: dict[str, Any],
    buffers: dict[str, Any],
) -> dict[str, Any]:
    """Train this process's part of a model, and save its first and its last weights.

    Returns losses and gradient norms by step, and what the input embedding held after each.
    """
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    with megatron(**sizes):
        config = small_config(pattern, **layout, **changes)
        config.finalize_model_grads_func = with_copies(finalize_model_grads)
        model = build_model(config)
        if start is not None:
            load(model, start)
        save(model, folder / "first")
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(**buffers), model)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=1e-2,
                clip_grad=0.5,
                # Adam would otherwise make steps of the rounding of gradients near zero.
                adam_eps=1e-3,
                use_distributed_optimizer=buffers.get("use_distributed_optimizer", False),
            ),
            [wrapped],
        )
        found: dict[str, Any] = {"losses": [], "norms": [], "inputs": []}
        for step in range(STEPS):
            optimizer.zero_grad()
            found["losses"].append(run_step(wrapped, config, step))
            found["norms"].append(float(optimizer.step()[1]))
            if hasattr(model, "embedding"):
                found["inputs"].append(
                    {name: w.detach().clone().numpy() for name, w in inputs_of(model).items()}
                )
        save(model, folder / "last")
        if buffers:
            save_optimizer(optimizer, model, folder / "optimizer")
        return found


def save_optimizer(optimizer: Any, model: nn.Module, folder: Path) -> None:
    """Save the distributed optimizer's state as NeMo does by default."""
    kind = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
    state = optimizer.sharded_state_dict(model.sharded_state_dict(), metadata=kind)
    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))


def inputs_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.embedding.named_parameters())


def run_step(model: nn.Module, config: Any, step: int) -> float | None:
    """Run forward and backward over this data-parallel rank's rows; return its mean loss."""
    ranks = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    rows = ROWS // ranks
    share = [slice(at + rank * rows, at + (rank + 1) * rows) for at in range(0, 4, ROWS)]
    batch = whole_batch(step)
    found: list[float] = []

    def forward(iterator: Iterator[slice], stage: nn.Module) -> tuple[Tensor, Any]:
        own = next(iterator)
        tokens = batch["tokens"][own]
        losses = stage(
            tokens,
            torch.arange(SEQ).expand_as(tokens),
            None,
            labels=batch["labels"][own],
            packed_seq_params=boundaries_of(*LENGTHS[own]),
            structure={name: ids[own] for name, ids in batch["structure"].items()},
        )

        def loss_of(losses: Tensor) -> tuple[Any, ...]:
            found.append(losses.mean().item())
            if config.calculate_per_token_loss:
                return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}
            return losses.mean(), {}

        return losses, loss_of

    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(share),
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQ,
        micro_batch_size=rows,
        forward_only=False,
    )
    return sum(found) / len(found) if found else None


@functools.cache
def whole_batch(step: int) -> dict[str, Any]:
    """Return rows of a step: all of every micro-batch and data-parallel rank."""
    rows = MICRO_BATCHES * ROWS
    draw = torch.Generator().manual_seed(step)
    return {
        "tokens": random_tokens(rows, SEQ, seed=2 * step),
        "labels": random_tokens(rows, SEQ, seed=2 * step + 1),
        "structure": {
            name: torch.randint(0, values + 1, (rows, SEQ), generator=draw)
            for name, values in STRUCTURE_CHANNELS.items()
        },
    }


def compare(
    tmp_path: Path, pattern: str, layout: dict[str, Any], ranks: int = 2, **changes: Any
) -> list[dict[str, Any]]:
    """Assert that a layout trains as one process does; return what its ranks found.

    `buffers` among the changes are of Megatron's gradient buffers.
    """
    buffers = changes.pop("buffers", {})
    alone = pattern.replace("|", "")
    a, b = tmp_path / "one", tmp_path / "many"
    (expected,) = in_processes(train, a, alone, ONE, None, changes, {})
    found = in_processes(train, b, pattern, layout, a / "first", changes, buffers, ranks=ranks)
    losses = [each["losses"] for each in found if each["losses"][0] is not None]
    numpy.testing.assert_allclose(numpy.mean(losses, axis=0), expected["losses"], rtol=1e-5)
    for each in found:
        numpy.testing.assert_allclose(each["norms"], expected["norms"], rtol=1e-5)
    first, loaded, last, trained = read_whole(a / "first", b / "first", a / "last", b / "last")
    assert first.keys() == loaded.keys() == last.keys() == trained.keys()
    for key in first:
        assert numpy.array_equal(first[key], loaded[key]), key
        numpy.testing.assert_allclose(trained[key], last[key], rtol=1e-5, atol=1e-6, err_msg=key)
        if key.startswith("embedding."):
            assert (first[key] != last[key]).any(), key
    return found


def assert_equal_inputs(*stages: dict[str, Any]) -> None:
    """Assert that stages had the same input embedding to the bit after every step."""
    first, *others = (stage["inputs"] for stage in stages)
    assert len(first) == STEPS
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one.keys() == two.keys()
            assert not [name for name in one if not numpy.array_equal(one[name], two[name])]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_pipeline_stages_with_depths_train_as_one_process_does(tmp_path, tied):
    changes = {**DEPTHS, "share_embeddings_and_output_weights": tied}
    first, last = compare(tmp_path, "AE|MR", PIPELINE, **changes)
    assert_equal_inputs(first, last)


def test_two_tensor_ranks_train_as_one_process_does(tmp_path):
    first, second = compare(tmp_path, "AEMR", TENSOR, **DEPTHS)
    # What is whole on every tensor rank stays equal; the tables of n-grams are split.
    for one, two in zip(first["inputs"], second["inputs"], strict=True):
        for name in one:
            equal = numpy.array_equal(one[name], two[name])
            assert equal == name.startswith("structure."), name


def test_stages_of_several_processes_share_an_optimizer_and_stay_equal(tmp_path):
    changes = {**DEPTHS, "calculate_per_token_loss": True}
    buffers = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    found = compare(tmp_path, "AE|MR", PIPELINE, ranks=4, buffers=buffers, **changes)
    assert_equal_inputs(*found)
    assert (tmp_path / "many" / "optimizer" / "metadata.json").is_file()


def test_a_strategy_that_would_let_the_copies_drift_is_refused():
    def stage(finalize: Any, **inputs: Any) -> Any:
        config = SimpleNamespace(
            finalize_model_grads_func=finalize,
            **{"ngram_hash": False, "structure": None, **inputs},
        )
        return SimpleNamespace(config=config)

    for inputs in ({"ngram_hash": True}, {"structure": "core"}):
        with pytest.raises(RuntimeRefusal, match="nothing sums their gradients"):
            refuse_drift(stage(finalize_model_grads, **inputs))
        refuse_drift(stage(with_copies(finalize_model_grads), **inputs))
    refuse_drift(stage(finalize_model_grads))
