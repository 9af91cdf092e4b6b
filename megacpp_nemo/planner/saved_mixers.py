"""What Mamba-2, Mamba-3, M2RNN and Gated DeltaNet layers keep for backward, on one tensor rank."""

from __future__ import annotations

from megacpp_nemo.planner.saved import (
    SINGLE,
    Room,
    Saved,
    convolution,
    gated_norm,
    norm,
    normed,
    scan,
)

# Tokens of a chunk of the delta rule's kernel, in flash-linear-attention.
DELTA_CHUNK = 64
# Tokens between two kept states: of `model.m2rnn`, and of mamba-ssm's SISO kernel.
RECURRENT_CHUNK, SISO_CHUNK = 32, 64
KERNEL_TAPS = (2, 3, 4)


def mamba(room: Room) -> Saved:
    """Return what a Mamba-2 layer keeps, by the path that it takes.

    The fused kernel keeps its input, the scan's output, and a factor per group; convolution and
    scan are made again. The split path keeps what each kernel reads.
    """
    shape = room.recipe.model.mamba
    heads, groups = shape.num_heads // room.tensor, max(1, shape.num_groups // room.tensor)
    inner, shared = heads * shape.head_dim, groups * shape.state_dim
    projected, channels = 2 * inner + 2 * shared + heads, inner + 2 * shared
    kept, path = normed(room), mamba_path(room)
    if path == "fused":
        kept["projection"] = room.tokens * projected * room.width
        kept["scan's output"] = room.tokens * inner * room.width
        kept["gated norm"] = room.tokens * groups * SINGLE
        kept["output projection's input"] = room.tokens * inner * room.width
        return kept
    if path == "split":
        # The kernel's input is a copy, and of its output each part is copied again.
        kept["convolution"] = room.tokens * channels * room.width
        kept["scan"] = room.tokens * ((channels + inner + heads) * room.width + heads * SINGLE)
        return {**kept, **gated_norm(room, inner, groups)}
    kept.update(convolution(room, channels, shape.conv_width, projected))
    return {**kept, **_mamba_chunks(room, heads, groups), **gated_norm(room, inner, groups)}


def _mamba_chunks(room: Room, heads: int, groups: int) -> Saved:
    """Return what `model.ssd.ssd_chunked` keeps."""
    shape = room.recipe.model.mamba
    inner = heads * shape.head_dim
    # Kept once as the view that the scan reads; in bf16 as two fp32 copies.
    values = inner + 2 * groups * shape.state_dim if room.width == SINGLE else 2 * inner
    return {
        "scan's input": room.tokens * values * SINGLE,
        "steps": room.tokens * heads * 4 * SINGLE,
        **scan(
            room,
            steps=room.seq,
            chunk=shape.chunk_size,
            heads=heads,
            groups=groups,
            width=shape.head_dim,
            state=shape.state_dim,
        ),
    }


def mamba_path(room: Room) -> str:
    """Return `fused`, `split` or `portable`: how Mamba-2 layers run."""
    demanded = room.recipe.features.mamba_path
    if not room.fused or demanded == "portable":
        return "portable"
    taps = room.recipe.model.mamba.conv_width in KERNEL_TAPS
    return "split" if demanded == "split" or not taps else "fused"


