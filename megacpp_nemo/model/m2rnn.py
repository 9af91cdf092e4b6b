"""M2RNN (arXiv 2603.14360): a recurrence with a matrix-valued, non-linear state.

    Z_t = tanh(H_{t-1} W + k_t v_t^T)
    H_t = f_t H_{t-1} + (1 - f_t) Z_t
    y_t = q_t^T H_t

`m2rnn_sequential` is these equations, one token at a time under autograd. `m2rnn_scan` is the
same map with its own backward pass, which keeps the state at chunk boundaries only. Three pieces
of code do so: `m2rnn_kernel` in torch, `m2rnn_compiled` in C, `m2rnn_triton` in Triton;
`m2rnn_paths` chooses.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.model.arguments import (
    bind_shapes,
    check_chunk_size,
    check_same_device,
    check_shared,
    compute_dtype,
)
from megacpp_nemo.model.m2rnn_kernel import Scan, find_restarts
from megacpp_nemo.model.m2rnn_paths import choose_path


def forget_gate(x_f: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return f = exp(-exp(A_log) * softplus(x_f + dt_bias)) in fp32 (or fp64), between 0 and 1.

    Args:
        x_f: Gate logits [..., heads].
        A_log: Log decay rates [heads].
        dt_bias: Step biases [heads].
    """
    dtype = compute_dtype(x_f, A_log, dt_bias)
    step = functional.softplus(x_f.to(dtype) + dt_bias.to(dtype))
    return torch.exp(-torch.exp(A_log.to(dtype)) * step)


def m2rnn_sequential(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    state_gradient_clip: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token: the reference for `m2rnn_scan`.

    Args:
        q: Queries [batch, seq, qk_heads, K]; heads must be a multiple of qk_heads, and head h
            reads q/k head h // (heads // qk_heads).
        k: Keys, shaped like q.
        v: Values [batch, seq, heads, V].
        f: Forget gate [batch, seq, heads], between 0 and 1.
        W: State transitions [heads, V, V].
        document_ids: Integers [batch, seq]; where the value changes the state restarts from
            zero, and no gradient crosses.
        initial_state: State before the first token [batch, heads, K, V]; default zero.
        state_gradient_clip: The total gradient of the loss by each H_t is clipped elementwise
            to this absolute value before it flows further back (paper: 1.0); None for no clip.
            The gradient of `initial_state` itself is not clipped, so that a sequence cut in
            two, with the state handed over, has the gradients of the whole.

    Returns:
        y [batch, seq, heads, V] in `v.dtype`, and the state after the last token
        [batch, heads, K, V] in fp32. fp64 inputs are computed in fp64.

    Raises:
        RuntimeRefusal: The shapes do not fit each other.
    """
    sizes = _check(q, k, v, f, W, document_ids, initial_state)
    dtype = compute_dtype(q, k, v, f, W)
    with torch.autocast(v.device.type, enabled=False):
        queries, keys = (_per_head(t.to(dtype), sizes).unbind(1) for t in (q, k))
        values, gates, transition = v.to(dtype).unbind(1), f.to(dtype).unbind(1), W.to(dtype)
        state = _initial(initial_state, v.to(dtype), sizes)
        outputs = []
        for t in range(sizes["seq"]):
            if document_ids is not None and t > 0:
                starts = document_ids[:, t] != document_ids[:, t - 1]
                state = state.masked_fill(starts[:, None, None, None], 0.0)
            drive = keys[t][..., None] * values[t][..., None, :]
            update = torch.tanh(state @ transition + drive)
            gate = gates[t][..., None, None]
            state = gate * state + (1 - gate) * update
            if state_gradient_clip is not None and state.requires_grad:
                clip = partial(torch.clamp, min=-state_gradient_clip, max=state_gradient_clip)
                state.register_hook(clip)  # type: ignore[no-untyped-call]
            outputs.append((queries[t][..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1).to(v.dtype), state


def m2rnn_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    *,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    state_gradient_clip: float | None = 1.0,
    chunk_size: int = 32,
    path: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `m2rnn_sequential` fast, with a backward pass of its own.

    Arguments, results and errors are those of `m2rnn_sequential`, but the gradients cannot be
    differentiated again. `chunk_size` is the number of tokens between two stored states:
    backward recomputes one chunk at a time, so that seq / chunk_size states are held from
    forward to backward, and up to 4 * chunk_size more during either pass. The default is the
    fastest measured on CPU, where the states of a chunk should fit the cache.

    `path` is `auto`, the fastest of these that can run, or one demanded: `triton` (on a GPU, or
    in Triton's interpreter), `compiled` (C, on a CPU) or `torch`; fp64 runs in torch only. A
    demanded path that cannot run is a RuntimeRefusal.
    """
    sizes = _check(q, k, v, f, W, document_ids, initial_state, chunk_size)
    dtype = compute_dtype(q, k, v, f, W)
    chosen = choose_path(path, v, dtype, sizes)
    arguments = (q, k, v, f, W, document_ids, initial_state, state_gradient_clip, chunk_size)
    if chosen == "triton":
        from megacpp_nemo.model import m2rnn_triton

        return m2rnn_triton.scan(*arguments)
    if chosen == "compiled":
        from megacpp_nemo.model import m2rnn_compiled

        return m2rnn_compiled.scan(*arguments)
    return _torch_scan(*arguments, sizes, dtype)


def _torch_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    state_gradient_clip: float | None,
    chunk_size: int,
    sizes: dict[str, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # Time first, so that one token is one block of memory; heads before batch, so that one
    # product with W serves all rows of a head.
    queries, keys = (_per_head(t.to(dtype), sizes).permute(1, 2, 0, 3) for t in (q, k))
    values, gates = v.to(dtype).permute(1, 2, 0, 3), f.to(dtype).permute(1, 2, 0)
    state = _initial(initial_state, values, sizes).transpose(0, 1)
    y, final_state = Scan.apply(  # type: ignore[no-untyped-call]
        *(t.contiguous() for t in (queries, keys, values, gates, W.to(dtype), state)),
        find_restarts(document_ids, sizes["seq"]),
        state_gradient_clip,
        min(chunk_size, sizes["seq"]),
    )
    return y.permute(2, 0, 1, 3).to(v.dtype).contiguous(), final_state.transpose(0, 1)


def _per_head(t: Tensor, sizes: dict[str, int]) -> Tensor:
    """Repeat q or k [batch, seq, qk_heads, K] for the heads that share it."""
    return t.repeat_interleave(sizes["heads"] // sizes["qk_heads"], dim=2)


def _initial(state: Tensor | None, v: Tensor, sizes: dict[str, int]) -> Tensor:
    shape = [sizes[name] for name in ("batch", "heads", "K", "V")]
    return v.new_zeros(shape) if state is None else state.to(v.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    W: Tensor,
    document_ids: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int = 1,
) -> dict[str, int]:
    sizes = bind_shapes(
        v=(v, "batch seq heads V"),
        q=(q, "batch seq qk_heads K"),
        k=(k, "batch seq qk_heads K"),
        f=(f, "batch seq heads"),
        W=(W, "heads V V"),
        document_ids=(document_ids, "batch seq"),
        initial_state=(initial_state, "batch heads K V"),
    )
    check_shared(sizes, "heads", "qk_heads")
    check_same_device(
        v=v, q=q, k=k, f=f, W=W, document_ids=document_ids, initial_state=initial_state
    )
    check_chunk_size(chunk_size)
    return sizes
