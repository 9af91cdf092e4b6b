"""M2RNN's scan on a CPU: an autograd function around the C code of `m2rnn_cpu.c`.

Forward keeps the states at chunk boundaries; backward recomputes a chunk at a time. Sequences
and query/key heads are shared out over as many threads as torch uses.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megacpp_nemo.model.arguments import document_starts
from megacpp_nemo.model.m2rnn_build import BuildError, library

# Most rows of a state that the C code works on at once, and the columns of a tile of W's gradient.
LANES, TILE = 16, 4


class Sizes(ctypes.Structure):
    """What the C code calls `Sizes`."""

    _fields_ = (
        *(
            (name, ctypes.c_long)
            for name in ("batch", "seq", "heads", "groups", "key_dim", "chunk")
        ),
        ("clip", ctypes.c_float),
    )


class CompiledScan(torch.autograd.Function):
    """The scan on fp32 q, k [batch, seq, qk_heads, K], v [batch, seq, heads, V], f, W, state.

    K is a multiple of `LANES`; all are contiguous.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Return y [batch, seq, heads, V] and the final state [batch, heads, K, V]."""
        q, k, v, f, W, initial, starts, clip, chunk_size = args
        (batch, seq, heads, V), K = v.shape, q.shape[-1]
        sizes = Sizes(batch, seq, heads, q.shape[2], K, chunk_size, -1.0 if clip is None else clip)
        y, final = v.new_empty(v.shape), v.new_empty(batch, heads, K, V)
        entering = v.new_empty(batch, heads, -(-seq // chunk_size), K, V)
        arrays = (q, k, v, f, W, starts, entering, initial, y, final)
        _call("forward", V, sizes, K * V, arrays)
        ctx.save_for_backward(q, k, v, f, W, starts, entering)
        ctx.sizes = sizes
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments."""
        q, k, v, f, W, starts, entering = ctx.saved_tensors
        V, K = v.shape[-1], q.shape[-1]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        dv, df = v.new_empty(v.shape), f.new_empty(f.shape)
        dW, dinitial = W.new_empty(v.shape[0], *W.shape), v.new_empty(dfinal.shape)
        padded = -(-V // TILE) * TILE
        scratch = 2 * ctx.sizes.chunk * K * padded + K * V + padded * padded * LANES
        arrays = (
            q, k, v, f, W, starts, entering, None, None, None, dy.contiguous(), dfinal.contiguous(),
            dq, dk, dv, df, dW, dinitial,
        )  # fmt: skip
        _call("backward", V, ctx.sizes, scratch, arrays)
        return dq, dk, dv, df, dW.sum(0), dinitial, None, None, None


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
    """Run `m2rnn_scan` by the C code; the arguments have been checked."""
    (batch, seq, heads, V), K = v.shape, q.shape[-1]
    state = v.new_zeros(batch, heads, K, V) if initial_state is None else initial_state
    starts = None
    if document_ids is not None:
        starts = document_starts(document_ids).to(torch.uint8)
    missing = -K % LANES
    queries, keys = (functional.pad(t.float(), (0, missing)).contiguous() for t in (q, k))
    y, final = CompiledScan.apply(  # type: ignore[no-untyped-call]
        queries,
        keys,
        *(t.float().contiguous() for t in (v, f, W)),
        functional.pad(state.float(), (0, 0, 0, missing)).contiguous(),
        starts,
        state_gradient_clip,
        min(chunk_size, seq),
    )
    return y.to(v.dtype), final[:, :, :K]


def _call(
    name: str, width: int, sizes: Sizes, scratch_size: int, arrays: tuple[Tensor | None, ...]
) -> None:
    """Call a function of the library for all units of work, sharing them out over threads."""
    built = library(width)
    if isinstance(built, BuildError):
        raise built
    function = getattr(built, name)
    units = sizes.batch * sizes.groups
    threads = min(units, torch.get_num_threads())
    # A multiple of what a vector holds, so that each thread's part is aligned like the whole.
    scratch = torch.empty(threads, -(-scratch_size // LANES) * LANES, device="cpu")
    pointers = [None if t is None else t.data_ptr() for t in arrays]
    handed = ctypes.byref(sizes), (ctypes.c_void_p * len(arrays))(*pointers)

    def work(i: int) -> None:
        bounds = (ctypes.c_long(units * n // threads) for n in (i, i + 1))
        function(*bounds, *handed, ctypes.c_void_p(scratch[i].data_ptr()))

    _side_by_side(work, threads)


def _side_by_side(work: Callable[[int], None], count: int) -> None:
    others = [threading.Thread(target=work, args=(i,)) for i in range(1, count)]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()
