"""M2RNN's scan as one autograd function: forward, and backward by hand through time.

`m2rnn.m2rnn_scan` is the public form. States are kept at chunk boundaries in forward and
recomputed chunk by chunk in backward; all that does not depend on the running state is batched
over the tokens of a chunk. The layout inside is [seq, heads, batch, ...], so that a step's
matrices lie together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# For every token, the rows [1, batch, 1, 1] whose state restarts there; None for no row.
Restarts = Sequence["Tensor | None"]


class Scan(torch.autograd.Function):
    """The scan on q, k [seq, heads, batch, K], v [..., V], f [seq, heads, batch], W [heads, V, V].

    Gradients, with G_t the total gradient by H_t, clipped, and P_t that by the argument of tanh:
        G_t = clip(q_t dy_t^T + f_{t+1} G_{t+1} + P_{t+1} W^T)      P_t = (1 - f_t)(1 - Z_t^2) G_t
        dq_t = H_t dy_t    dk_t = P_t v_t    dv_t = P_t^T k_t    df_t = <G_t, H_{t-1} - Z_t>
        dW = sum_t H_{t-1}^T P_t
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Return y [seq, heads, batch, V] and the final state."""
        q, k, v, f, W, initial, restarts, clip, chunk_size = args
        with _plain_torch(v.device):
            starts = range(0, len(v), chunk_size)
            entering = v.new_empty(len(starts), *initial.shape)
            states = v.new_empty(chunk_size + 1, *initial.shape)
            updates = v.new_empty(chunk_size, *initial.shape)
            y, state = torch.empty_like(v), initial
            for chunk, start in enumerate(starts):
                here = slice(start, min(start + chunk_size, len(v)))
                n = here.stop - start
                H, Z = states[: n + 1], updates[:n]
                entering[chunk] = H[0] = state
                _advance(k[here], v[here], f[here], W, restarts[here], H, Z)
                _row_by_matrix(q[here], H[1:], out=y[here], scratch=Z)
                state = H[n]
            ctx.save_for_backward(q, k, v, f, W, entering)
            ctx.restarts, ctx.clip, ctx.chunk_size = restarts, clip, chunk_size
            return y, state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments."""
        with _plain_torch(dy.device):
            q, k, v, f, W, entering = ctx.saved_tensors
            dq, dk, dv, df, dW = (
                torch.zeros_like(t) if needed else None
                for t, needed in zip((q, k, v, f, W), ctx.needs_input_grad, strict=False)
            )
            dy, carry, size = dy.contiguous(), dfinal, ctx.chunk_size
            states, by_state = (v.new_empty(size + 1, *dfinal.shape) for _ in range(2))
            updates, slopes = (v.new_empty(size, *dfinal.shape) for _ in range(2))
            for chunk in reversed(range(len(entering))):
                here = slice(chunk * size, min((chunk + 1) * size, len(v)))
                n, restarts = here.stop - here.start, ctx.restarts[here]
                H, Z, G, P = states[: n + 1], updates[:n], by_state[: n + 1], slopes[:n]
                H[0] = entering[chunk]
                _advance(k[here], v[here], f[here], W, restarts, H, Z)
                if dq is not None:
                    _matrix_by_column(H[1:], dy[here], out=dq[here], scratch=G[1:])
                _outer(q[here], dy[here], out=G[1:])
                G[n].add_(carry)
                _retreat(f[here], W, restarts, ctx.clip, Z, G, P)
                carry = G[0]
                seen = _as_seen(H, restarts)
                if dW is not None:
                    dW += (seen.flatten(2, 3).mT @ P.flatten(2, 3)).sum(0)
                if df is not None:
                    torch.sum(torch.sub(seen, Z, out=Z).mul_(G[1:]), (-2, -1), out=df[here])
                if dk is not None:
                    _matrix_by_column(P, v[here], out=dk[here], scratch=Z)
                if dv is not None:
                    _row_by_matrix(k[here], P, out=dv[here], scratch=Z)
        return dq, dk, dv, df, dW, carry.clone(), None, None, None


