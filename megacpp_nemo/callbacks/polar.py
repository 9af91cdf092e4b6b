"""The polar factor of a matrix by Newton-Schulz iteration, also of one that ranks share.

- `newton_schulz`: the fixed number of iterations of the FIRE paper, the reference
- `polar_`: to a tolerance, in place, on this rank's share
- `deviation`: how far a matrix is from an isometry
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megacpp_nemo.callbacks.polynomials import polynomial
from megacpp_nemo.callbacks.shares import TallShare
from megacpp_nemo.callbacks.symmetric import Symmetric
from megacpp_nemo.contract.errors import RuntimeRefusal

# Short sides up to this are iterated in fp64: cheap there, and small matrices are those in which
# one ill-determined singular vector shows in every entry.
DOUBLE_UP_TO = 256
# From this ratio of long to short side on, polynomials of degree 5 are used. At 3584 x 896 three
# of them take 0.7 times as long as five of degree 3; on a square they are as fast, and their
# second matrix of the short side would be too much (`benchmarks/fire.py`).
QUINTIC_FROM = 2.0
# Singular values below this share of the bound on the largest are taken for zero: the rounding
# of fp32 weights makes as large ones.
FLOOR = 1e-7
# What rounding may add to the bound on the singular values.
MARGIN = 1.01
# Power iterations on I - G each time; they go on from the last ones.
POWER_STEPS = 4
# Parts in which rows are multiplied, a copy of one part at a time, by degree: with what the
# degree keeps beside, memory stays within twice the matrix.
CHUNKS = {3: 8, 5: 4}


class Outcome(NamedTuple):
    """How `polar_` went.

    Args:
        iterations: Iterations it took; 0 if the matrix was left as it was.
        reached: Whether the tolerance was reached.
        before: Mean squared deviation from isometry of what was given, `DfI / short side`.
        after: The same of what is left.
    """

    iterations: int
    reached: bool
    before: float
    after: float


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """Return `iterations` of `X <- 1.5 X - 0.5 X X^T X`, from `X = matrix / ||matrix||_F`.

    As in the FIRE paper (arXiv 2602.08040), before its scaling. `[out, in]`, transposed if
    `out < in`.
    """
    if matrix.size(0) < matrix.size(1):
        return newton_schulz(matrix.t(), iterations).t()
    x = matrix / torch.linalg.matrix_norm(matrix)
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.t() @ x)
    return x


def defect(gram: Tensor) -> float:
    """Return `DfI / d = ||G - I||_F^2 / d` of a Gram matrix `[d, d]`."""
    eye = torch.eye(gram.size(0), dtype=gram.dtype, device=gram.device)
    return float(torch.linalg.matrix_norm(gram - eye) ** 2) / gram.size(0)


@torch.no_grad()
def deviation(
    share: Tensor, *, shape: tuple[int, int], split: int | None = None, group: Any = None
) -> float:
    """Return `DfI / short side` of a matrix, given as `polar_` takes it; it is not changed."""
    layout = TallShare(shape=shape, split=split, group=group)
    with _full_precision(share):
        return _gram(_working(layout.take(share), layout), layout).deviation()


@torch.no_grad()
def polar_(
    share: Tensor,
    *,
    shape: tuple[int, int],
    split: int | None = None,
    group: Any = None,
    tolerance: float = 1e-6,
    max_iterations: int = 40,
) -> Outcome:
    """Replace a matrix by its polar factor, the nearest isometry.

    Each iteration is an odd polynomial, which moves singular values towards 1 and keeps singular
    vectors: the best one for where the singular values can be. Their bound holds for every
    matrix; the least of them is estimated by power iteration, which costs next to nothing and
    goes on from one iteration to the next. A wrong estimate costs iterations, not the result.
    Normal numbers of 768 x 768 take 13 iterations where `newton_schulz` takes 29.

    A singular value of zero stays zero, and one lost in rounding ends anywhere up to 1: then the
    tolerance is not reached, and what is left is a partial isometry. All zeros stay so.
    Products are in full fp32, whatever is allowed elsewhere. Beside the share this takes the Gram
    matrix of the short side by blocks, its square for degree 5, and part of the share: together
    no more than the whole matrix. Up to a short side of 256 products are in fp64, and take a few
    times the matrix.

    Args:
        share: This rank's share of the matrix in fp32, changed in place.
        shape: `[out, in]` of the whole matrix.
        split: Dimension that is split over `group`; None if this rank has all of it.
        group: Ranks that share the matrix; all of them call this together.
        tolerance: On `DfI / short side`, the mean squared deviation from isometry.
        max_iterations: At most so many iterations.

    Raises:
        RuntimeRefusal: Before anything is written, if it is no matrix of this shape, or, on every
            rank, an entry is not finite.
    """
    layout = TallShare(shape=shape, split=split, group=group)
    layout.check(share)
    norm = _norm(share, layout)
    if norm < torch.finfo(torch.float32).tiny:
        return Outcome(0, False, 1.0, 1.0)
    with _full_precision(share):
        tall = _working(layout.take(share), layout)
        # A power of two, so that nothing overflows and it can be undone exactly.
        shift = 2.0 ** math.frexp(norm)[1]
        tall.div_(shift)
        gram = _gram(tall, layout)
        (before,) = _agreed([gram.deviation(shift**2)], tall, layout)
        if before <= tolerance:
            tall.mul_(shift)
            return Outcome(0, True, before, before)
        iterations, after = _iterate(tall, gram, layout, tolerance, max_iterations)
        del gram
        layout.give(tall, share)
    return Outcome(iterations, after <= tolerance, before, after)


def _iterate(
    tall: Tensor, gram: Symmetric, layout: TallShare, tolerance: float, most: int
) -> tuple[int, float]:
    """Take singular values to 1, in place; return the iterations and the deviation left.

    Args:
        tall: This rank's rows `[rows, short]`.
        gram: Gram matrix of all rows; overwritten.
        layout: How the matrix is shared.
        tolerance: On the mean squared deviation.
        most: At most so many iterations.
    """
    bound = MARGIN * gram.largest()
    tall.div_(math.sqrt(bound))
    gram.flat.div_(bound)
    degree = 5 if layout.long >= QUINTIC_FROM * layout.short else 3
    start = torch.randn(1, gram.size, generator=torch.Generator().manual_seed(0))
    probe, floor = start.to(tall), FLOOR
    for iteration in range(most + 1):
        left, low = _agreed([gram.deviation(), _least(gram, probe)], tall, layout)
        # What began at the floor is at 1 as well: the rest is zero.
        if left <= tolerance or iteration == most or (1 - floor**2) ** 2 <= tolerance:
            return iteration, left
        a, b, c = polynomial(max(low, floor), degree)
        floor = min(floor * (a + b * floor**2 + c * floor**4), 1.0)
        square = gram.square() if c else None
        gram.flat.mul_(b)
        if square is not None:
            gram.flat.add_(square.flat, alpha=c)
            del square
        _multiply_(tall, gram.add_diagonal_(a), CHUNKS[degree])
        layout.reduce(gram.gram_(tall).flat)
    raise AssertionError("the last iteration returns")


def _least(gram: Symmetric, probe: Tensor) -> float:
    """Return an estimate of the least singular value, from above; improves `probe` `[1, d]`."""
    image = torch.empty_like(probe)
    for _ in range(POWER_STEPS):
        probe.sub_(gram.multiply(probe, image))
    length = float(torch.linalg.vector_norm(probe))
    if not length:  # all singular values are 1
        return 1.0
    probe.div_(length)
    return math.sqrt(max(float(gram.multiply(probe, image) @ probe.t()), 0.0))


def _multiply_(tall: Tensor, factor: Symmetric, chunks: int) -> None:
    """Multiply rows `[rows, d]` by a symmetric matrix, in place, so many parts in turn."""
    if not tall.size(0):
        return
    pieces = tall.chunk(chunks)
    buffer = tall.new_empty(pieces[0].shape)
    for piece in pieces:
        piece.copy_(factor.multiply(piece, buffer[: piece.size(0)]))


def _working(tall: Tensor, layout: TallShare) -> Tensor:
    return tall.double() if layout.short <= DOUBLE_UP_TO else tall


def _gram(tall: Tensor, layout: TallShare) -> Symmetric:
    """Return the Gram matrix of all ranks' rows."""
    gram = Symmetric(layout.short, like=tall).gram_(tall)
    layout.reduce(gram.flat)
    return gram


