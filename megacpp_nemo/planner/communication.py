"""What a rank sends in an optimizer step, by group of ranks.

`volumes` counts the collectives of the model's own parallelism. Bytes are what one rank sends when
a collective of payload P over n ranks goes round a ring: 2 (n - 1) / n P for an all-reduce,
(n - 1) / n P for an all-gather, a reduce-scatter and an all-to-all, and P for a send. Experts are
taken to receive equal shares of the tokens. Scalars (norms of gradients, losses, numbers of tokens)
and what is logged are left out; context parallelism is derived from Transformer Engine's ring and
Megatron's Mamba mixer, and not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.buffers import buffers_of
from megacpp_nemo.planner.collectives import (
    CONTEXT,
    DATA,
    EMBEDDING,
    EXPERT,
    EXPERT_DATA,
    EXPERT_TENSOR,
    GATHER,
    PIPELINE,
    REDUCE,
    SCATTER,
    SEND,
    TENSOR,
    TENSOR_CONTEXT,
    TENSOR_EXPERT,
    Exchange,
    Volume,
)
from megacpp_nemo.planner.copies import of_copies
from megacpp_nemo.planner.dispatch import DISPATCHERS
from megacpp_nemo.planner.exchanges import of_layer, outside_layers
from megacpp_nemo.planner.memory import GRADIENT_BYTES
from megacpp_nemo.planner.pieces import Piece
from megacpp_nemo.planner.pipeline import micro_batches
from megacpp_nemo.planner.saved import Room, element_bytes, recompute_of
from megacpp_nemo.planner.sharding import stage_pieces


def volumes(
    recipe: HybridRecipe,
    stage: int = 0,
    *,
    recompute: str | None = None,
    kernels: str = "fused",
    dispatcher: str = "alltoall",
) -> tuple[Volume, ...]:
    """Return what a rank of a pipeline stage sends in an optimizer step.

    Args:
        recipe: What is trained, and how it is laid out.
        stage: 0-based pipeline stage.
        recompute: As in `activations.saved_bytes`; under `full` layers run forward twice.
        kernels: As there; without Transformer Engine latent attention's down-projections are
            split, and gathered.
        dispatcher: `alltoall`, as the recipes set it, or `allgather`.

    Raises:
        RecipeError: If there is no such stage or dispatcher, or no rule for a part.
    """
    known = {name: name for name in DISPATCHERS}
    lookup(known, dispatcher, what="Unknown dispatcher", field="dispatcher")
    held = stage_pieces(recipe, stage)
    room = Room.of(recipe, kernels)
    found = [
        *_of_micro_batches(room, held, recompute_of(recipe, recompute), dispatcher),
        *_of_pipeline(room, stage),
        *_of_data(recipe, stage, held),
        *of_copies(recipe, held),
    ]
    return tuple(volume for volume in found if volume.ranks > 1)


def group_ranks(recipe: HybridRecipe, group: str) -> int:
    """Return the number of ranks of a group, by its name in a `Volume`."""
    layout = recipe.parallelism
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    expert, expert_tensor = layout.expert_model_parallel_size, layout.expert_tensor_size
    stages = layout.pipeline_model_parallel_size
    return {
        TENSOR: tensor,
        EXPERT: expert,
        EXPERT_TENSOR: expert_tensor,
        TENSOR_EXPERT: expert * expert_tensor,
        TENSOR_CONTEXT: tensor * context,
        CONTEXT: context,
        PIPELINE: stages,
        DATA: layout.world_size // (tensor * stages),
        EXPERT_DATA: layout.world_size // (expert * expert_tensor * stages),
        EMBEDDING: min(stages, 2),
    }[group]


def _of_micro_batches(
    room: Room, held: Sequence[Piece], recompute: str, dispatcher: str
) -> Iterator[Volume]:
    """Yield what the layers send, added up over a step's micro-batches, by kind of layer."""
    number = micro_batches(room.recipe)
    alike: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in held:
        alike.setdefault((piece.role, piece.family), []).append(piece)
    sums: dict[tuple[str, str, str], list[int]] = {}
    for pieces in alike.values():
        first = pieces[0]
        for exchange in _exchanges(room, first, dispatcher):
            again = recompute == "full" and first.family is not None and not exchange.backward
            times = number * len(pieces) * exchange.count * (2 if again else 1)
            way = "backward" if exchange.backward else "forward"
            key = exchange.group, exchange.operation, f"{first.group}, {way}"
            total = sums.setdefault(key, [0, 0])
            total[0] += times
            total[1] += times * exchange.payload
    for (group, operation, what), (count, payload) in sums.items():
        ranks = group_ranks(room.recipe, group)
        yield Volume(group, operation, what, count, payload, ranks)


def _exchanges(room: Room, piece: Piece, dispatcher: str) -> Iterator[Exchange]:
    if piece.family is None:
        return outside_layers(room, piece.role)
    return of_layer(room, piece.family, dispatcher)


def _of_pipeline(room: Room, stage: int) -> Iterator[Volume]:
    """Yield hidden states sent on, and their gradients sent back, one for every chunk."""
    layout = room.recipe.parallelism
    stages = layout.pipeline_model_parallel_size
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return
    number = micro_batches(room.recipe)
    # The last chunk of the last stage sends nothing on, the first of the first nothing back.
    ways = {
        "hidden states, forward": chunks - (stage == stages - 1),
        "gradients, backward": chunks - (stage == 0),
    }
    for what, times in ways.items():
        if times:
            count = times * number
            yield Volume(PIPELINE, SEND, what, count, count * room.stream, stages)


def _of_data(recipe: HybridRecipe, stage: int, held: Sequence[Piece]) -> Iterator[Volume]:
    """Yield the reduction of gradients, and the gathering of parameters that are split."""
    layout = recipe.parallelism
    buffers, width = buffers_of(recipe, stage, held), element_bytes(recipe)
    # Megatron has an optimizer for each kind of buffer, and each gathers all of a rank's
    # parameters, unless they are gathered as the forward pass needs them.
    optimizers = len({buffer.expert for buffer in buffers})
    times = 1 if layout.overlap_param_gather else optimizers
    for expert, group in ((False, DATA), (True, EXPERT_DATA)):
        own = [buffer for buffer in buffers if buffer.expert is expert]
        elements, count = sum(b.padded for b in own), sum(len(b.buckets) for b in own)
        if not own:
            continue
        ranks, gradients = own[0].ranks, elements * GRADIENT_BYTES
        if not layout.use_distributed_optimizer:
            yield Volume(group, REDUCE, "gradients", count, gradients, ranks)
            continue
        yield Volume(group, SCATTER, "gradients", count, gradients, ranks)
        parameters = times * elements * width
        yield Volume(group, GATHER, "parameters", times * count, parameters, ranks)