def _advance(
    k: Tensor, v: Tensor, f: Tensor, W: Tensor, restarts: Restarts, H: Tensor, Z: Tensor
) -> None:
    """Fill H[1:] and Z from H[0] for the tokens of one chunk.

    H [tokens + 1, heads, batch, K, V] and Z [tokens, ...] are contiguous.
    """
    _outer(k, v, out=Z)
    states, updates, gates = H.unbind(0), Z.unbind(0), f[..., None, None].unbind(0)
    arguments = Z.flatten(2, 3).unbind(0)
    # On CPU numpy's tanh, on the same memory, is ten times faster than torch's and as exact.
    arrays = list(Z.numpy()) if Z.device.type == "cpu" else None
    previous = states[0]
    for t, restart in enumerate(restarts):
        if restart is not None:
            previous = previous.masked_fill(restart, 0.0)
        update = updates[t]
        arguments[t].baddbmm_(previous.flatten(1, 2), W)
        if arrays is None:
            update.tanh_()
        else:
            numpy.tanh(arrays[t], out=arrays[t])
        previous = torch.lerp(update, previous, gates[t], out=states[t + 1])


def _retreat(
    f: Tensor, W: Tensor, restarts: Restarts, clip: float | None, Z: Tensor, G: Tensor, P: Tensor
) -> None:
    """Carry gradients back through one chunk.

    On entry G[t + 1] is the gradient of token t's readout (and, for the last token, what comes
    from later chunks). On return G[1:] and P are G_t and P_t of the equations, and G[0] is the
    gradient by the state that entered the chunk.
    """
    torch.addcmul(Z.new_ones(()), Z, Z, value=-1, out=P).mul_((1 - f)[..., None, None])
    G[0].zero_()
    W = W.mT.contiguous()
    totals, slopes, gates = G.unbind(0), P.unbind(0), f[..., None, None].unbind(0)
    flat_totals, flat_slopes = G.flatten(2, 3).unbind(0), P.flatten(2, 3).unbind(0)
    for t in reversed(range(len(slopes))):
        total, earlier, restart = totals[t + 1], totals[t], restarts[t]
        if clip is not None:
            total.clamp_(-clip, clip)
        slopes[t].mul_(total)
        if restart is None:
            earlier.addcmul_(gates[t], total)
            flat_totals[t].baddbmm_(flat_slopes[t], W)
        else:
            crossing = gates[t] * total
            crossing.flatten(1, 2).baddbmm_(flat_slopes[t], W)
            earlier.add_(crossing.masked_fill_(restart, 0.0))


def _as_seen(H: Tensor, restarts: Restarts) -> Tensor:
    """Turn H[:-1] in place into the states the tokens read: zero where their document begins."""
    for state, restart in zip(H.unbind(0), restarts, strict=False):
        if restart is not None:
            state.masked_fill_(restart, 0.0)
    return H[:-1]


def _outer(column: Tensor, row: Tensor, *, out: Tensor) -> None:
    """Write column [..., K] times row [..., V] to out [..., K, V]."""
    torch.mul(column.unsqueeze(-1), row.unsqueeze(-2), out=out)


def _row_by_matrix(row: Tensor, matrix: Tensor, *, out: Tensor, scratch: Tensor) -> None:
    """Write row [..., K] times matrix [..., K, V] to out [..., V]."""
    # Below 400 multiply-adds torch's batched product on CPU is a scalar loop.
    if matrix.shape[-1] * matrix.shape[-2] >= 400 or matrix.device.type != "cpu":
        torch.matmul(row.unsqueeze(-2), matrix, out=out.unsqueeze(-2))
    else:
        torch.sum(torch.mul(row.unsqueeze(-1), matrix, out=scratch), -2, out=out)


def _matrix_by_column(matrix: Tensor, column: Tensor, *, out: Tensor, scratch: Tensor) -> None:
    """Write matrix [..., K, V] times column [..., V] to out [..., K]."""
    torch.mul(matrix, column.unsqueeze(-2), out=scratch)
    ones = column.new_ones(column.shape[-1])
    torch.mv(scratch.flatten(0, -2), ones, out=out.view(-1))


def find_restarts(document_ids: Tensor | None, seq: int) -> Restarts:
    """Find the restarts of document ids [batch, seq]; the first token continues the past."""
    if document_ids is None:
        return [None] * seq
    starts = document_ids[:, 1:] != document_ids[:, :-1]
    masks = starts[None, :, None, None].unbind(-1)
    some = starts.any(0).tolist()
    return [None, *(mask if any_row else None for mask, any_row in zip(masks, some, strict=True))]


@contextmanager
def _plain_torch(device: torch.device) -> Iterator[None]:
    """Run without autocast, and without Python overrides of torch functions.

    A `TorchFunctionMode` (a default device, a call counter) adds microseconds to every call;
    the loops over tokens make tens of thousands.
    """
    with torch._C.DisableTorchFunction(), torch.autocast(device.type, enabled=False):
        yield