def _norm(share: Tensor, layout: TallShare) -> float:
    """Return the Frobenius norm, which no entry overflows; refuse entries that are not finite."""
    total = torch.zeros((), dtype=torch.float64, device=share.device)
    for piece in share.chunk(16) if share.numel() else ():
        total += piece.double().square().sum()
    norm = math.sqrt(float(layout.reduce(total)))
    if math.isfinite(norm):
        return norm
    raise RuntimeRefusal(
        "A matrix with entries that are not finite has no polar factor",
        given=f"a Frobenius norm of {norm}",
        allowed="finite entries",
        hint="a checkpoint from before they appeared",
    )


def _agreed(values: list[float], like: Tensor, layout: TallShare) -> list[float]:
    """Return the means of values over ranks: ranks that round differently decide alike."""
    if layout.split is None:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=like.device)
    return [float(value) / layout.ranks for value in layout.reduce(shared)]


@contextlib.contextmanager
def _full_precision(share: Tensor) -> Iterator[None]:
    """Keep fp32 products in fp32: neither TF32 nor bf16 nor autocast, whatever is set."""
    backends: Any = torch.backends
    with torch.autocast(share.device.type, enabled=False), contextlib.ExitStack() as undo:
        if hasattr(backends.cuda.matmul, "fp32_precision"):
            for place in (backends.cuda.matmul, backends.mkldnn.matmul):
                undo.callback(setattr, place, "fp32_precision", place.fp32_precision)
                place.fp32_precision = "ieee"
        else:  # torch 2.8 and before
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
