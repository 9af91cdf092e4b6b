"""How a recipe is run: parallelism, precision, batch, schedule, cadence and features."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

from megacpp_nemo.contract.checks import (
    Checked,
    Count,
    Decay,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Text,
    one_of,
)
from megacpp_nemo.contract.errors import RecipeError, lookup
from megacpp_nemo.contract.parallelism import Parallelism, ParallelismMode
from megacpp_nemo.contract.structure import STRUCTURE_CHOICE

__all__ = [
    "MAMBA_LANES",
    "MAMBA_PATHS",
    "Batch",
    "Cadence",
    "Features",
    "Files",
    "OptimizerSchedule",
    "Parallelism",
    "ParallelismMode",
    "Precision",
]


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
        return lookup(known, name, what="Unknown precision", field="precision")


@dataclass(frozen=True, kw_only=True)
class Batch(Checked):
    """Rows per step.

    Args:
        micro_batch_size: Rows one process runs at a time.
        global_batch_size: Rows per optimizer step over all processes.
    """

    micro_batch_size: Positive = 4
    global_batch_size: Positive = 64


@dataclass(frozen=True, kw_only=True)
class OptimizerSchedule(Checked):
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

    lr: PositiveFloat = 3e-4
    min_lr: NonNegativeFloat = 3e-5
    warmup_steps: Count = 2_000
    decay_steps: Positive = 100_000
    train_steps: Positive = 100_000
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: PositiveFloat = 1.0
    seed: Seed = 1234

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise RecipeError(
                "The learning rate falls from lr to min_lr",
                given=f"lr={self.lr}, min_lr={self.min_lr}",
                allowed="min_lr from 0 to lr",
                hint=f"min_lr={self.lr / 10:g}",
            )
        if self.warmup_steps >= self.decay_steps:
            raise RecipeError(
                "Warm-up must end before the decay does",
                given=f"warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}",
                allowed="warmup_steps below decay_steps",
                hint=f"warmup_steps={self.decay_steps // 10}",
            )


@dataclass(frozen=True, kw_only=True)
class Cadence(Checked):
    """What happens how often, in optimizer steps.

    Args:
        eval_interval: Steps between validations.
        eval_batches: Global batches per validation.
        save_interval: Steps between checkpoints.
        log_interval: Steps between logged values.
    """

    eval_interval: Positive = 2_000
    eval_batches: Positive = 32
    save_interval: Positive = 2_000
    log_interval: Positive = 10


@dataclass(frozen=True, kw_only=True)
class Files(Checked):
    """Where a run reads and writes. Paths are taken as they are; nothing is opened.

    Args:
        data_path: Megatron indexed files as path prefixes: one, or weights and prefixes in turn
            (`("30", "/data/a", "70", "/data/b")`).
        split: Shares of training, validation and test data.
        tokenizer_dir: Folder of the Hugging Face tokenizer that made the files.
        run_dir: Folder for checkpoints and curves; None for `runs/NAME`.
    """

    data_path: tuple[Text, ...] = ()
    split: Text = "900,50,50"
    tokenizer_dir: Text | None = None
    run_dir: Text | None = None


MAMBA_LANES = ("native", "author")
MAMBA_PATHS = ("auto", "fused", "split", "portable")
KERNEL_CHOICES = ("required", "available")


@dataclass(frozen=True, kw_only=True)
class Features(Checked):
    """Switches of what a model is made of, beyond its pattern.

    Args:
        latent_attention: Attention layers are multi-latent (MLA); off means plain
            grouped-query attention.
        experts: E layers are mixtures of experts; off means dense MLPs of `ffn_hidden_size`.
        sparse_attention: The A-ranks of `ModelShape.sparse_attention` use DSA.
        mamba: `native` for Megatron's Mamba-2 mixer, `author` for Mamba-3.
        mamba_path: How Mamba layers run. `auto` takes the fastest way that the machine has and
            states it; `fused` demands the packages' kernels, `split` only the scan's (native
            lane), `portable` plain torch.
        ngram_hash: Add the hashed n-gram memory to the embedding.
        structure: Add code-structure channels: None, `core` (category and dependency level),
            `all`, or channels by name, joined by `+` (`category+ast_depth`).
        kernels: `required` refuses to start without the GPU kernel packages; `available` uses
            what is installed and plain torch for the rest.
        reset_state: M and R layers start from a zero state at each document of a packed row;
            off, the state runs on through the row, Megatron's default.
        reset_attention_mask: Attention stays within each document of a packed row; off, it
            sees the whole row, Megatron's default.
    """

    latent_attention: bool = True
    experts: bool = True
    sparse_attention: bool = True
    mamba: Annotated[str, one_of(*MAMBA_LANES)] = "native"
    mamba_path: Annotated[str, one_of(*MAMBA_PATHS)] = "auto"
    ngram_hash: bool = True
    structure: Annotated[str, STRUCTURE_CHOICE] | None = None
    kernels: Annotated[str, one_of(*KERNEL_CHOICES)] = "required"
    reset_state: bool = False
    reset_attention_mask: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse_attention and not self.latent_attention:
            raise RecipeError(
                "DSA is built on multi-latent attention",
                given="sparse_attention=True, latent_attention=False",
                allowed="sparse_attention only with latent_attention",
                hint="sparse_attention=False",
            )
        if self.mamba == "author" and self.mamba_path == "split":
            raise RecipeError(
                "Mamba-3 has no split path: its kernels are one, or none",
                given="mamba='author', mamba_path='split'",
                allowed="mamba_path of auto, fused or portable with mamba='author'",
                hint="mamba_path='auto'",
            )
