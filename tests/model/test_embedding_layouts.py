"""The n-gram memory and the structure channels in any layout: the same start, the same training.

What several pipeline stages share is in `test_input_layouts`, whose training loop runs here too.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from tests.model.building import build_model, megatron, small_config
from tests.model.test_input_layouts import INPUTS, compare, run_step
from tests.model.test_sharding import ONE, TENSOR
from tests.support.processes import in_processes

pytestmark = pytest.mark.two_process

ALONE = {"tensor_model_parallel_size": 2}


def test_tensor_ranks_without_sequence_parallelism_train_as_one_process_does(tmp_path):
    first, second = compare(tmp_path, "MR", ALONE, **INPUTS)
    for one, two in zip(first["inputs"], second["inputs"], strict=True):
        for name in one:
            if name.startswith("structure."):
                assert numpy.array_equal(one[name], two[name]), name


def initial(layout: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return what the input embedding starts with, and this process's tensor rank."""
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    with megatron(**sizes):
        model = build_model(small_config("M", **layout, **INPUTS), shake=False)
        added = {**dict(model.embedding.named_parameters())}
        found = {
            name: weight.detach().numpy()
            for name, weight in added.items()
            if not name.startswith("word")
        }
        return found, parallel_state.get_tensor_model_parallel_rank()


@pytest.mark.parametrize("layout", [TENSOR, ALONE, ONE], ids=["sp", "tp", "dp"])
def test_tables_start_the_same_in_any_layout(layout):
    ((whole, _),) = in_processes(initial, ONE)
    for found, rank in in_processes(initial, layout, ranks=2):
        assert found.keys() == whole.keys()
        for name, value in found.items():
            expected = whole[name]
            if name.startswith("ngram_hash.") and layout != ONE:
                # A part of every row, and the projection's columns that read it.
                expected = numpy.split(expected, 2, axis=1)[rank]
            assert numpy.array_equal(value, expected), name


def overlapped_losses(bucket_size: int | None) -> list[float | None]:
    """Return the losses of some steps of two data-parallel ranks that share an optimizer."""
    with megatron():
        config = small_config("M", **INPUTS)
        config.finalize_model_grads_func = finalize_model_grads
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=bucket_size is not None,
            bucket_size=bucket_size,
        )
        wrapped = DistributedDataParallel(config, buffers, build_model(config))
        settings = OptimizerConfig(
            lr=1e-2,
            use_distributed_optimizer=True,
            overlap_param_gather=bucket_size is not None,
        )
        optimizer = get_megatron_optimizer(settings, [wrapped])
        losses = []
        for number in range(4):
            optimizer.zero_grad()
            losses.append(run_step(wrapped, config, number))
            optimizer.step()
        return losses


def test_weights_gathered_while_the_next_step_runs_are_waited_for():
    """Megatron waits for a parameter when the module that has it is called."""
    expected = in_processes(overlapped_losses, None, ranks=2)
    found = in_processes(overlapped_losses, 400, ranks=2)
    # Buckets of another size sum in another order.
    numpy.testing.assert_allclose(found, expected, rtol=1e-6)
