"""One state, however it is laid over processes: the same outputs, gradients and checkpoint.

Each layout builds the model, or loads another layout's checkpoint, and runs Megatron's own
schedule on one batch. Gradients are compared as checkpoints of their own: written through the
model's sharded state dict in one layout and read whole here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from tests.model.building import (
    assert_near,
    boundaries_of,
    build_model,
    megatron,
    random_tokens,
    run_model,
    small_config,
)
from tests.support.processes import in_process, in_processes

pytestmark = pytest.mark.two_process

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
ONE: dict[str, Any] = {}

BATCH, SEQ = 2, 16
ROWS = [[5, 1, 10], [16]]


def run_layout(
    folder: Path, pattern: str, layout: dict[str, Any], start: Path | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """Run one step in this process's part of a layout; save weights and gradients in `folder`.

    Starts from the checkpoint `start`, or from initial weights; those it saves are from before
    the step.
    """
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    with megatron(**sizes):
        config = small_config(pattern, **layout, **changes)
        model = build_model(config)
        if start is not None:
            load(model, start)
        save(model, folder / "weights")
        losses = step(model, config)
        gather_gradients(model, config)
        save(model, folder / "gradients")
        return {
            "losses": None if losses is None else losses.numpy(),
            "layers": [
                (layer.layer_number, type(layer).__name__) for layer in model.decoder.layers
            ],
            "symbols": model.decoder.layer_type_list,
        }


def save(model: nn.Module, folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    # The access integrity of shards is validated by default.
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def load(model: nn.Module, folder: Path) -> None:
    state = dist_checkpointing.load(
        model.sharded_state_dict(), str(folder), strict=StrictHandling.RAISE_ALL
    )
    model.load_state_dict(state)


def step(model: nn.Module, config: Any) -> Tensor | None:
    """Run forward and backward; return the losses `[batch, seq]` of this data-parallel rank."""
    ranks = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    found: list[Tensor] = []

    def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found.append(losses.detach())
        return losses.mean(), {}

    def forward(iterator: Iterator[Any], stage: nn.Module) -> tuple[Tensor, Any]:
        tokens, labels = next(iterator)
        return run_model(stage, tokens, boundaries_of(*ROWS[share]), labels), loss_of

    batch = random_tokens(BATCH, SEQ)[share], random_tokens(BATCH, SEQ, seed=1)[share]
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([batch]),
        model=model,
        num_microbatches=1,
        seq_length=SEQ,
        micro_batch_size=BATCH // ranks,
        forward_only=False,
    )
    return found[0] if found else None


def gather_gradients(model: nn.Module, config: Any) -> None:
    """Put each gradient in its parameter's place, reduced as Megatron's training loop does."""
    ranks = parallel_state.get_data_parallel_world_size()
    for parameter in model.parameters():
        grad = parameter.grad
        if getattr(parameter, "shared_embedding", False):
            torch.distributed.all_reduce(grad, group=parallel_state.get_embedding_group())
        if getattr(parameter, "average_gradients_across_tp_domain", False):
            average_copies(grad)
        elif config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(
                grad, group=parallel_state.get_tensor_model_parallel_group()
            )
        if ranks > 1 and getattr(parameter, "allreduce", True):
            torch.distributed.all_reduce(grad, group=parallel_state.get_data_parallel_group())
        parameter.data.copy_(grad / ranks)


def average_copies(grad: Tensor) -> None:
    """Average a gradient over the tensor ranks, each of which has it whole but for rounding."""
    own = grad.clone()
    torch.distributed.all_reduce(
        grad,
        op=torch.distributed.ReduceOp.AVG,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    # A mean of parts would be a gradient of the right direction and the wrong length.
    assert_near(own, grad)


def read_whole(*folders: Path) -> list[dict[str, numpy.ndarray]]:
    """Return every tensor of each checkpoint by its key."""

    def read() -> list[dict[str, numpy.ndarray]]:
        with megatron():
            states = [dist_checkpointing.load_plain_tensors(str(folder)) for folder in folders]
        return [
            {key: value.numpy() for key, value in state.items() if isinstance(value, Tensor)}
            for state in states
        ]

    return in_process(read)


def processes(layout: dict[str, Any]) -> int:
    return 2 if layout else 1


def losses_of(results: list[dict[str, Any]], layout: dict[str, Any]) -> numpy.ndarray:
    """Return the losses `[batch, seq]` of the whole batch."""
    found = [result["losses"] for result in results if result["losses"] is not None]
    if layout == EXPERT:
        return numpy.concatenate(found)
    return found[-1]


def compare(
    tmp_path: Path,
    first: tuple[str, dict[str, Any]],
    second: tuple[str, dict[str, Any]],
    **changes: Any,
) -> None:
    """Assert that a state saved by one layout gives the same losses and gradients in another.

    What the other loads, and saves again, is the same to the bit.
    """
    a, b = tmp_path / "first", tmp_path / "second"
    pattern, layout = first
    expected = losses_of(
        in_processes(run_layout, a, pattern, layout, None, changes, ranks=processes(layout)), layout
    )
    pattern, layout = second
    results = in_processes(
        run_layout, b, pattern, layout, a / "weights", changes, ranks=processes(layout)
    )
    numpy.testing.assert_allclose(losses_of(results, layout), expected, rtol=1e-5)
    parts = [folder / part for part in ("weights", "gradients") for folder in (a, b)]
    saved, loaded, *gradients = read_whole(*parts)
    assert saved.keys() == loaded.keys()
    assert not [key for key in saved if not numpy.array_equal(saved[key], loaded[key])]
    assert_near_by_key(*gradients)


def assert_near_by_key(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Assert equal keys, and entries within 1e-5 of each tensor's largest."""
    assert first.keys() == second.keys()
    off = {}
    for key, tensor in first.items():
        assert tensor.shape == second[key].shape, key
        scale, worst = abs(tensor).max(), abs(tensor - second[key]).max()
        if worst > 1e-5 * scale:
            off[key] = worst / scale
    assert not off


