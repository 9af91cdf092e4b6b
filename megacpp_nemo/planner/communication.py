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
from dataclasses import asdict, dataclass
from typing import Any

from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.buffers import buffers_of
from megacpp_nemo.planner.collectives import (
    CONTEXT,
    EXPERT,
    EXPERT_TENSOR,
    GATHER,
    REDUCE,
    SCATTER,
    SEND,
    TENSOR,
    TENSOR_CONTEXT,
    TENSOR_EXPERT,
    Exchange,
)
from megacpp_nemo.planner.dispatch import DISPATCHERS
from megacpp_nemo.planner.exchanges import of_layer, outside_layers
from megacpp_nemo.planner.memory import GRADIENT_BYTES
from megacpp_nemo.planner.pieces import Piece, Role
from megacpp_nemo.planner.pipeline import micro_batches
from megacpp_nemo.planner.saved import Room, element_bytes, recompute_of
from megacpp_nemo.planner.sharding import piece_on_rank, stage_pieces

PIPELINE, DATA, EXPERT_DATA, EMBEDDING = "pipeline", "data", "expert data", "embedding"
# Whole on every tensor rank, which sees a part of the tokens: norms of the stream and the router.
OF_TOKENS = ("layernorm.weight", "enorm.weight", "hnorm.weight", "router.weight")


@dataclass(frozen=True, slots=True)
class Volume:
    """Collectives of one kind that a rank takes part in during an optimizer step.

    Args:
        group: `tensor`, `expert`, `expert tensor`, `tensor and expert`, `tensor and context`,
            `context`, `pipeline`, `data`, `expert data` or `embedding`.
        operation: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `send`.
        what: What for, in words.
        count: How many of them.
        payload_bytes: Bytes of their tensors together.
        ranks: Size of the group.
    """

    group: str
    operation: str
    what: str
    count: int
    payload_bytes: int
    ranks: int

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that a rank sends, by the ring formula of the module."""
        return ring_bytes(self.operation, self.payload_bytes, self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {**asdict(self), "bytes_per_rank": self.bytes_per_rank}


def ring_bytes(operation: str, payload: int, ranks: int) -> int:
    """Return the bytes that a rank sends for a collective of `payload` bytes over `ranks`."""
    if operation == SEND:
        return payload
    share = payload * (ranks - 1) // ranks
    return 2 * share if operation == REDUCE else share


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
        *_of_copies(recipe, stage, held),
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


def _of_copies(recipe: HybridRecipe, stage: int, held: Sequence[Piece]) -> Iterator[Volume]:
    """Yield the reduction of gradients of parameters that several ranks have copies of."""
    layout, roles = recipe.parallelism, {piece.role: piece for piece in held}
    stages = layout.pipeline_model_parallel_size
    if recipe.model.mtp.num_layers and stages > 1:
        for role in (Role.EMBEDDING, Role.EMBEDDING_COPY):
            if role in roles:
                words = next(iter(piece_on_rank(recipe, roles[role])))
                payload = words.count * GRADIENT_BYTES
                yield Volume(EMBEDDING, REDUCE, "gradients of the copies", 1, payload, 2)
    ranks = layout.tensor_model_parallel_size
    summed, averaged = _copied_elements(recipe, held) if ranks > 1 else (0, 0)
    for what, elements in (("norms and routers", summed), ("indexers", averaged)):
        if elements and (layout.sequence_parallel or what == "indexers"):
            payload = elements * GRADIENT_BYTES
            yield Volume(TENSOR, REDUCE, f"gradients of {what}", 1, payload, ranks)


def _copied_elements(recipe: HybridRecipe, held: Sequence[Piece]) -> tuple[int, int]:
    """Return the elements of norms and routers, and those of indexers, on one rank."""
    counted: dict[tuple[Any, ...], tuple[int, int]] = {}
    summed = averaged = 0
    for piece in held:
        kind = (piece.role, piece.family)
        if kind not in counted:
            own = list(piece_on_rank(recipe, piece))
            indexers = sum(p.count for p in own if ".indexer." in p.name)
            norms = sum(p.count for p in own if _sees_tokens(p.name, piece))
            counted[kind] = norms, indexers
        summed += counted[kind][0]
        averaged += counted[kind][1]
    return summed, averaged


def _sees_tokens(name: str, piece: Piece) -> bool:
    own = name[len(piece.prefix) :]
    return name.endswith(OF_TOKENS) or (
        own in ("norm.weight", "weight") and (piece.role is not Role.HEAD)
    )
