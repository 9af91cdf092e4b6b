"""Bytes that a model keeps from forward to backward, per piece and micro-batch on one rank.

- `saved_bytes`: what one piece keeps
- `held_micro_batches`: how many micro-batches a pipeline stage keeps at once, by chunk
- `stage_activations`: what a stage keeps at its fullest

Storages that autograd keeps are counted once each, weights left out. With `kernels="portable"`
blocks run in plain torch, as on a CPU, which tests count. With `"fused"` they run as on a GPU with
Transformer Engine, mamba-ssm and causal-conv1d: derived from what those kernels save by their
interfaces, and not measured. Experts are taken to receive equal shares of the tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.pieces import Piece, Role
from megacpp_nemo.planner.pipeline import micro_batches
from megacpp_nemo.planner.saved import (
    INDEX,
    RECOMPUTED,
    SINGLE,
    Room,
    Saved,
    input_side,
    norm,
    recompute_of,
)
from megacpp_nemo.planner.saved_attention import grouped, latent, sparse
from megacpp_nemo.planner.saved_experts import dense, experts
from megacpp_nemo.planner.saved_mixers import (
    author_mamba,
    gated_delta_net,
    mamba,
    recurrent,
)
from megacpp_nemo.planner.sharding import stage_pieces
from megacpp_nemo.planner.tensors import padded_vocabulary

# What a piece keeps of the loss over the vocabulary, by its names in `saved_bytes`.
LOGITS = ("logits", "targets")
STREAM = "layer's input"
_Kind = tuple[Role, BlockFamily | None]


def saved_bytes(
    recipe: HybridRecipe, piece: Piece, *, recompute: str | None = None, kernels: str = "fused"
) -> Mapping[str, int]:
    """Return the bytes that a piece keeps of one micro-batch on one rank, by what they hold.

    Args:
        recipe: The recipe.
        piece: One of its pieces.
        recompute: `none`; `selective`, attention cores are run again in backward (Megatron's
            `core_attn`, which a recipe refuses together with DSA: its layers are counted as
            they are); `full`, layers are and keep their input only. The recipe's if not given.
        kernels: `portable` or `fused`.

    Raises:
        RecipeError: If there is no such policy or no such kernels, or the block is unknown.
    """
    return _saved(Room.of(recipe, kernels), piece, recompute_of(recipe, recompute))


def _saved(room: Room, piece: Piece, recompute: str) -> Saved:
    if piece.family is None:
        return _ENDS[piece.role](room)
    if recompute == "full":
        return {STREAM: room.stream}
    kept = _layer(room, piece.family)
    if recompute == "selective" and piece.family is BlockFamily.ATTENTION:
        return {name: size for name, size in kept.items() if name not in RECOMPUTED}
    return kept


def _layer(room: Room, family: BlockFamily) -> Saved:
    features = room.recipe.features
    kinds: dict[BlockFamily, Callable[[Room], Saved]] = {
        BlockFamily.ATTENTION: latent if features.latent_attention else grouped,
        BlockFamily.SPARSE_ATTENTION: sparse,
        BlockFamily.EXPERTS: experts if features.experts else dense,
        BlockFamily.MAMBA: author_mamba if features.mamba == "author" else mamba,
        BlockFamily.RECURRENT: recurrent,
    }
    if room.fused:
        kinds[BlockFamily.GATED_DELTA_NET] = gated_delta_net
    if family not in kinds:
        raise RecipeError(
            "What this block keeps in plain torch is not known: nothing here builds it",
            given=f"{family.letter} ({family.name.lower()})",
            allowed=", ".join(known.letter for known in kinds),
            hint="a pattern of these letters",
        )
    return kinds[family](room)


def _head(room: Room) -> Saved:
    columns = padded_vocabulary(room.recipe) // room.tensor
    return {
        "normed input": room.stream,
        "logits": room.tokens * columns * SINGLE,
        "targets": room.tokens * (INDEX + 1),
    }


def _main_head(room: Room) -> Saved:
    kept = _head(room)
    if room.recipe.model.mtp.num_layers and not room.fused and room.width != SINGLE:
        # The depths join it with theirs, and their first norm keeps an fp32 copy of it.
        kept["normed input"] *= 2
    return kept


def _entry(room: Room) -> Saved:
    return {**input_side(room), "norms": 2 * norm(room), "joined input": 2 * room.stream}


_ENDS: dict[Role, Callable[[Room], Saved]] = {
    Role.EMBEDDING: input_side,
    # Each depth's entry counts what it looks up in it.
    Role.EMBEDDING_COPY: lambda room: {},
    Role.FINAL_NORM: lambda room: {"norm": norm(room)},
    Role.HEAD: _main_head,
    Role.DEPTH_ENTRY: _entry,
    # A depth runs the output head, too.
    Role.DEPTH_NORM: lambda room: {"norm": norm(room), **_head(room)},
}


def held_micro_batches(
    recipe: HybridRecipe, stage: int, loads: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the micro-batches that a stage holds at once at its fullest, by chunk.

    Under 1F1B these are `min(stages - stage, micro-batches)`. Interleaved, Megatron's schedule
    runs `2 (stages - stage - 1) + (chunks - 1) stages` forward passes before it takes forward and
    backward passes in turn, and goes round the chunks for every `stages` micro-batches.

    Args:
        recipe: The recipe.
        stage: 0-based pipeline stage.
        loads: What a micro-batch leaves in each chunk; alike by default.
    """
    held = list(held_over_time(recipe, stage))
    loads = loads or [1] * len(held[0])
    return max(held, key=lambda now: sum(map(operator.mul, now, loads)))


