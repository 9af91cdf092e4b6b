"""What attention layers keep for their backward pass, on one tensor rank.

- `latent`: multi-latent attention (MLA)
- `sparse`: DeepSeek sparse attention (DSA) over it
- `grouped`: grouped-query attention
"""

from __future__ import annotations

from megacpp_nemo.planner.saved import INDEX, SINGLE, Room, Saved, normed

# As `model.gathered_attention` chooses on a CPU.
GATHERS_FROM_TIMES_TOPK = 16


def latent(room: Room) -> Saved:
    """Return what an MLA layer keeps."""
    shape = room.recipe.model.latent
    heads = room.recipe.model.attention.num_heads // room.tensor
    keys = shape.qk_head_dim + shape.qk_pos_emb_head_dim
    return {
        **normed(room),
        **_latents(room),
        **_core(room, heads, 2 * keys + shape.v_head_dim),
        "context": room.tokens * heads * shape.v_head_dim * room.width,
    }


def _latents(room: Room) -> Saved:
    """Return the latents, and the rotation's cosines and sines for queries and keys."""
    shape = room.recipe.model.latent
    rotated = shape.qk_pos_emb_head_dim
    both = shape.q_lora_rank + shape.kv_lora_rank + rotated
    # Split projections' columns are gathered, and a rank's tokens are a view of all of them.
    kept = {
        "latents": (room.residual if room.fused else room.tokens) * both * room.width,
        "rotation": 4 * room.seq * rotated * room.width,
    }
    if shape.layernorm:
        ranks = shape.q_lora_rank + shape.kv_lora_rank
        # The norms' inputs are the latents; what follows them is kept beside.
        extra = room.residual * (ranks * room.width + 2 * SINGLE)
        kept["latent norms"] = extra + (0 if room.fused else room.residual * ranks * SINGLE)
        if not room.fused and room.width != SINGLE:
            kept["latent norms"] += room.residual * ranks * (SINGLE - room.width)
    return kept


def _core(room: Room, heads: int, widths: int, extra: int = 0) -> Saved:
    """Return what a dense causal core keeps besides its output.

    Args:
        room: Sizes.
        heads: Heads on this rank.
        widths: Widths of a head's query, key and value together.
        extra: Bytes that the fused core keeps otherwise.
    """
    inputs = room.tokens * heads * widths * room.width
    if room.fused:
        return {
            "queries, keys and values": extra or inputs,
            "log sums": room.tokens * heads * SINGLE,
        }
    scores = room.tokens * heads * room.seq
    # The softmax runs in fp32, and the product with the values in the model's precision.
    copies = SINGLE if room.width == SINGLE else SINGLE + room.width
    return {
        "queries, keys and values": inputs,
        "scores": scores * copies,
        "mask": room.seq * room.seq,
    }


def grouped(room: Room) -> Saved:
    """Return what a grouped-query attention layer keeps.

    In torch keys and values are repeated for every head; the fused core takes them as views of
    the projection, and the queries as a copy.
    """
    shape = room.recipe.model.attention
    heads, groups = shape.num_heads // room.tensor, shape.num_query_groups // room.tensor
    width = shape.head_dim
    projected = room.tokens * (heads + 2 * groups) * width * room.width
    copied = room.tokens * heads * width * room.width if groups > 1 else 0
    return {
        **normed(room),
        **_core(room, heads, 3 * width, projected + copied),
        "context": room.tokens * heads * width * room.width,
    }


def sparse(room: Room) -> Saved:
    """Return what a DSA layer keeps: the same on a GPU, whose kernels it does not have, yet."""
    model = room.recipe.model
    shape, attention = model.latent, model.sparse_attention
    heads = model.attention.num_heads // room.tensor
    keys = shape.qk_head_dim + shape.qk_pos_emb_head_dim
    chosen = min(attention.indexer_topk, room.seq)
    gathers = not room.fused and room.seq >= GATHERS_FROM_TIMES_TOPK * chosen
    kept = {
        **normed(room),
        **_latents(room),
        **_indexer(room),
        **(_gathered(room, heads, chosen) if gathers else _masked(room, heads, keys)),
        "context": room.tokens * heads * shape.v_head_dim * room.width,
    }
    if room.residual != room.tokens:
        kept["gathered indexer's input"] = (
            room.tokens * (model.hidden_size + shape.q_lora_rank) * room.width
        )
    return kept


def _indexer(room: Room) -> Saved:
    """Return what the indexer keeps: mostly the gradients that its loss made in forward."""
    shape, rotated = room.recipe.model.sparse_attention, room.recipe.model.latent
    width, heads = shape.indexer_head_dim, shape.indexer_num_heads
    norm = room.tokens * (width + 2) * room.width
    rotation = 4 * room.seq * rotated.qk_pos_emb_head_dim * room.width
    gradients = room.tokens * ((heads + 1) * width * room.width + heads * SINGLE)
    return {"indexer": norm + rotation + gradients + 2 * width * width * room.width + room.tokens}


def _masked(room: Room, heads: int, keys: int) -> Saved:
    entries = room.tokens * heads * keys
    return {
        # Values are as wide as keys, for the kernel's sake, and so is its output.
        "queries, keys and values": 4 * entries * room.width,
        "log sums": room.tokens * heads * SINGLE,
        "mask": room.tokens * room.seq * room.width,
    }


def _gathered(room: Room, heads: int, chosen: int) -> Saved:
    """Return what the core over gathered latents keeps, its blocks being made again."""
    shape = room.recipe.model.latent
    rank, width = shape.kv_lora_rank, shape.kv_lora_rank + shape.qk_pos_emb_head_dim
    content = shape.qk_head_dim
    queries = room.tokens * heads * (width + content + rank) * room.width
    return {
        "queries, keys and values": queries + room.tokens * width * room.width,
        "chosen keys": room.tokens * chosen * (INDEX + 1),
    }
