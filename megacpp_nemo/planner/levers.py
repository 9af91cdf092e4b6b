"""What a lever would touch, and what it would cost, before a run.

- `placement`: every logical matrix of a model, chosen by a selection or left alone and why
- `fire_cost`: floating-point operations and memory of one FIRE pass
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megacpp_nemo.contract.parameters import Parameter, Part, Selection


class Placed(NamedTuple):
    """One logical matrix, or another parameter as a whole.

    Args:
        parameter: Its parameter.
        part: The matrix; None for what is no matrix.
        refusal: Why it is left alone; None if it is chosen.
    """

    parameter: Parameter
    part: Part | None
    refusal: str | None

    @property
    def name(self) -> str:
        """Its name, with its part if it has several."""
        parameter, part = self.parameter, self.part
        return parameter.name if part is None else parameter.part_name(part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, `[out, in]` for a matrix."""
        whole = self.parameter.shape
        return whole if self.part is None else (self.part.height, *whole[1:])

    @property
    def size(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


def placement(parameters: Iterable[Parameter], selection: Selection) -> tuple[Placed, ...]:
    """Return every matrix and every other parameter, each with its verdict, in order."""
    return tuple(
        Placed(parameter, part, selection.refusal(parameter, part))
        for parameter in parameters
        for part in (parameter.parts or (None,))
    )


# Iterations of matrices of normal numbers to the default tolerance, by the degree of their
# polynomials (`benchmarks/fire.py`: 3584 x 3584, and 3584 x 896).
ITERATIONS = {3: 17, 5: 3}
# As `callbacks.polar` chooses: degree 5 from this ratio of long to short side on.
QUINTIC_FROM = 2.0


@dataclass(frozen=True, kw_only=True)
class FireCost:
    """The cost of one FIRE pass over whole matrices, before they are split over ranks.

    Args:
        flops: Floating-point operations of all matrix products.
        largest_elements: Elements of the largest matrix.
        extra_bytes: Memory beside the weights: a copy of one matrix in fp32, and its Gram matrix.
    """

    flops: int
    largest_elements: int
    extra_bytes: int


def fire_cost(placed: Iterable[Placed], *, iterations: int | None = None) -> FireCost:
    """Return the cost of FIRE on the chosen matrices.

    With a long and a short side, a Gram matrix takes `2 long short^2` operations, of which
    symmetry saves up to three eighths, and an iteration one of these, a product of
    `2 long short^2` and, of degree 5, a square of `2 short^3`, saved alike.

    Args:
        placed: From `placement`; what is left alone costs nothing.
        iterations: Iterations a matrix takes; by default what was measured, by its shape.
    """
    flops = extra = largest = 0
    for item in placed:
        if item.refusal is not None or item.part is None:
            continue
        long, short = max(item.shape), min(item.shape)
        degree = 5 if long >= QUINTIC_FROM * short else 3
        kept = _kept(short)
        gram = int(kept * 2 * long * short**2)
        square = int(kept * 2 * short**3) if degree == 5 else 0
        count = ITERATIONS[degree] if iterations is None else iterations
        flops += gram + count * (gram + 2 * long * short**2 + square)
        squares = 2 if degree == 5 else 1
        extra = max(extra, 4 * (long * short + int(squares * kept * short**2)))
        largest = max(largest, long * short)
    return FireCost(flops=flops, largest_elements=largest, extra_bytes=extra)


def _kept(short: int) -> float:
    """Return the share of a symmetric matrix that is kept and computed, by its size."""
    return 1.0 if short <= 256 else 0.75 if short <= 1024 else 0.625
