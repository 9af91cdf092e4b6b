"""M2RNN's scan as Triton kernels: one program per sequence and head, its state on chip.

Tokens follow each other, so a program's time is that of its chain of products with W. What a
token needs is therefore read one token ahead. Rows of the state beyond K and columns beyond V
are padding: they begin as zero and stay zero. `m2rnn_triton` allocates and launches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Return tanh to fp32's relative precision, near zero too."""
    square = x * x
    # Chebyshev fit of tanh(x) / x to 4e-9 on |x| < 0.625, where 1 - exp(-2x) would cancel.
    near = -0.00566478 * square + 0.02059568
    near = near * square - 0.05372268
    near = near * square + 0.13331150
    near = near * square - 0.33333262
    near = x + x * square * near
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.390625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def update_of(H, W, key, value):
    """Return Z = tanh(H W + key value^T) in fp32."""
    return tanh(tl.dot(H, W, input_precision="ieee") + key[:, None] * value[None, :])


@triton.jit
def driving(k, v, f, starts, t, last, k_seq, v_seq, f_seq, rows, columns, K, V, PACKED):
    """Read what drives token t: its key, value, gate, and whether its document begins."""
    t = tl.cast(tl.minimum(t, last), tl.int64)
    key = tl.load(k + t * k_seq + rows, mask=rows < K, other=0.0).to(tl.float32)
    value = tl.load(v + t * v_seq + columns, mask=columns < V, other=0.0).to(tl.float32)
    gate = tl.load(f + t * f_seq).to(tl.float32)
    begins = tl.load(starts + t) != 0 if PACKED else t < 0
    return key, value, gate, begins


@triton.jit
def kept(q, dy, seen, updates, start, j, q_seq, heads, rows, columns, cells, K, V):
    """Read what the way back needs of a chunk's token j: q, dy, H_{t-1} and Z_t."""
    t = tl.cast(start + j, tl.int64)
    query = tl.load(q + t * q_seq + rows, mask=rows < K, other=0.0).to(tl.float32)
    slope = tl.load(dy + t * heads * V + columns, mask=columns < V, other=0.0).to(tl.float32)
    inside = (rows[:, None] < K) & (columns[None, :] < V)
    before = tl.load(seen + j * (K * V) + cells, mask=inside, other=0.0)
    Z = tl.load(updates + j * (K * V) + cells, mask=inside, other=0.0)
    return query, slope, before, Z


