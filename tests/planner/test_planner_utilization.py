"""MFU from a measured rate, and the GPUs it is measured against."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megacpp_nemo.contract import recipe
from megacpp_nemo.planner.flops import training_flops_per_token
from megacpp_nemo.planner.gpus import GPUS, PlanError, gpu_called
from megacpp_nemo.planner.utilization import mfu, tokens_per_second


def test_the_formula_is_tokens_times_flops_over_peaks() -> None:
    intent = recipe("nam56r")
    found = mfu(intent, 74_000)
    by_hand = 74_000 * training_flops_per_token(intent) / (8 * 989.4e12)
    assert found.share == pytest.approx(by_hand)
    assert found.flops_per_second_per_gpu == pytest.approx(by_hand * 989.4e12)
    for words in ("tokens/s x training FLOPs per token", "74,000", "(8 x 989.4", f"{by_hand:.1%}"):
        assert words in found.formula
    assert found.to_dict()["mfu"] == found.share


def test_another_gpu_has_another_peak() -> None:
    intent = recipe("nam56r")
    shares = {name: mfu(intent, 10_000, gpu=name).share for name in GPUS}
    assert shares["h100"] == shares["h200"]
    assert shares["a100"] / shares["b200"] == pytest.approx(2250 / 312)


def test_a_step_is_its_batchs_tokens() -> None:
    assert tokens_per_second(recipe("nam56r"), 2.0) == 64 * 4096 / 2


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "fast"])
def test_a_rate_is_a_number_above_zero(value: float) -> None:
    with pytest.raises(PlanError, match="above 0"):
        mfu(recipe("nam56r"), value)
    with pytest.raises(PlanError, match="above 0"):
        tokens_per_second(recipe("nam56r"), value)


def test_a_rate_beyond_every_peak_is_refused() -> None:
    intent = recipe("nam56r")
    most = 8 * 1978.9e12 / training_flops_per_token(intent)
    assert mfu(intent, 0.999 * most).share == pytest.approx(0.999 * 2, rel=1e-3)
    with pytest.raises(PlanError, match=f"at most {int(most):,}"):
        mfu(intent, 1.001 * most)


def test_a_small_rate_is_told_with_its_digits() -> None:
    formula = mfu(recipe("nam56r_tiny"), 0.25).formula
    assert " = 0.25 x " in formula
    assert not formula.endswith("= 0.0%")


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match="'h200'") as refused:
        gpu_called("h20O")
    assert str(refused.value.allowed) == "h200, h100, b200, a100"


def test_every_figure_of_a_gpu_says_where_it_is_from() -> None:
    for gpu in GPUS.values():
        figures = {name for name in vars(gpu) if isinstance(getattr(gpu, name), float)}
        assert figures <= set(gpu.sources)
        assert all(gpu.sources.values())
        # Dense peaks: what is quoted with sparsity would be twice as much.
        assert gpu.fp8_flops is None or gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=1e-3)


def test_the_page_has_these_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    for gpu in GPUS.values():
        fp8 = f"{gpu.fp8_flops / 1e12:g} TFLOP/s" if gpu.fp8_flops else "none"
        assert (
            f"| `{gpu.name}` | {gpu.memory_gib} GiB | {gpu.bf16_flops / 1e12:g} TFLOP/s | {fp8} | "
            f"{gpu.nvlink_bytes_per_second / 1e9:g} GB/s | "
            f"{gpu.network_bytes_per_second / 1e9:g} GB/s |"
        ) in page
