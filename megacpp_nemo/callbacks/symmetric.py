"""Symmetric matrices of which only the blocks on and above the diagonal are kept.

The Gram matrix of a square matrix is as large as the matrix. By blocks it takes five eighths of
that, of the memory, of the work and of what ranks send each other.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

# Sizes up to which a matrix is one block, or two on a side. More blocks mean smaller products,
# and below these sizes those cost more than the blocks save.
ONE_BLOCK, TWO_BLOCKS, BLOCKS = 256, 1024, 4


class Symmetric:
    """A symmetric matrix `[size, size]`, not initialized.

    Args:
        size: Rows and columns.
        like: A tensor of its type and on its device.

    Attributes:
        flat: All that is kept, in one tensor: products with numbers and sums of symmetric
            matrices may be taken on it.
    """

    def __init__(self, size: int, *, like: Tensor) -> None:
        count = 1 if size <= ONE_BLOCK else 2 if size <= TWO_BLOCKS else BLOCKS
        edges = [size * number // count for number in range(count + 1)]
        self.size = size
        self._spans = list(pairwise(edges))
        sizes = [(end - begin) * (size - begin) for begin, end in self._spans]
        self.flat = like.new_empty(sum(sizes))
        # One per span of rows: `[end - begin, size - begin]`, from the diagonal on.
        self._rows = [
            piece.view(-1, size - begin)
            for piece, (begin, _) in zip(self.flat.split(sizes), self._spans, strict=True)
        ]

    def gram_(self, matrix: Tensor) -> Symmetric:
        """Become `matrix^T matrix` of a matrix `[rows, size]`, and return itself."""
        for (begin, end), row in zip(self._spans, self._rows, strict=True):
            torch.mm(matrix[:, begin:end].t(), matrix[:, begin:], out=row)
        return self

    def square(self) -> Symmetric:
        """Return its product with itself."""
        result = Symmetric(self.size, like=self.flat)
        for number, row in enumerate(result._rows):
            self.multiply(self._full_rows(number), row, first=number)
        return result

    def multiply(self, matrix: Tensor, out: Tensor, *, first: int = 0) -> Tensor:
        """Set `out` to `matrix` `[rows, size]` times this, and return it.

        Args:
            matrix: What is multiplied.
            out: Columns of the product from the first one of a span on.
            first: Number of that span.
        """
        start = self._spans[first][0]
        out.zero_()
        for (begin, end), row in zip(self._spans, self._rows, strict=True):
            low = max(begin, start)
            out[:, low - start :].addmm_(matrix[:, begin:end], row[:, low - begin :])
            if begin >= start and end < self.size:
                mirrored = row[:, end - begin :].t()
                out[:, begin - start : end - start].addmm_(matrix[:, end:], mirrored)
        return out

    def add_diagonal_(self, value: float) -> Symmetric:
        """Add a number to the diagonal, and return itself."""
        for row in self._rows:
            row.diagonal().add_(value)
        return self

    def deviation(self, scale: float = 1.0) -> float:
        """Return `||scale S - I||_F^2 / size`."""
        total = self.flat.new_zeros(())
        for row in self._rows:
            diagonal, kept = row.diagonal(), row.diagonal().clone()
            diagonal.sub_(1 / scale)
            total += _square(row, row.size(0))
            diagonal.copy_(kept)
        return float(total) * scale**2 / self.size

    def largest(self) -> float:
        """Return an upper bound on the largest absolute value of its eigenvalues.

        It is the lesser of the Frobenius norm and the largest sum of absolute values of a row.
        """
        frobenius = sum(float(_square(row, row.size(0))) for row in self._rows) ** 0.5
        sums = self.flat.new_zeros(self.size)
        for (begin, end), row in zip(self._spans, self._rows, strict=True):
            sums[begin:end] += torch.linalg.vector_norm(row, ord=1, dim=1)
            sums[end:] += torch.linalg.vector_norm(row[:, end - begin :], ord=1, dim=0)
        return min(frobenius, float(sums.max()))

    def _full_rows(self, number: int) -> Tensor:
        """Return the rows of one span, `[rows, size]`, a copy."""
        begin, end = self._spans[number]
        above = [
            row[:, begin - low : end - low].t()
            for (low, _), row in zip(self._spans[:number], self._rows, strict=False)
        ]
        return torch.cat([*above, self._rows[number]], 1)


def _square(row: Tensor, diagonal: int) -> Tensor:
    """Return the sum of squares of kept rows, and of their mirror image left of the diagonal.

    Args:
        row: `[rows, columns]`, from the diagonal block on.
        diagonal: Columns of that block, which mirrors itself.
    """
    norm = torch.linalg.vector_norm
    return 2 * norm(row) ** 2 - norm(row[:, :diagonal]) ** 2