@triton.jit
def forward(
    q, k, v, f, W, initial, starts, y, final, entering,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, f_batch, f_seq, f_head,
    seq, heads, sharing,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, CONTINUED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write y, the final state, and the state that enters each chunk."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // heads, program % heads
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    cells = rows[:, None] * V + columns[None, :]
    inside = (rows[:, None] < K) & (columns[None, :] < V)
    q += b * q_batch + h // sharing * q_head
    k += b * k_batch + h // sharing * k_head
    v += b * v_batch + h * v_head
    f += b * f_batch + h * f_head
    starts += b * seq
    y += (b * seq * heads + h) * V
    entering += program * ((seq + CHUNK - 1) // CHUNK) * (K * V)

    turn = tl.arange(0, COLUMNS)
    square = (turn[:, None] < V) & (columns[None, :] < V)
    w = tl.load(W + h * V * V + turn[:, None] * V + columns[None, :], mask=square, other=0.0)
    w = w.to(tl.float32)
    H = tl.zeros((ROWS, COLUMNS), tl.float32)
    if CONTINUED:
        H = tl.load(initial + program * K * V + cells, mask=inside, other=0.0).to(tl.float32)
    last = seq - 1
    key, value, gate, begins = driving(
        k, v, f, starts, 0, last, k_seq, v_seq, f_seq, rows, columns, K, V, PACKED
    )
    query = tl.load(q + rows, mask=rows < K, other=0.0).to(tl.float32)
    for t in range(seq):
        if t % CHUNK == 0:
            tl.store(entering + tl.cast(t // CHUNK, tl.int64) * (K * V) + cells, H, mask=inside)
        ahead = tl.cast(tl.minimum(t + 1, last), tl.int64)
        next_key, next_value, next_gate, next_begins = driving(
            k, v, f, starts, t + 1, last, k_seq, v_seq, f_seq, rows, columns, K, V, PACKED
        )
        next_query = tl.load(q + ahead * q_seq + rows, mask=rows < K, other=0.0).to(tl.float32)
        if PACKED:
            H = tl.where(begins, 0.0, H)
        Z = update_of(H, w, key, value)
        H = gate * H + (1.0 - gate) * Z
        read = tl.sum(query[:, None] * H, axis=0)
        place = y + tl.cast(t, tl.int64) * heads * V + columns
        tl.store(place, read.to(y.dtype.element_ty), mask=columns < V)
        key, value, gate, begins = next_key, next_value, next_gate, next_begins
        query = next_query
    tl.store(final + program * K * V + cells, H, mask=inside)


@triton.jit
def backward(
    q, k, v, f, W, starts, entering, dy, dfinal, dq, dk, dv, df, dW, dinitial, seen, updates,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, f_batch, f_seq, f_head,
    seq, heads, sharing, clip,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, CLIPPED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write every gradient, chunk by chunk from the last; W's is per program.

    `seen` and `updates` hold H_{t-1} and Z_t of one chunk per program, filled before read.
    """
    program = tl.program_id(0).to(tl.int64)
    b, h = program // heads, program % heads
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    cells = rows[:, None] * V + columns[None, :]
    inside = (rows[:, None] < K) & (columns[None, :] < V)
    q += b * q_batch + h // sharing * q_head
    k += b * k_batch + h // sharing * k_head
    v += b * v_batch + h * v_head
    f += b * f_batch + h * f_head
    starts += b * seq
    first = b * seq * heads + h
    dy, dv = dy + first * V, dv + first * V
    dq, dk = dq + first * K, dk + first * K
    df += first
    chunks = (seq + CHUNK - 1) // CHUNK
    entering += program * chunks * (K * V)
    seen += program * CHUNK * (K * V)
    updates += program * CHUNK * (K * V)

    turn = tl.arange(0, COLUMNS)
    across = turn[:, None] * V + columns[None, :]
    square = (turn[:, None] < V) & (columns[None, :] < V)
    w = tl.load(W + h * V * V + across, mask=square, other=0.0).to(tl.float32)
    turned = columns[None, :] * V + turn[:, None]
    w_turned = tl.load(W + h * V * V + turned, mask=square, other=0.0).to(tl.float32)
    G = tl.load(dfinal + program * K * V + cells, mask=inside, other=0.0).to(tl.float32)
    slope_of_W = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    last = seq - 1
    for step in range(chunks):
        start = (chunks - 1 - step) * CHUNK
        n = tl.minimum(seq - start, CHUNK)
        place = entering + tl.cast(chunks - 1 - step, tl.int64) * (K * V)
        H = tl.load(place + cells, mask=inside, other=0.0)
        key, value, gate, begins = driving(
            k, v, f, starts, start, last, k_seq, v_seq, f_seq, rows, columns, K, V, PACKED
        )
        for i in range(n):
            next_key, next_value, next_gate, next_begins = driving(
                k, v, f, starts, start + i + 1, last,
                k_seq, v_seq, f_seq, rows, columns, K, V, PACKED,
            )  # fmt: skip
            if PACKED:
                H = tl.where(begins, 0.0, H)
            Z = update_of(H, w, key, value)
            tl.store(seen + i * (K * V) + cells, H, mask=inside)
            tl.store(updates + i * (K * V) + cells, Z, mask=inside)
            H = gate * H + (1.0 - gate) * Z
            key, value, gate, begins = next_key, next_value, next_gate, next_begins
        # Other threads of the program may have stored what one now reads.
        tl.debug_barrier()
        j = n - 1
        query, slope, before, Z = kept(
            q, dy, seen, updates, start, j, q_seq, heads, rows, columns, cells, K, V
        )
        key, value, gate, begins = driving(
            k, v, f, starts, start + j, last, k_seq, v_seq, f_seq, rows, columns, K, V, PACKED
        )
        for i in range(n):
            j = n - 1 - i
            earlier = tl.maximum(j - 1, 0)
            next_query, next_slope, next_before, next_Z = kept(
                q, dy, seen, updates, start, earlier, q_seq, heads, rows, columns, cells, K, V
            )
            next_key, next_value, next_gate, next_begins = driving(
                k, v, f, starts, start + earlier, last,
                k_seq, v_seq, f_seq, rows, columns, K, V, PACKED,
            )  # fmt: skip
            here = tl.cast(start + j, tl.int64) * heads
            G += query[:, None] * slope[None, :]
            if CLIPPED:
                # Keeping what is not a number, as torch's clamp does.
                G = tl.clamp(G, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
            P = (1.0 - gate) * (1.0 - Z * Z) * G
            after = gate * before + (1.0 - gate) * Z
            by_query = tl.sum(after * slope[None, :], axis=1)
            by_key = tl.sum(P * value[None, :], axis=1)
            by_value = tl.sum(P * key[:, None], axis=0)
            by_gate = tl.sum(tl.sum(G * (before - Z), axis=1), axis=0)
            tl.store(dq + here * K + rows, by_query.to(dq.dtype.element_ty), mask=rows < K)
            tl.store(dk + here * K + rows, by_key.to(dk.dtype.element_ty), mask=rows < K)
            tl.store(dv + here * V + columns, by_value.to(dv.dtype.element_ty), mask=columns < V)
            tl.store(df + here, by_gate.to(df.dtype.element_ty))
            slope_of_W += tl.dot(tl.trans(before), P, input_precision="ieee")
            G = gate * G + tl.dot(P, w_turned, input_precision="ieee")
            if PACKED:
                G = tl.where(begins, 0.0, G)
            key, value, gate, begins = next_key, next_value, next_gate, next_begins
            query, slope, before, Z = next_query, next_slope, next_before, next_Z
        tl.debug_barrier()
    tl.store(dW + program * V * V + across, slope_of_W, mask=square)
    tl.store(dinitial + program * K * V + cells, G, mask=inside)
