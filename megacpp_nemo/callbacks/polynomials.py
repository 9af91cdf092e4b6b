"""Odd polynomials that take the singular values of a matrix to 1, by repetition.

`a X + b X X^T X + c X (X^T X)^2` has the singular vectors of `X` and the singular values
`a x + b x^3 + c x^5`, so a polynomial of one number says all of it.
"""

from __future__ import annotations

import math

import torch

# No polynomial maps what it may to less than about a tenth: what is scaled down is scaled up
# again with its rounding, and just beyond lie values that change their sign.
LARGEST_SCALE, LEAST_LOW = 1.7, 0.02
# From here on the minimax polynomial and its limit for `low = 1` differ by less than 1e-6.
NEAR_ONE = 0.99


def polynomial(low: float, degree: int) -> tuple[float, float, float]:
    """Return `a, b, c` of `a x + b x^3 + c x^5`, which takes `[low, 1]` as near to 1 as it can.

    On `(0, 1]` its values are above 0 and at most 1, so it may be followed by another one. Of
    degree 3 it is the polynomial of Chen and Chow (A stable scaling of Newton-Schulz, 2014), of
    degree 5 the minimax one.

    Args:
        low: Least value that is to come near 1; above 0, up to 1.
        degree: 3 or 5.
    """
    if degree == 3:
        scale = min(math.sqrt(3 / (1 + low + low**2)), LARGEST_SCALE)
        return 1.5 * scale, -0.5 * scale**3, 0.0
    if low > NEAR_ONE:
        return 1.875, -1.25, 0.375
    a, b, c, error = _minimax(max(low, LEAST_LOW))
    # Its largest value is at 1, and beyond it grows up to 13 times as fast as its argument: a
    # little less keeps what rounding puts above 1 from being carried away.
    most = 1 + 1.01 * error
    return a / most, b / most, c / most


def _minimax(low: float) -> tuple[float, float, float, float]:
    """Return the odd polynomial of degree 5 nearest to 1 on `[low, 1]`, and its error.

    By Remez's exchange: the error is the same at both ends and at the two extrema between them,
    with changing sign.
    """
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    points = [low, (3 * low + 1) / 4, (low + 3) / 4, 1.0]
    while True:
        x = torch.tensor(points, dtype=torch.float64)
        terms = torch.stack([x, x**3, x**5, signs], 1)
        a, b, c, error = torch.linalg.solve(terms, torch.ones_like(x)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        extrema = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
        moved = max(abs(new - old) for new, old in zip(extrema, points[1:3], strict=True))
        if moved < 1e-6:
            return a, b, c, abs(error)
        points[1:3] = extrema
