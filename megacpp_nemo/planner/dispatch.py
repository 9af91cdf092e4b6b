"""What reaches the experts of a layer, and comes back, for one micro-batch."""

from __future__ import annotations

from megacpp_nemo.planner.collectives import (
    EXCHANGE,
    EXPERT,
    EXPERT_TENSOR,
    GATHER,
    REDUCE,
    SCATTER,
    TENSOR_CONTEXT,
    TENSOR_EXPERT,
    Exchange,
    Exchanges,
)
from megacpp_nemo.planner.saved import INDEX, SINGLE, Room

DISPATCHERS = ("alltoall", "allgather")


def dispatch(room: Room, dispatcher: str) -> Exchanges:
    """Yield what an expert layer sends, its tensor-parallel projections apart.

    Args:
        room: Sizes.
        dispatcher: `alltoall` or `allgather`.
    """
    yield from _counts(room)
    yield from (_traded if dispatcher == "alltoall" else _gathered)(room)


def _counts(room: Room) -> Exchanges:
    """Yield the numbers of tokens by expert, for the load-balancing loss."""
    parallelism, shape = room.recipe.parallelism, room.recipe.model.experts
    ranks = room.tensor * parallelism.context_parallel_size
    if shape.aux_loss_coeff and ranks > 1:
        yield Exchange(TENSOR_CONTEXT, REDUCE, False, shape.num_experts * INDEX)


def _traded(room: Room) -> Exchanges:
    """Yield dispatch by all-to-all, of tokens spread evenly over the experts.

    Where ranks share an expert's matrices they gather their tokens, and what they make of them
    is scattered in the precision of the router's probabilities, fp32.
    """
    parallelism, model = room.recipe.parallelism, room.recipe.model
    ranks, tensor = parallelism.expert_model_parallel_size, parallelism.expert_tensor_size
    copies = room.residual * model.experts.topk
    tokens, chances = copies * model.hidden_size * room.width, copies * SINGLE
    if ranks * tensor > 1:
        known = ranks * tensor * model.experts.num_experts * INDEX
        yield Exchange(TENSOR_EXPERT, GATHER, False, known)
    if ranks > 1:
        for backward in (False, True):
            yield Exchange(EXPERT, EXCHANGE, backward, tokens, 2)
            yield Exchange(EXPERT, EXCHANGE, backward, chances)
    if tensor > 1:
        wide = tensor * copies * model.hidden_size * SINGLE
        for payload in (tensor * tokens, tensor * chances):
            yield Exchange(EXPERT_TENSOR, GATHER, False, payload)
            yield Exchange(EXPERT_TENSOR, SCATTER, True, payload)
        yield Exchange(EXPERT_TENSOR, SCATTER, False, wide)
        yield Exchange(EXPERT_TENSOR, GATHER, True, wide)


def _gathered(room: Room) -> Exchanges:
    """Yield dispatch by all-gather: every rank of the experts sees every token of the others."""
    parallelism, model = room.recipe.parallelism, room.recipe.model
    ranks = parallelism.expert_model_parallel_size * parallelism.expert_tensor_size
    if ranks == 1:
        return
    tokens, experts = ranks * room.residual, model.experts.num_experts
    yield Exchange(TENSOR_EXPERT, GATHER, False, tokens * experts)
    for payload in (tokens * experts * SINGLE, tokens * model.hidden_size * room.width):
        yield Exchange(TENSOR_EXPERT, GATHER, False, payload)
        yield Exchange(TENSOR_EXPERT, SCATTER, True, payload)
    wide = tokens * model.hidden_size * SINGLE
    yield Exchange(TENSOR_EXPERT, SCATTER, False, wide)
    yield Exchange(TENSOR_EXPERT, GATHER, True, wide)
