"""What the tests of the scans share: documents, one loss, and a comparison that names its parts."""

from __future__ import annotations

import torch
from torch import Tensor


def boundaries(seed: int, batch: int, seq: int) -> Tensor:
    return torch.randint(0, 4, (batch, seq), generator=torch.Generator().manual_seed(seed)) // 3


def outcome(
    y: Tensor, final: Tensor, inputs: dict[str, Tensor], loss_scale: float = 1.0
) -> list[Tensor]:
    """Return y, the final state and the gradient of every input, for one fixed loss."""
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in (y, final)]
    loss = sum((t.double() * w).sum() for t, w in zip((y, final), weights, strict=True))
    return [y, final, *torch.autograd.grad(loss * loss_scale, list(inputs.values()))]


def difference(
    actual: list[Tensor], expected: list[Tensor], *, inputs: tuple[str, ...]
) -> dict[str, float]:
    """Return the largest error by name, relative to the largest entry where that is above 1."""
    return {
        name: (left.double() - right.double()).abs().max().item()
        / max(1.0, right.abs().max().item())
        for name, left, right in zip(("y", "final", *inputs), actual, expected, strict=True)
    }


def assert_same(
    actual: list[Tensor], expected: list[Tensor], tolerance: float, *, inputs: tuple[str, ...]
) -> None:
    """Compare to `tolerance` of the largest entry, or absolutely where that is below 1."""
    errors = difference(actual, expected, inputs=inputs)
    # Not `max`: a NaN compares false with everything and must not pass.
    assert all(error <= tolerance for error in errors.values()), errors
