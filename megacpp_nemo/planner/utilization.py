"""Model FLOPs utilization (MFU, arXiv 2204.02311) from a measured rate, with its formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.flops import training_flops_per_token
from megacpp_nemo.planner.gpus import DEFAULT_GPU, TFLOPS, Gpu, PlanError, gpu_called


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """The share of the GPUs' peak that a run's own arithmetic takes.

    Args:
        tokens_per_second: Measured, of all GPUs together.
        flops_per_token: Training operations per token, without any recomputation.
        gpus: Number of GPUs.
        gpu: Their kind; the peak is its dense bf16 one, in FP8 runs too.
    """

    tokens_per_second: float
    flops_per_token: float
    gpus: int
    gpu: Gpu

    @property
    def flops_per_second_per_gpu(self) -> float:
        """The model's operations per second that a GPU does."""
        return self.tokens_per_second * self.flops_per_token / self.gpus

    @property
    def share(self) -> float:
        """MFU, 1 being the peak."""
        return self.flops_per_second_per_gpu / self.gpu.bf16_flops

    @property
    def formula(self) -> str:
        """The formula with its figures, in words."""
        rate = self.tokens_per_second
        share = f"{self.share:.1%}" if self.share >= 0.001 else f"{100 * self.share:.2g}%"
        return (
            "MFU = tokens/s x training FLOPs per token / (GPUs x dense bf16 peak) = "
            f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} x "
            f"{self.flops_per_token / 1e9:,.2f} GFLOP / "
            f"({self.gpus} x {self.gpu.bf16_flops / TFLOPS:,.1f} TFLOP/s) = {share}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and the formula as plain data."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.gpus,
            "flops_per_token": self.flops_per_token,
            "flops_per_second_per_gpu": self.flops_per_second_per_gpu,
            "gpus": self.gpus,
            "gpu": self.gpu.name,
            "peak_flops": self.gpu.bf16_flops,
            "mfu": self.share,
            "formula": self.formula,
        }


def tokens_per_second(recipe: HybridRecipe, step_seconds: float) -> float:
    """Return the tokens per second of all GPUs from the seconds of an optimizer step.

    Raises:
        PlanError: If the seconds are not above 0.
    """
    tokens = recipe.batch.global_batch_size * recipe.model.seq_length
    return tokens / _measured(step_seconds, "step_seconds", "1.5")


def mfu(
    recipe: HybridRecipe, tokens_per_second: float, *, gpu: str | Gpu = DEFAULT_GPU
) -> Utilization:
    """Return how well a measured rate uses the GPUs of a recipe's layout.

    Args:
        recipe: Its realised shapes count the operations, its layout the GPUs.
        tokens_per_second: Of all GPUs together.
        gpu: Name of the GPU.

    Raises:
        PlanError: If there is no such GPU, the rate is not above 0, or it is more than the GPUs
            could do at their highest peak.
    """
    found = Utilization(
        tokens_per_second=_measured(tokens_per_second, "tokens_per_second", "74000"),
        flops_per_token=training_flops_per_token(recipe),
        gpus=recipe.parallelism.world_size,
        gpu=gpu_called(gpu),
    )
    peak = max(found.gpu.bf16_flops, found.gpu.fp8_flops or 0)
    if found.flops_per_second_per_gpu > peak:
        most = int(peak * found.gpus / found.flops_per_token)
        raise PlanError(
            "No GPUs of this kind and number reach this rate",
            given=f"tokens_per_second={tokens_per_second:.6g} on {found.gpus} x {found.gpu.title}",
            allowed=f"at most {most:,}, all of their peak ({peak / TFLOPS:,.1f} TFLOP/s each)",
            hint="the layout that was measured, its GPU, and tokens in place of samples",
        )
    return found


def _measured(value: float, name: str, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        good = False
    else:
        good = math.isfinite(value) and value > 0
    if not good:
        raise PlanError(
            "A measured rate or time is a number above 0",
            given=f"{name}={value!r}",
            allowed="a finite number above 0",
            hint=f"{name}={example}",
        )
    return float(value)