def author_mamba(room: Room) -> Saved:
    """Return what a Mamba-3 layer keeps, on mamba-ssm's kernels or by chunks in torch."""
    shape = room.recipe.model.author_mamba
    heads = shape.num_heads // room.tensor
    inner, rank, state = heads * shape.head_dim, shape.mimo_rank, shape.state_dim
    angles = shape.num_angles
    shared = 2 * rank * state // room.tensor
    projected = 2 * inner + shared + 3 * heads + angles // room.tensor
    kept = normed(room)
    fused = room.fused and room.recipe.features.mamba_path != "portable"
    kept["output projection's input"] = room.tokens * inner * room.width
    if fused:
        per_head = room.tokens * heads
        kept["projection"] = room.tokens * projected * room.width
        kept["gate and values"] = 2 * room.tokens * inner * room.width
        kept["keys and queries"] = 2 * room.tokens * rank * state * room.width
        kept["key norms"] = 2 * room.tokens * rank * SINGLE
        kept["steps"] = per_head * (7 * SINGLE + room.width)
        kept["angles"] = 2 * per_head * angles * SINGLE
        if rank == 1:
            kept["scan"] = per_head * (2 * state + shape.head_dim) * room.width
            kept["scan"] += per_head * 4 * SINGLE
            kept["chunk states"] = -(-per_head // SISO_CHUNK) * shape.head_dim * state * SINGLE
        return kept
    return {**kept, **_author_chunks(room, heads, projected)}


def _author_chunks(room: Room, heads: int, projected: int) -> Saved:
    """Return what `model.mamba3_chunked` keeps, in fp32 whatever the precision."""
    shape = room.recipe.model.author_mamba
    rank, state, angles = shape.mimo_rank, shape.state_dim, shape.num_angles
    per_head = room.tokens * heads
    values, keys = per_head * rank * shape.head_dim, per_head * rank * state
    single = room.width == SINGLE
    # Inputs and gate are views of the projection, which is whole in memory once; or fp32 copies.
    views = room.tokens * projected if single else (2 if rank > 1 else 1) * values // rank
    norms = 2 * norm(room, size=state, tokens=room.tokens * rank)
    return {
        "projection": views * SINGLE + room.tokens * angles * SINGLE,
        "key norms": norms if rank > 1 or not single else norms // 2,
        "steps": per_head * 15 * SINGLE,
        "angles": 3 * per_head * angles * SINGLE,
        "turned keys and queries": 4 * keys * SINGLE,
        "read-out": (values * (6 if rank > 1 else 3) + per_head * 2 * rank * rank) * SINGLE,
        **scan(
            room,
            steps=room.seq * rank,
            chunk=shape.chunk_size * rank,
            heads=heads,
            groups=heads,
            width=shape.head_dim,
            state=state,
        ),
    }


def recurrent(room: Room) -> Saved:
    """Return what an M2RNN layer keeps: states between chunks only, the others made again.

    Its convolution and norm run in torch on a GPU, too.
    """
    shape = room.recipe.model.recurrent
    heads = shape.num_heads // room.tensor
    values = heads * shape.value_dim
    # A query or key head that all ranks share is split for the projection and then gathered.
    own = shape.num_qk_heads * shape.key_dim // room.tensor
    seen = max(own, shape.key_dim)
    channels = 2 * own + values
    chunks = -(-room.seq // RECURRENT_CHUNK)
    return {
        **normed(room),
        **convolution(room, channels, shape.conv_width, channels + values + heads),
        "skip": room.tokens * channels * room.width,
        "gates": 4 * room.tokens * heads * SINGLE,
        "scan's input": room.tokens * (2 * seen + values) * SINGLE,
        "chunk states": room.rows * chunks * values * shape.key_dim * SINGLE,
        **gated_norm(room, values, 1),
    }


def gated_delta_net(room: Room) -> Saved:
    """Return what a Gated DeltaNet layer of Megatron keeps on flash-linear-attention's kernels.

    Queries and keys are normalized apart, and then repeated for every value head.
    """
    shape = room.recipe.model.gated_delta_net
    heads = shape.num_value_heads // room.tensor
    values = heads * shape.value_head_dim
    keys = shape.num_key_heads // room.tensor * shape.key_head_dim
    repeated = heads * shape.key_head_dim if heads * shape.key_head_dim > keys else 0
    per_head = room.tokens * heads
    return {
        **normed(room),
        "convolution": room.tokens * (2 * keys + values) * room.width,
        "normed keys and queries": 2 * room.tokens * keys * room.width,
        "scan's input": room.tokens * (2 * repeated + values) * room.width,
        # Of the decay its logarithm, its softplus, that times A, and the kernel's running sum.
        "steps": per_head * (4 * SINGLE + room.width),
        "chunk systems": per_head * DELTA_CHUNK * room.width,
        # The norm keeps its input; the gate, its activation and the normed values in fp32.
        "gated norm": room.tokens * values * (room.width + 3 * SINGLE) + per_head * SINGLE,
        "output projection's input": room.tokens * values * room.width,
    }
