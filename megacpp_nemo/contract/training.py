"""How a recipe is run: parallelism, precision, batch, schedule, cadence and features."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from megacpp_nemo.contract.errors import RecipeError, nearest
from megacpp_nemo.contract.shapes import require_positive


class Precision(str, enum.Enum):
    """Arithmetic of a run.

    `FP8_EXPERTS` is bfloat16 with FP8 (hybrid format, tensorwise scaling) on the expert
    layers only: Mamba scans and M2RNN stay out of FP8.
    """

    BF16 = "bf16"
    FP8_EXPERTS = "fp8_experts"
    FP32 = "fp32"

    @classmethod
    def from_name(cls, name: str | Precision) -> Precision:
        """Return the precision called `name`; `fp8` is short for `fp8_experts`.

        Raises:
            RecipeError: If there is no such precision.
        """
        known = {item.value: item for item in cls} | {"fp8": cls.FP8_EXPERTS}
        key = str(getattr(name, "value", name)).lower()
        if key not in known:
            raise RecipeError(
                "Unknown precision",
                given=name,
                allowed=", ".join(known),
                hint=f"precision={nearest(key, known) or 'bf16'!r}",
            )
        return known[key]


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
        key = str(getattr(name, "value", name)).lower()
        if key not in known:
            raise RecipeError(
                "Unknown parallelism mode",
                given=name,
                allowed=", ".join(known),
                hint=f"mode={nearest(key, known) or 'nemo_native'!r}",
            )
        return known[key]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How a model is laid over processes, one process per device.

    Args:
        num_nodes: Machines.
        devices_per_node: Processes on each machine.
        tensor_model_parallel_size: Processes that share each matrix.
        pipeline_model_parallel_size: Stages that share the layers.
        virtual_pipeline_model_parallel_size: Model chunks per stage; None for no interleaving.
        context_parallel_size: Processes that share a sequence.
        expert_model_parallel_size: Processes that share the experts of a layer.
        expert_tensor_parallel_size: Processes that share one expert's matrices; None for the
            tensor-parallel size, as in Megatron.
        sequence_parallel: Split norms and residuals along the sequence over the tensor group.
        use_distributed_optimizer: Shard optimizer state over data-parallel processes.
        overlap_grad_reduce: Reduce gradients while the backward pass runs.
        overlap_param_gather: Gather parameters while the forward pass runs.
    """

    num_nodes: int = 1
    devices_per_node: int = 8
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True

    def __post_init__(self) -> None:
        require_positive(self)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise RecipeError(
                "Sequence parallelism needs tensor parallelism: Megatron drops it at TP 1",
                given="sequence_parallel=True, tensor_model_parallel_size=1",
                allowed="sequence_parallel=True only with tensor_model_parallel_size above 1",
                hint="sequence_parallel=False",
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
        self._check_sizes()

    def _check_sizes(self) -> None:
        dense = (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
        sparse = (
            self.expert_model_parallel_size
            * self.expert_tensor_size
            * self.pipeline_model_parallel_size
        )
        for product, names in (
            (dense, "tensor x pipeline x context"),
            (sparse, "expert x expert-tensor x pipeline"),
        ):
            if self.world_size % product:
                raise RecipeError(
                    f"The {names} parallel sizes must divide the number of processes",
                    given=f"product {product} for {self.world_size} processes "
                    f"({self.num_nodes} nodes x {self.devices_per_node} devices)",
                    allowed=f"sizes whose product divides {self.world_size}",
                    hint="smaller parallel sizes, or more devices",
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
        return self.world_size // (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows per step.

    Args:
        micro_batch_size: Rows one process runs at a time.
        global_batch_size: Rows per optimizer step over all processes.
    """

    micro_batch_size: int = 4
    global_batch_size: int = 64

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerSchedule:
    """AdamW and its cosine schedule, in optimizer steps.

    Args:
        lr: Peak learning rate.
        min_lr: Learning rate at and after `decay_steps`.
        warmup_steps: Linear warm-up from 0.
        decay_steps: Step at which `min_lr` is reached. It does not follow `train_steps`, so a
            run that is stopped and extended sees the same learning rates.
        train_steps: Steps to train.
        weight_decay: Decoupled weight decay (Megatron spares biases and 1-D parameters).
        adam_beta1: First moment's decay.
        adam_beta2: Second moment's decay.
        adam_eps: Adam's epsilon.
        clip_grad: Bound on the global gradient norm.
        seed: Seed of initialization and data order.
    """

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 2_000
    decay_steps: int = 100_000
    train_steps: int = 100_000
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        require_positive(self, zero_allowed=frozenset({"warmup_steps", "seed"}))
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise RecipeError(
                "The learning rate falls from lr to min_lr",
                given=f"lr={self.lr}, min_lr={self.min_lr}",
                allowed="0 <= min_lr <= lr, lr above 0",
                hint=f"min_lr={abs(self.lr) / 10:g}",
            )
        if self.warmup_steps >= self.decay_steps:
            raise RecipeError(
                "Warm-up must end before the decay does",
                given=f"warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}",
                allowed="warmup_steps below decay_steps",
                hint=f"warmup_steps={self.decay_steps // 10}",
            )


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """What happens how often, in optimizer steps.

    Args:
        eval_interval: Steps between validations.
        eval_batches: Global batches per validation.
        save_interval: Steps between checkpoints.
        log_interval: Steps between logged values.
    """

    eval_interval: int = 2_000
    eval_batches: int = 32
    save_interval: int = 2_000
    log_interval: int = 10

    def __post_init__(self) -> None:
        require_positive(self)


MAMBA_LANES = ("native", "author")
STRUCTURE_CHOICES = ("core", "all")


@dataclass(frozen=True, kw_only=True)
class Features:
    """Switches of what a model is made of, beyond its pattern.

    Args:
        latent_attention: Attention layers are multi-latent (MLA); off means plain
            grouped-query attention.
        sparse_attention: The A-ranks of `ModelShape.sparse_attention` use DSA.
        mamba: `native` for Megatron's Mamba-2 mixer, `author` for Mamba-3.
        ngram_hash: Add the hashed n-gram memory to the embedding.
        structure: Add code-structure channels: None, `core` or `all`.
        reset_state: M and R layers start from a zero state at each document of a packed row.
        reset_attention_mask: Attention stays within each document of a packed row; off, it
            sees the whole row, Megatron's default.
    """

    latent_attention: bool = True
    sparse_attention: bool = True
    mamba: str = "native"
    ngram_hash: bool = True
    structure: str | None = None
    reset_state: bool = True
    reset_attention_mask: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mamba", self.mamba, MAMBA_LANES),
            ("structure", self.structure, (None, *STRUCTURE_CHOICES)),
        ):
            if value not in choices:
                raise RecipeError(
                    f"Unknown choice for {name}",
                    given=value,
                    allowed=", ".join(map(repr, choices)),
                    hint=f"{name}={choices[0]!r}",
                )
        if self.sparse_attention and not self.latent_attention:
            raise RecipeError(
                "DSA is built on multi-latent attention",
                given="sparse_attention=True, latent_attention=False",
                allowed="sparse_attention only with latent_attention",
                hint="sparse_attention=False",
            )
