"""Mamba-3 by chunks: the trapezoidal recurrence as one pass of a state space duality.

With c_t = (1 - lambda_t) dt_t, the state that already holds the next token's share of this one,

    g_t = h_t + c_{t+1} v_t k_t^T = alpha_t g_{t-1} + (gamma_t + c_{t+1}) v_t k_t^T,

has one input per token, so the scan of Mamba-2 runs it; and h_t q_t is g_t q_t without the share
c_{t+1} of the token itself. Where a document ends, and after the last token, c_{t+1} is zero and
g_t is h_t. The ranks of a token are adjacent rows of the scan that see each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.model.arguments import check_chunk_size, document_index
from megacpp_nemo.model.mamba3_parts import (
    Mamba3State,
    Prepared,
    leaving,
    prepare,
    read_out,
    turn,
    values_of,
)
from megacpp_nemo.model.ssd_chunks import scan_chunks


def mamba3_chunked(
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
    chunk_size: int = 64,
) -> tuple[Tensor, Mamba3State]:
    """Compute `mamba3_sequential` by chunks of `chunk_size` tokens, without a loop over tokens.

    Arguments, results and errors are those of `mamba3_sequential`.
    """
    check_chunk_size(chunk_size)
    with torch.autocast(x.device.type, enabled=False):
        given = prepare(
            x, dt, A, trap, B, C, angles, B_bias, C_bias, D, z, mimo_x, mimo_z, mimo_o,
            document_ids, initial_state,
        )  # fmt: skip
        document = None if document_ids is None else document_index(document_ids)
        angle = _angles(given, document)
        keys, queries = turn(given.keys, given.queries, angle, mimo_x is not None)
        following = functional.pad(given.last[:, 1:], (0, 0, 0, 1))[..., None, None]
        y, ssm = _scan(given, keys, queries, following, mimo_x, document, chunk_size)
        y = y - (following * (queries @ keys.mT)) @ given.values
        y = read_out(y, given.values, D, z, mimo_z, mimo_o)
    return y.to(x.dtype), leaving(ssm, keys[:, -1], x, angle[:, -1])


def _scan(
    given: Prepared,
    keys: Tensor,
    queries: Tensor,
    following: Tensor,
    mimo_x: Tensor | None,
    document: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return g_t q_t [batch, seq, heads, rank, head_dim], and the state after the last token."""
    seq, rank = keys.size(1), keys.size(3)
    entering = given.state
    before = values_of(entering.value, mimo_x).mT @ entering.key
    state = entering.ssm + given.last[:, 0, :, None, None] * before
    drive = given.values * (given.own[..., None, None] + following)
    # Only the first rank of a token decays: the others are at the same moment.
    decay = functional.pad(given.log_decay.unsqueeze(2), (0, 0, 0, rank - 1)).flatten(1, 2)
    y, state = scan_chunks(
        _rows(drive),
        decay,
        _rows(keys),
        _rows(queries),
        None if document is None else document.repeat_interleave(rank, dim=1),
        state,
        min(chunk_size, seq) * rank,
        step=rank,
    )
    return y.unflatten(1, (seq, rank)).transpose(2, 3), state


def _rows(t: Tensor) -> Tensor:
    """Return [batch, seq * rank, heads, width] from [batch, seq, heads, rank, width]."""
    return t.transpose(2, 3).flatten(1, 2)


def _angles(given: Prepared, document: Tensor | None) -> Tensor:
    """Return the angle at each token since its document began [batch, seq, heads, angles]."""
    total, entering = given.turns.cumsum(1), given.state.angle.unsqueeze(1)
    if document is None or given.starts is None:
        return total + entering
    place = torch.arange(total.size(1), device=total.device)
    first = torch.where(given.starts, place, 0).cummax(1).values[..., None, None]
    before = (total - given.turns).gather(1, first.expand_as(total))
    return total - before + entering * (document == 0)[..., None, None]
