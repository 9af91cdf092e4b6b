"""How a model's weight vectors lie to the gradient, alike in every layout.

A vector is a row of a logical matrix: the incoming weights of one unit. A rank may have some of
its columns, and the gradient of only that part of them that its optimizer owns; what is said of
a vector here is summed over all who have a part of it.

- `with_biases`: matrices, and the biases that go with them as matrices of one row
- `cosines`: the cosine of each vector with its gradient
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacpp_nemo.callbacks.matrices import COLUMNS, ROWS, Matrix
from megacpp_nemo.callbacks.optimizers import OptimizerStates, Owned
from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.parameters import ParameterKind

# What there is of a gradient on this rank, `[end - begin]`, for a parameter and what it owns.
Gradient = Callable[[nn.Parameter, Owned], Tensor]

# Elements multiplied at once, in fp64.
CHUNK = 1 << 24


def last_gradient(parameter: nn.Parameter, owned: Owned) -> Tensor:
    """Return this rank's part of the last step's gradient, clipped or not, in its own precision.

    With the distributed optimizer only the owned part of `main_grad` is reduced over ranks.
    """
    gradient: Tensor = parameter.main_grad.view(-1)[owned.begin : owned.end]  # type: ignore[attr-defined]
    return gradient


def with_biases(models: Sequence[nn.Module], matrices: Sequence[Matrix]) -> list[Matrix]:
    """Return the matrices and, after them, the trained biases of their projections.

    A bias is one vector, so it is a matrix of one row; that of a fused matrix has one per part.
    """
    biases = {}
    for model in models:
        for module in model.modules():
            for name, weight in module._parameters.items():
                bias = module._parameters.get(name.replace("weight", "bias"))
                if weight is None or bias is None or bias is weight:
                    continue
                if bias.requires_grad:
                    biases[weight] = bias
    return [
        *matrices,
        *(_bias(matrix, biases[matrix.weight]) for matrix in matrices if matrix.weight in biases),
    ]


def _bias(matrix: Matrix, bias: nn.Parameter) -> Matrix:
    # Where the rows of a matrix are split its bias is, and that is the columns of a single row.
    split = matrix.split == ROWS
    name = matrix.parameter.name.replace(".weight", ".bias")
    return dataclasses.replace(
        matrix,
        name=matrix.name.replace(".weight", ".bias"),
        parameter=dataclasses.replace(
            matrix.parameter, name=name, shape=tuple(bias.shape), kind=ParameterKind.BIAS
        ),
        weight=bias,
        shape=(1, matrix.shape[0]),
        split=COLUMNS if split else None,
        group=matrix.group if split else None,
    )


@torch.no_grad()
def cosines(
    matrices: Sequence[Matrix], gradient: Gradient, states: OptimizerStates
) -> list[Tensor]:
    """Return the cosine of each vector with its gradient, `[vectors of this rank]` in fp64.

    It is NaN where one of the two is zero. Collective over all ranks.

    Args:
        matrices: Matrices and biases, in an order that ranks sharing one agree on.
        gradient: What there is of the gradient on this rank.
        states: Where the masters are, which stand for the weights.

    Raises:
        RuntimeRefusal: On every rank, if a weight or gradient on any of them is not finite.
    """
    of_parameter: dict[nn.Parameter, Tensor] = {}
    sums = []
    for matrix in matrices:
        if matrix.weight not in of_parameter:
            of_parameter[matrix.weight] = _parameter_sums(matrix.weight, gradient, states)
        sums.append(_vector_sums(matrix, of_parameter[matrix.weight]))
    _refuse_non_finite(matrices, sums)
    return [each[:, 0] / (each[:, 1] * each[:, 2]).sqrt() for each in sums]


def _parameter_sums(parameter: nn.Parameter, gradient: Gradient, states: OptimizerStates) -> Tensor:
    """Return sums over each row on this rank, `[rows, 3]`: gradient * weight and both squares."""
    owned = states.owned(parameter)
    width = parameter.numel() // parameter.size(0)
    first, last = owned.rows(width)
    ends = (owned.begin - first * width, last * width - owned.end)
    pairs = [
        F.pad(values, ends).view(last - first, width)
        for values in (gradient(parameter, owned), owned.master)
    ]
    sums = pairs[0].new_zeros(parameter.size(0), 3, dtype=torch.float64)
    rows = max(1, CHUNK // width)
    chunks = zip(sums[first:last].split(rows), *(v.split(rows) for v in pairs), strict=True)
    for into, g, w in chunks:
        g, w = g.double(), w.double()
        torch.stack([(g * w).sum(1), (g * g).sum(1), (w * w).sum(1)], dim=1, out=into)
    if owned.group is not None:
        torch.distributed.all_reduce(sums, group=owned.group)
    return sums


def _vector_sums(matrix: Matrix, rows: Tensor) -> Tensor:
    """Return the whole sums of a matrix's vectors, `[vectors, 3]`, from those of this rank."""
    own = [rows[begin:end] for begin, end in matrix.part.rows]
    sums = torch.cat(own) if own else rows[:0]
    if matrix.parameter.kind is ParameterKind.BIAS:
        sums = sums.sum(0, keepdim=True)
    return matrix.reduce(sums) if matrix.split == COLUMNS else sums


def _refuse_non_finite(matrices: Sequence[Matrix], sums: Sequence[Tensor]) -> None:
    bad = [m.name for m, each in zip(matrices, sums, strict=True) if not each.isfinite().all()]
    if torch.distributed.is_initialized():
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, bad)
        bad = sorted({name for names in gathered for name in names})
    if bad:
        raise RuntimeRefusal(
            "Weights or their gradients are not finite, and nothing was changed",
            given=", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else ""),
            allowed="finite weights and gradients",
            hint="an earlier checkpoint",
        )