PLAIN = {"multi_latent_attention": False, "num_query_groups": 2}
SHARED = {"m2rnn_num_qk_heads": 2}
AUTHOR = {
    "mamba_lane": "author",
    "author_mamba_num_heads": 4,
    "author_mamba_head_dim": 6,
    "author_mamba_state_dim": 16,
    "author_mamba_mimo_rank": 2,
    "author_mamba_chunk_size": 4,
}


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [("AEMR", {}), ("AEMR", PLAIN), ("R", SHARED)],
    ids=["every_family", "plain_attention", "two_query_key_heads"],
)
def test_two_tensor_ranks_compute_what_one_process_does(tmp_path, pattern, changes):
    compare(tmp_path, (pattern, ONE), (pattern, TENSOR), **changes)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("layout", [TENSOR, {"tensor_model_parallel_size": 2}], ids=["sp", "tp"])
def test_tensor_ranks_of_mamba_3_compute_what_one_process_does(tmp_path, rank, layout):
    compare(tmp_path, ("MM", ONE), ("MM", layout), **{**AUTHOR, "author_mamba_mimo_rank": rank})


def test_a_mamba_3_checkpoint_moves_from_tensor_ranks_to_pipeline_stages(tmp_path):
    compare(tmp_path, ("MRM", TENSOR), ("M|RM", PIPELINE), **AUTHOR)


def test_tensor_ranks_without_sequence_parallelism_compute_what_one_process_does(tmp_path):
    alone = {"tensor_model_parallel_size": 2}
    compare(tmp_path, ("MR", ONE), ("MR", alone))


def test_one_process_computes_what_two_tensor_ranks_do(tmp_path):
    compare(tmp_path, ("AEMR", TENSOR), ("AEMR", ONE))


@pytest.mark.parametrize("pattern", ["AEMR", "AEM|R", "A|EMR"])
def test_two_pipeline_stages_compute_what_one_process_does(tmp_path, pattern):
    compare(tmp_path, ("AEMR", ONE), (pattern, PIPELINE))


def test_a_checkpoint_moves_between_pipeline_and_tensor_ranks(tmp_path):
    compare(tmp_path, ("AE|MRM", PIPELINE), ("AEMRM", TENSOR))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_two_expert_ranks_compute_what_one_process_does(tmp_path, dispatcher):
    # The load-balancing loss is a ratio within each rank's tokens, so it depends on the batch's
    # split over data-parallel ranks; the language model's loss does not.
    compare(
        tmp_path,
        ("AEMR", ONE),
        ("AEMR", EXPERT),
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type=dispatcher,
    )


def test_one_process_computes_what_two_expert_ranks_do(tmp_path):
    compare(tmp_path, ("ER", EXPERT), ("ER", ONE), moe_aux_loss_coeff=0.0)


@pytest.mark.parametrize("layout", [ONE, TENSOR, EXPERT], ids=["one", "tensor", "expert"])
def test_no_two_experts_start_equal(tmp_path, layout):
    def initial() -> None:
        sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
        with megatron(**sizes):
            save(build_model(small_config("E", **layout), shake=False), tmp_path / "weights")

    in_processes(initial, ranks=processes(layout))
    experts = {
        key: value
        for key, value in read_whole(tmp_path / "weights")[0].items()
        if ".experts.experts." in key
    }
    assert len(experts) == 2
    for weights in experts.values():
        assert len(weights) == 4
        assert len(numpy.unique(weights.reshape(4, -1), axis=0)) == 4
        # Nor is a part of one repeated, as on tensor ranks that draw alike.
        assert numpy.unique(weights).size > 0.99 * weights.size


def test_layers_are_numbered_over_all_stages(tmp_path):
    results = in_processes(run_layout, tmp_path, "AEM|RM", PIPELINE, None, {}, ranks=2)
    assert [result["layers"] for result in results] == [
        [(1, "TransformerLayer"), (2, "ExpertsLayer"), (3, "MambaLayer")],
        [(4, "MambaLayer"), (5, "MambaLayer")],
    ]
    assert [result["symbols"] for result in results] == [["*", "E", "M"], ["R", "M"]]
    (state,) = read_whole(tmp_path / "weights")
    keys = {key.split(".")[2] for key in state if ".layers." in key}
    assert keys == {"0", "1", "2", "3", "4"}
