"""How a model is laid over processes."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Annotated

from megacpp_nemo.contract.checks import AtLeastTwo, Checked, Positive, one_of
from megacpp_nemo.contract.errors import RecipeError, lookup

# What a backward pass runs again, from nothing to everything.
RECOMPUTE = ("none", "selective", "full")


class ParallelismMode(str, enum.Enum):
    """The two ways the family is trained on one 8-GPU node.

    `NEMO_NATIVE`: tensor parallel 2 with sequence parallel, Megatron's own Mamba mixer.
    `AUTHOR_DP`: data parallel only, the authored Mamba-3 mixer.
    """

    NEMO_NATIVE = "nemo_native"
    AUTHOR_DP = "author_dp"

    @classmethod
    def from_name(cls, name: str | ParallelismMode) -> ParallelismMode:
        """Return the mode called `name`.

        Raises:
            RecipeError: If there is no such mode.
        """
        known = {item.value: item for item in cls}
        return lookup(known, name, what="Unknown parallelism mode", field="mode")


@dataclass(frozen=True, kw_only=True)
class Parallelism(Checked):
    """How a model is laid over processes, one process per device.

    Args:
        num_nodes: Machines.
        devices_per_node: Processes on each machine.
        tensor_model_parallel_size: Processes that share each matrix.
        pipeline_model_parallel_size: Stages that share the layers.
        virtual_pipeline_model_parallel_size: Model chunks per stage, 2 or more; None for no
            interleaving.
        context_parallel_size: Processes that share a sequence.
        expert_model_parallel_size: Processes that share the experts of a layer.
        expert_tensor_parallel_size: Processes that share one expert's matrices; None for the
            tensor-parallel size, as in Megatron.
        sequence_parallel: Split norms and residuals along the sequence over the tensor group.
        use_distributed_optimizer: Shard optimizer state over data-parallel processes.
        overlap_grad_reduce: Reduce gradients while the backward pass runs.
        overlap_param_gather: Gather parameters while the forward pass runs.
        recompute: What the backward pass computes again instead of keeping it: `none`;
            `selective`, the cores of attention layers; `full`, every layer, each by itself.
    """

    num_nodes: Positive = 1
    devices_per_node: Positive = 8
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    virtual_pipeline_model_parallel_size: AtLeastTwo | None = None
    context_parallel_size: Positive = 1
    expert_model_parallel_size: Positive = 1
    expert_tensor_parallel_size: Positive | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    recompute: Annotated[str, one_of(*RECOMPUTE)] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_switches()
        self._check_sizes()

    def _check_switches(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise RecipeError(
                "Sequence parallelism needs tensor parallelism: Megatron drops it at TP 1",
                given="sequence_parallel=True, tensor_model_parallel_size=1",
                allowed="sequence_parallel=True only with tensor_model_parallel_size above 1",
                hint="sequence_parallel=False",
            )
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise RecipeError(
                "Virtual pipeline stages need more than one pipeline stage",
                given="virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size}, pipeline_model_parallel_size=1",
                allowed="pipeline_model_parallel_size above 1, or no virtual stages",
                hint="virtual_pipeline_model_parallel_size=None",
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise RecipeError(
                "Overlapping the parameter gather needs the distributed optimizer and "
                "overlapped gradient reduction",
                given=f"overlap_param_gather=True, overlap_grad_reduce={self.overlap_grad_reduce}, "
                f"use_distributed_optimizer={self.use_distributed_optimizer}",
                allowed="overlap_param_gather=True only with both others True",
                hint="overlap_param_gather=False",
            )

    def _check_sizes(self) -> None:
        sparse = (
            self.expert_model_parallel_size
            * self.expert_tensor_size
            * self.pipeline_model_parallel_size
        )
        enough = math.lcm(self.model_size, sparse)
        for product, names in (
            (self.model_size, "tensor x pipeline x context"),
            (sparse, "expert x expert-tensor x pipeline"),
        ):
            if self.world_size % product:
                nodes = enough // math.gcd(enough, self.devices_per_node)
                raise RecipeError(
                    f"The product of the {names} parallel sizes must divide the number of "
                    "processes",
                    given=f"product {product} for {self.world_size} processes "
                    f"(num_nodes={self.num_nodes} x devices_per_node={self.devices_per_node})",
                    allowed=f"sizes whose product divides {self.world_size}",
                    hint=f"num_nodes={nodes}, or smaller parallel sizes",
                )

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model: tensor x pipeline x context."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.num_nodes * self.devices_per_node

    @property
    def expert_tensor_size(self) -> int:
        """Processes that share one expert's matrices."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Number of copies of the model that see different data."""
        return self.world_size // self.model_size
