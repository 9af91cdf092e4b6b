"""Weight vectors multiplied by a factor each, and what is reported of it.

- `shrink_vectors`: both, as DASH and periodic shrink do
- `scale_vectors`, `report`: one of them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megacpp_nemo.callbacks.matrices import ROWS, Matrix
from megacpp_nemo.callbacks.optimizers import OptimizerStates, synchronized

# By name of a matrix, and by quantity.
Reports = dict[str, dict[str, float]]


def shrink_vectors(
    strategy: Any, matrices: Sequence[Matrix], factors: Sequence[Tensor], states: OptimizerStates
) -> tuple[Reports, int]:
    """Multiply vectors on every rank that has them, and return what `report` says of it.

    Collective over all ranks. The arguments are those of `scale_vectors`, and NeMo's strategy.
    """
    scale_vectors(matrices, factors, states)
    synchronized(strategy)
    return report(matrices, factors)


def scale_vectors(
    matrices: Sequence[Matrix], factors: Sequence[Tensor], states: OptimizerStates
) -> None:
    """Multiply the vectors of matrices and biases, and their masters; moments are kept.

    A rank writes what its optimizer owns: `optimizers.synchronized` brings it to the others.

    Args:
        matrices: Matrices, and biases as matrices of one row.
        factors: `[vectors of this rank]` for each of them; NaN and 1 leave a vector as it is.
        states: Where the masters are.
    """
    of_parameter: dict[nn.Parameter, Tensor] = {}
    for matrix, own in zip(matrices, factors, strict=True):
        rows = of_parameter.setdefault(
            matrix.weight, matrix.weight.new_ones(matrix.weight.size(0), dtype=torch.float32)
        )
        # The one factor of a bias is that of all its entries.
        values = own.nan_to_num(nan=1.0).to(rows).expand(max(matrix.part.height, own.numel()))
        at = 0
        for begin, end in matrix.part.rows:
            rows[begin:end] = values[at : at + end - begin]
            at += end - begin
    for parameter, rows in of_parameter.items():
        states.scale(parameter, rows.view(-1, *[1] * (parameter.dim() - 1)))


def report(matrices: Sequence[Matrix], factors: Sequence[Tensor]) -> tuple[Reports, int]:
    """Return what was done to the matrices this rank speaks for, and the bytes of those changed.

    Collective over the ranks that share a matrix.

    Returns:
        By name of the whole matrix: `rows`, how many of them were `shrunk`, their `mean_factor`
        and `min_factor`; and the size of the changed ones, whole. Over ranks, bytes add up.
    """
    reports: Reports = {}
    changed = 0
    for matrix, own in zip(matrices, factors, strict=True):
        values = own.nan_to_num(nan=1.0)
        sums = torch.stack([torch.ones_like(values), (values.float() != 1).to(values), values])
        sums = sums.sum(1)
        low = torch.cat([values, values.new_ones(1)]).min()
        if matrix.split == ROWS:
            matrix.reduce(sums)
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN, group=matrix.group)
        rows, shrunk, total = sums.tolist()
        if matrix.is_reported_here:
            reports[matrix.name] = {
                "rows": rows,
                "shrunk": shrunk,
                "mean_factor": total / rows,
                "min_factor": float(low),
            }
            if shrunk:
                changed += matrix.shape[0] * matrix.shape[1] * matrix.weight.element_size()
    return reports, changed
