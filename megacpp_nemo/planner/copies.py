"""Parameters that several ranks have copies of: the sums of their gradients.

- the embedding, which prediction depths keep a copy of on the last of several stages
- what is whole on every tensor rank: norms, routers, structure channels, indexers
- n-gram tables in host memory, which are whole on every data-parallel rank
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.buffers import data_ranks, is_channels
from megacpp_nemo.planner.collectives import DATA, EMBEDDING, GATHER, REDUCE, TENSOR, Volume
from megacpp_nemo.planner.memory import GRADIENT_BYTES
from megacpp_nemo.planner.pieces import Piece, Role
from megacpp_nemo.planner.pipeline import micro_batches
from megacpp_nemo.planner.saved import INDEX, host_rows
from megacpp_nemo.planner.sharding import piece_on_rank

# Of these every tensor rank sees a part of the tokens: norms of the stream, and the router.
OF_TOKENS = ("layernorm.weight", "enorm.weight", "hnorm.weight", "router.weight")


def of_copies(recipe: HybridRecipe, held: Sequence[Piece]) -> Iterator[Volume]:
    """Yield the reduction of gradients of parameters that several ranks have copies of."""
    layout, roles = recipe.parallelism, {piece.role: piece for piece in held}
    stages = layout.pipeline_model_parallel_size
    if recipe.model.mtp.num_layers and stages > 1:
        for role in (Role.EMBEDDING, Role.EMBEDDING_COPY):
            if role in roles:
                yield from _of_embedding(recipe, roles[role])
    yield from _of_host_tables(recipe, roles)
    ranks = layout.tensor_model_parallel_size
    summed, averaged = _copied_elements(recipe, held) if ranks > 1 else (0, 0)
    for what, elements in ((_whole(recipe), summed), ("indexers", averaged)):
        if elements and (layout.sequence_parallel or what == "indexers"):
            payload = elements * GRADIENT_BYTES
            yield Volume(TENSOR, REDUCE, f"gradients of {what}", 1, payload, ranks)


def _of_embedding(recipe: HybridRecipe, embedding: Piece) -> Iterator[Volume]:
    """Yield the sum of both stages' gradients of the embedding; the structure channels' as one.

    The distributed optimizer has reduced a part of these on each data-parallel rank, and which
    part it was differs between the stages: they are reduced whole.
    """
    own = list(piece_on_rank(recipe, embedding))
    channels = [parameter.count for parameter in own if is_channels(parameter.name)]
    count = len(own) - len(channels) + bool(channels)
    payload = sum(parameter.count for parameter in own) * GRADIENT_BYTES
    yield Volume(EMBEDDING, REDUCE, "gradients of the copies", count, payload, 2)
    if channels and recipe.parallelism.use_distributed_optimizer:
        ranks, payload = data_ranks(recipe, expert=False), sum(channels) * GRADIENT_BYTES
        what = "gradients of structure channels"
        yield Volume(DATA, REDUCE, what, len(channels), payload, ranks)


def _of_host_tables(recipe: HybridRecipe, roles: Mapping[Role, Piece]) -> Iterator[Volume]:
    """Yield how data-parallel ranks tell each other the rows of n-gram tables in host memory.

    How many each has; then their numbers and their gradients, at most.
    """
    rows = micro_batches(recipe) * host_rows(recipe)
    if Role.EMBEDDING in roles and rows:
        ranks = data_ranks(recipe, expert=False)
        part = recipe.model.embedding.ngram.dim // recipe.parallelism.tensor_model_parallel_size
        yield Volume(DATA, REDUCE, "numbers of n-gram rows", 1, ranks * INDEX, ranks)
        payload = ranks * rows * (INDEX + part * GRADIENT_BYTES)
        yield Volume(DATA, GATHER, "gradients of n-gram rows, at most", 2, payload, ranks)


def _copied_elements(recipe: HybridRecipe, held: Sequence[Piece]) -> tuple[int, int]:
    """Return the elements of what is whole on a rank, and those of indexers."""
    counted: dict[tuple[Any, ...], tuple[int, int]] = {}
    summed = averaged = 0
    for piece in held:
        kind = (piece.role, piece.family)
        if kind not in counted:
            own = list(piece_on_rank(recipe, piece))
            indexers = sum(p.count for p in own if ".indexer." in p.name)
            whole = sum(p.count for p in own if _sees_tokens(p.name, piece))
            counted[kind] = whole, indexers
        summed += counted[kind][0]
        averaged += counted[kind][1]
    return summed, averaged


def _sees_tokens(name: str, piece: Piece) -> bool:
    own = name[len(piece.prefix) :]
    if piece.role in (Role.EMBEDDING, Role.EMBEDDING_COPY):
        return is_channels(name)
    return name.endswith(OF_TOKENS) or (
        own in ("norm.weight", "weight") and (piece.role is not Role.HEAD)
    )


def _whole(recipe: HybridRecipe) -> str:
    """Return in words what is whole on every tensor rank, which sees a part of the tokens."""
    channels = ", structure channels" if recipe.features.structure else ""
    return f"norms{channels} and routers"
