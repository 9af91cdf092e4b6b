"""Mamba-3 (arXiv 2603.15569): the recurrence, token by token, and what its forms share.

    theta_t = theta_{t-1} + pi tanh(angle_t) dt_t             k_t, q_t = B_t, C_t turned by theta_t
    h_t = alpha h_{t-1} + beta v_{t-1} k_{t-1}^T + gamma v_t k_t^T        y_t = h_t q_t + D v_t
    alpha = exp(dt A)    beta = (1 - lambda) dt alpha    gamma = lambda dt    lambda = sigmoid(trap)

All of A, dt, lambda and the angle come from the token. In the multi-input multi-output form
(MIMO) of rank R, x is scaled into R inputs v by `mimo_x`, the products with k and q are sums over
R of them, and R outputs are gated, scaled by `mimo_o` and summed. The single form (SISO) turns
adjacent pairs of the state's entries, MIMO entries i and i + state / 2, as mamba-ssm 2.3.2 does.

`mamba3_sequential` is the equation; `mamba3_chunked` the same map as matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megacpp_nemo.model.mamba3_parts import (
    Mamba3State,
    leaving,
    prepare,
    read_out,
    turn,
    values_of,
)

__all__ = ["Mamba3State", "mamba3_sequential"]


def mamba3_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    *,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: Mamba3State | None = None,
) -> tuple[Tensor, Mamba3State]:
    """Run the recurrence token by token: the reference for `mamba3_chunked`.

    Args:
        x: Input [batch, seq, heads, head_dim].
        dt: Step sizes [batch, seq, heads], already positive (after softplus).
        A: Decay rates [batch, seq, heads], negative.
        trap: Logits of lambda [batch, seq, heads].
        B: Input projections [batch, seq, rank, groups, state], normalized; heads must be a
            multiple of groups, and head h reads group h // (heads // groups).
        C: Output projections, shaped like B.
        angles: Rates of rotation before tanh [batch, seq, angles], for at most state / 2 pairs;
            the entries beyond are not turned.
        B_bias: Added to B by head [heads, rank, state].
        C_bias: Added to C, likewise.
        D: Skip weights [heads], or None for no skip.
        z: Gate of the output, before SiLU, shaped like x; or None for no gate.
        mimo_x: Scales of x by rank [heads, rank, head_dim]; None for SISO.
        mimo_z: Scales of z by rank, where both are given.
        mimo_o: Scales of the outputs that are summed over rank.
        document_ids: Integers [batch, seq]; where the value changes state, angle and the input
            before are forgotten.
        initial_state: What an earlier part of the rows left; default nothing.

    Returns:
        y [batch, seq, heads, head_dim] in `x.dtype`, and the state after the last token. The
        arithmetic is in fp32, or in fp64 if an input is.

    Raises:
        RuntimeRefusal: The shapes do not fit each other.
    """
    with torch.autocast(x.device.type, enabled=False):
        given = prepare(
            x, dt, A, trap, B, C, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o,
            document_ids, initial_state,
        )  # fmt: skip
        ssm, key, value, angle = vars(given.state).values()
        value = values_of(value, mimo_x)
        outputs = []
        for t, now in enumerate(zip(*(part.unbind(1) for part in given[:7]), strict=True)):
            keys, queries, values, log_decay, own, last, turns = now
            if given.starts is not None:
                begins = given.starts[:, t, None, None]
                ssm, key, angle = (
                    ssm.masked_fill(begins[..., None], 0.0),
                    key.masked_fill(begins[..., None], 0.0),
                    angle.masked_fill(begins, 0.0),
                )
            angle = angle + turns
            alpha = log_decay.exp().to(value.dtype)[..., None, None]
            before = last[..., None, None] * alpha * (value.mT @ key)
            key, query = turn(keys, queries, angle, mimo_x is not None)
            value = values
            ssm = alpha * ssm + before + own[..., None, None] * (value.mT @ key)
            outputs.append(query @ ssm.mT)
        y = read_out(torch.stack(outputs, dim=1), given.values, D, z, mimo_z, mimo_o)
    return y.to(x.dtype), leaving(ssm, key, x, angle)
