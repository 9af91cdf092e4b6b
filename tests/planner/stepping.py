"""One optimizer step of a small model, as Megatron's training loop runs it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megacpp_nemo.contract import HybridRecipe, Precision
from megacpp_nemo.host import compat
from megacpp_nemo.model.host_optimizer import with_host_tables
from megacpp_nemo.model.tied import with_copies
from megacpp_nemo.planner.pipeline import micro_batches
from tests.planner.building import build_stage
from tests.planner.kept import groups_of, settings_of


@contextlib.contextmanager
def wrapped(intent: HybridRecipe, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Make this rank's part of a model in its data-parallel wrapper, and its optimizer."""
    with groups_of(intent):
        compat.install()
        batch, layout = intent.batch, intent.parallelism
        init_num_microbatches_calculator(
            rank=0,
            rampup_batch_size=None,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            data_parallel_size=layout.data_parallel_size,
        )
        try:
            model = wrap(intent, build_stage(intent, **{**settings_of(intent), **settings}))
            half = intent.precision is not Precision.FP32
            config = OptimizerConfig(
                optimizer="adam",
                lr=1e-3,
                bf16=half,
                params_dtype=torch.bfloat16 if half else torch.float32,
                use_distributed_optimizer=layout.use_distributed_optimizer,
            )
            made = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
            yield model, with_host_tables(made, config, [model])
        finally:
            destroy_num_microbatches_calculator()


def wrap(intent: HybridRecipe, model: Any) -> DistributedDataParallel:
    """Wrap a stage as the recipes configure it."""
    layout, config = intent.parallelism, get_model_config(model)
    if intent.precision is not Precision.FP32:
        model = Float16Module(config, model)
    data = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_grad_reduce=layout.overlap_grad_reduce,
    )
    return DistributedDataParallel(config, data, model)


def step(intent: HybridRecipe, model: Any, optimizer: Any) -> None:
    """Run one optimizer step on random tokens."""
    batch, length = intent.batch, intent.model.seq_length
    shape = batch.micro_batch_size, length
    positions = torch.arange(length).expand(shape)
    draw = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    config = get_model_config(model)
    config.finalize_model_grads_func = with_copies(finalize_model_grads)
    config.grad_scale_func = optimizer.scale_loss

    def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses.float().mean(), {}

    def forward(_: Any, stage: Any) -> tuple[Tensor, Any]:
        size = intent.model.embedding.vocab_size
        tokens = torch.randint(0, size, shape, generator=draw)
        return stage(tokens, positions, None, labels=tokens), loss_of

    model.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[model],
        num_microbatches=micro_batches(intent),
        seq_length=length,
        micro_batch_size=batch.micro_batch_size,
        forward_only=False,
    )
    optimizer.step()


GROUPS = {
    "tp": "tensor",
    "tp_cp": "tensor and context",
    "tp_ep": "tensor and expert",
    "ep": "expert",
    "expt_tp": "expert tensor",
    "pp": "pipeline",
    "dp_cp": "data",
    "expt_dp": "expert data",
    "embd": "embedding",
}
# Operator of torch's library, by name: what it is, and which argument is its payload.
OPERATORS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
}
SILENT = ("recv_", "barrier", "broadcast_")


class Collectives(TorchDispatchMode):
    """Collectives of Megatron's groups by group and operation: how many, and their bytes.

    Those of one number are left out, as are those of groups of one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection

        known = ProcessGroupCollection.use_mpu_process_groups()
        self.names = {
            getattr(known, short).group_name: name
            for short, name in GROUPS.items()
            if getattr(known, short, None) is not None
        }
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name not in SILENT:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        operation, place = OPERATORS[name]
        tensors = list(_tensors(args[place]))
        group = next(
            torch.distributed.ProcessGroup.unbox(item)
            for item in args
            if isinstance(item, torch.ScriptObject)
            and "ProcessGroup" in item._type().qualified_name()
        )
        if group.size() == 1 or all(tensor.numel() == 1 for tensor in tensors):
            return
        known = self.names.get(group.group_name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if known is None:
            self.others[f"{operation} over {group.group_desc or group.group_name}"] += size
            return
        self.counts[known, operation] += 1
        self.bytes[known, operation] += size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def collectives(intent: HybridRecipe, **settings: Any) -> dict[str, Any]:
    """Return the collectives of one step on this rank, and what else was seen."""
    with wrapped(intent, **settings) as (model, optimizer), Collectives() as seen:
        step(intent, model, optimizer)
    return {
        "counted": {key: (seen.counts[key], seen.bytes[key]) for key in seen.counts},
        "others": dict(seen.others),
    }