def held_over_time(recipe: HybridRecipe, stage: int) -> Iterator[tuple[int, ...]]:
    """Yield the micro-batches that a stage holds after each forward pass, by chunk.

    Only as far as the schedule does not repeat itself: of 1F1B, only the most.
    """
    stages = recipe.parallelism.pipeline_model_parallel_size
    chunks = recipe.parallelism.virtual_pipeline_model_parallel_size or 1
    number = micro_batches(recipe)
    if chunks == 1:
        yield (min(stages - stage, number),)
        return
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages
    # From then on the schedule repeats itself with every round.
    passes = min(warm_up + 2 * stages * chunks, number * chunks)
    held = [0] * chunks
    for place in range(passes):
        held[place // stages % chunks] += 1
        yield tuple(held)
        if place >= warm_up:
            held[chunks - 1 - (place - warm_up) // stages % chunks] -= 1


class StageActivations(NamedTuple):
    """What a stage keeps at its fullest, in bytes.

    Args:
        layers: Everything but the loss, of all micro-batches that are held at once.
        logits: The losses' part: fp32 exponentials of every head and depth, of one micro-batch,
            and the logits whose gradient is made.
        working: What the recomputation of the largest layer adds while its backward pass runs.
    """

    layers: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def stage_activations(
    recipe: HybridRecipe,
    stage: int,
    *,
    recompute: str | None = None,
    kernels: str = "fused",
    held: Sequence[Piece] | None = None,
) -> StageActivations:
    """Return what a stage keeps at its fullest.

    Args:
        recipe: The recipe.
        stage: 0-based pipeline stage.
        recompute: As in `saved_bytes`.
        kernels: As in `saved_bytes`.
        held: The pieces of the stage, if they are at hand.

    Raises:
        RecipeError: As `saved_bytes` does.
    """
    room, seen = Room.of(recipe, kernels), dict[_Kind, tuple[int, int]]()
    again = recompute_of(recipe, recompute)
    chunks = [0] * (recipe.parallelism.virtual_pipeline_model_parallel_size or 1)
    logits = working = 0
    for piece in stage_pieces(recipe, stage) if held is None else held:
        kind = piece.role, piece.family
        if kind not in seen:
            kept = _saved(room, piece, again)
            loss = sum(kept.get(name, 0) for name in LOGITS)
            seen[kind] = sum(kept.values()) - loss, loss
            if again == "full" and piece.family is not None:
                working = max(working, sum(_layer(room, piece.family).values()))
        layer, loss = seen[kind]
        chunks[piece.chunk] += layer
        # The last stage runs the backward pass of a micro-batch as soon as its loss is known.
        logits += loss
    if logits:
        # The logits of one head in the model's precision, or the gradient by them.
        logits += room.tokens * padded_vocabulary(recipe) // room.tensor * room.width
    layers = sum(map(operator.mul, held_micro_batches(recipe, stage, chunks), chunks))
    return StageActivations(layers, logits, working)
