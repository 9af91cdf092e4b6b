"""M2RNN's scan on a GPU: an autograd function around the kernels of `m2rnn_triton_kernels`.

Forward keeps the states at chunk boundaries; backward recomputes a chunk at a time. Importing
this module imports triton: `m2rnn.m2rnn_scan` does so only where it runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacpp_nemo.model import m2rnn_triton_kernels as kernels
from megacpp_nemo.model.arguments import document_starts

# Triton's dot takes no matrix narrower than this.
NARROWEST = 16
INTERPRETED = not isinstance(kernels.forward, triton.runtime.JITFunction)


class TritonScan(torch.autograd.Function):
    """The scan on q, k [batch, seq, qk_heads, K], v [batch, seq, heads, V], f, W and a state.

    Gradients by q and k are written per value head in fp32 and then summed over the heads that
    share them, so that their order, and with it the result, is always the same.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Return y [batch, seq, heads, V] in v's dtype and the final state in fp32."""
        q, k, v, f, W, initial, starts, clip, chunk_size = args
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        W = W.contiguous()
        (batch, seq, heads, V), K = v.shape, q.shape[-1]
        y = v.new_empty(v.shape)
        final = v.new_empty(batch, heads, K, V, dtype=torch.float32)
        chunks = triton.cdiv(seq, chunk_size)
        entering = v.new_empty(batch, heads, chunks, K, V, dtype=torch.float32)
        # Where there is no initial state or boundary, the pointer is not read.
        state = final if initial is None else initial.contiguous()
        with torch.cuda.device_of(v):
            kernels.forward[(batch * heads,)](
                q, k, v, f, W, state, final if starts is None else starts, y, final, entering,
                *_strides(q, k, v, f), seq, heads, heads // q.shape[2],
                **_blocks(K, V), CHUNK=chunk_size,
                CONTINUED=initial is not None, PACKED=starts is not None,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, f, W, entering, starts)
        ctx.clip, ctx.chunk_size = clip, chunk_size
        ctx.initial_dtype = None if initial is None else initial.dtype
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments."""
        q, k, v, f, W, entering, starts = ctx.saved_tensors
        (batch, seq, heads, V), (qk_heads, K) = v.shape, q.shape[2:]
        dy, dfinal, fp32 = dy.contiguous(), dfinal.contiguous(), {"dtype": torch.float32}
        shared = qk_heads < heads
        dq, dk = (
            t.new_empty(batch, seq, heads, K, dtype=torch.float32 if shared else t.dtype)
            for t in (q, k)
        )
        dv, df = v.new_empty(v.shape), f.new_empty(f.shape)
        dW, dinitial = v.new_empty(batch, heads, V, V, **fp32), torch.empty_like(dfinal)
        seen, updates = (v.new_empty(batch, heads, ctx.chunk_size, K, V, **fp32) for _ in range(2))
        with torch.cuda.device_of(v):
            kernels.backward[(batch * heads,)](
                q, k, v, f, W, entering if starts is None else starts, entering, dy, dfinal,
                dq, dk, dv, df, dW, dinitial, seen, updates,
                *_strides(q, k, v, f), seq, heads, heads // qk_heads, float(ctx.clip or 0.0),
                **_blocks(K, V), CHUNK=ctx.chunk_size,
                CLIPPED=ctx.clip is not None, PACKED=starts is not None,
            )  # fmt: skip
        if shared:
            dq, dk = (
                by_head.unflatten(2, (qk_heads, -1)).sum(3).to(t.dtype)
                for by_head, t in ((dq, q), (dk, k))
            )
        by_initial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
        return dq, dk, dv, df, dW.sum(0).to(W.dtype), by_initial, None, None, None


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    state_gradient_clip: float | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Run `m2rnn_scan` by the kernels; the arguments have been checked."""
    starts = None
    if document_ids is not None:
        starts = document_starts(document_ids).to(torch.uint8)
    arguments = (q, k, v, f, W, initial_state, starts, state_gradient_clip, chunk_size)
    return TritonScan.apply(*arguments)  # type: ignore[no-untyped-call]


def padded(size: int) -> int:
    """Return the rows or columns that the kernels hold for K or V: a power of two, at least 16."""
    return max(NARROWEST, int(triton.next_power_of_2(size)))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _blocks(K: int, V: int) -> dict[str, int]:
    """Return the sizes of one head, padded to powers of two, and the warps that share it."""
    rows, columns = padded(K), padded(V)
    warps = min(max(rows * columns // 256, 1), 8)
    return {"K": K, "V": V, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
