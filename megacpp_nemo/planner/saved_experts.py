"""What expert layers and dense MLPs keep for their backward pass, on one tensor rank."""

from __future__ import annotations

from megacpp_nemo.planner.saved import INDEX, SINGLE, Room, Saved, normed


def dense(room: Room) -> Saved:
    """Return what a dense MLP layer keeps."""
    width = room.recipe.model.ffn_hidden_size // room.tensor
    return {**normed(room), "inner": room.tokens * _inner(room, width, scaled=False)}


def experts(room: Room) -> Saved:
    """Return what a mixture of experts keeps, its tokens spread evenly over the experts.

    Each rank sends out `topk` copies of its tokens and receives as many; ranks that share an
    expert's matrices gather them. Dispatch by all-gather keeps the same, up to the router's part.
    """
    shape = room.recipe.model.experts
    ranks = room.recipe.parallelism.expert_tensor_size
    copies = room.residual * shape.topk
    received = copies * ranks
    inner = received * _inner(room, shape.ffn_hidden_size // ranks, scaled=True)
    kept = {
        **normed(room),
        "router": _router(room),
        "dispatched tokens": received * room.recipe.model.hidden_size * room.width,
        "dispatch": copies * INDEX + received * SINGLE,
        "experts": inner,
    }
    if shape.shared_expert_size:
        width = shape.shared_expert_size // room.tensor
        kept["shared expert"] = room.tokens * _inner(room, width, scaled=False)
    return kept


def _inner(room: Room, width: int, *, scaled: bool) -> int:
    """Return the bytes a token leaves between an MLP's two projections.

    Args:
        room: Sizes.
        width: Inner width on this rank.
        scaled: Whether the token's probability scales it.
    """
    gated = room.recipe.model.experts.activation == "swiglu"
    return ((5 if gated else 2) + scaled) * width * room.width


def _router(room: Room) -> int:
    """Return what scores, choice and load-balancing loss keep, in fp32."""
    shape = room.recipe.model.experts
    # Scores for the choice, for the loss, and transposed; and a transposed mask of one byte.
    scores = shape.num_experts * (3 * SINGLE + 1)
    return room.residual * (scores + shape.topk * (2 * INDEX + SINGLE) + 2 * SINGLE)
