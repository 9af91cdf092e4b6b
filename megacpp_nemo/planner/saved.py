"""What blocks keep for their backward pass: sizes on one rank, and the parts that blocks share.

`activations` is the public form.
"""

from __future__ import annotations

from dataclasses import dataclass

from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.contract.parallelism import RECOMPUTE
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.structure import structure_channels
from megacpp_nemo.contract.training import Precision

KERNELS = ("portable", "fused")
# The names that attention cores give to what selective recomputation makes anew.
RECOMPUTED = ("scores", "mask", "log sums")
SINGLE, INDEX = 4, 8

Saved = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Room:
    """Sizes of one micro-batch on one rank.

    Args:
        recipe: The recipe.
        fused: Whether blocks run on kernels; otherwise in plain torch.
        width: Bytes of one activation.
        rows: Rows of a micro-batch.
        seq: Tokens of a row on this rank.
        tokens: Tokens of a micro-batch that mixers and heads see.
        residual: Tokens of the residual stream; fewer under sequence parallelism.
        tensor: Ranks that share each matrix.
    """

    recipe: HybridRecipe
    fused: bool
    width: int
    rows: int
    seq: int
    tokens: int
    residual: int
    tensor: int

    @classmethod
    def of(cls, recipe: HybridRecipe, kernels: str) -> Room:
        """Return the sizes of a recipe's micro-batch.

        Raises:
            RecipeError: If there are no kernels of that name.
        """
        lookup({k: k for k in KERNELS}, kernels, what="Unknown kernels", field="kernels")
        parallelism, rows = recipe.parallelism, recipe.batch.micro_batch_size
        tensor = parallelism.tensor_model_parallel_size
        seq = recipe.model.seq_length // parallelism.context_parallel_size
        return cls(
            recipe=recipe,
            fused=kernels == "fused",
            width=element_bytes(recipe),
            rows=rows,
            seq=seq,
            tokens=rows * seq,
            residual=rows * seq // (tensor if parallelism.sequence_parallel else 1),
            tensor=tensor,
        )

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.residual * self.recipe.model.hidden_size * self.width


def recompute_of(recipe: HybridRecipe, given: str | None) -> str:
    """Return what runs again in the backward pass: what is given, or else the recipe's.

    Raises:
        RecipeError: If there is no such recomputation.
    """
    known = {name: name for name in RECOMPUTE}
    own = recipe.parallelism.recompute if given is None else given
    return lookup(known, own, what="Unknown recomputation", field="recompute")


def element_bytes(recipe: HybridRecipe) -> int:
    """Return the bytes of one weight or activation."""
    return 4 if recipe.precision is Precision.FP32 else 2


def input_side(room: Room) -> Saved:
    """Return what one reading of the input side keeps: rows of tables, and what they hold."""
    kept = {"tokens": room.tokens * INDEX}
    embedding, features = room.recipe.model.embedding, room.recipe.features
    if features.ngram_hash:
        tables = len(embedding.ngram.table_sizes)
        held = embedding.ngram.dim // room.tensor * room.width
        # Of each table the row, whether there is an n-gram, and the rank's part of what is read.
        kept["n-grams"] = room.tokens * tables * (INDEX + 1 + held)
        kept["n-grams' rows"] = host_rows(room.recipe) * held
    if features.structure:
        channels = len(structure_channels(features.structure))
        bottleneck = embedding.structure.bottleneck * room.width
        # Each channel's, and their sum.
        held = room.residual * (channels + 1) * bottleneck
        kept["structure"] = room.tokens * channels * INDEX + held
    return kept


def host_rows(recipe: HybridRecipe) -> int:
    """Return the rows of n-gram tables in host memory that a micro-batch moves, at most."""
    ngram = recipe.model.embedding.ngram
    if not recipe.features.ngram_hash or ngram.placement != "host":
        return 0
    tokens = recipe.batch.micro_batch_size * recipe.model.seq_length
    return min(tokens * len(ngram.table_sizes), sum(ngram.table_sizes))


def norm(room: Room, *, size: int | None = None, tokens: int | None = None) -> int:
    """Return what an RMSNorm keeps, its output apart: its input, and a factor per row.

    Plain torch computes in fp32 and keeps the normalized input, too.
    """
    size = size or room.recipe.model.hidden_size
    tokens = tokens or room.residual
    entries = tokens * size
    return tokens * SINGLE + (entries * room.width if room.fused else 2 * entries * SINGLE)


def normed(room: Room) -> Saved:
    """Return what the norm in front of a block and the block's first projection keep."""
    return {"norm": norm(room), "normed input": room.stream}


def gated_norm(room: Room, size: int, groups: int) -> Saved:
    """Return what the mixers' own norm and the projection behind it keep; it runs in torch.

    Args:
        room: Sizes.
        size: Width on this rank.
        groups: Groups that are normalized apart.
    """
    entries = room.tokens * size
    # The gate itself is a view of the projection where both are fp32.
    whole = 4 if room.width == SINGLE else 5
    return {
        "gated norm": whole * entries * SINGLE + room.tokens * groups * SINGLE,
        "output projection's input": entries * room.width,
    }


def convolution(room: Room, channels: int, taps: int, projected: int) -> Saved:
    """Return what the causal convolution in torch and its activation keep.

    Args:
        room: Sizes.
        channels: Channels on this rank.
        taps: Taps of a filter.
        projected: Width of the projection that the channels are a view of.
    """
    entries = room.tokens * channels
    kept = room.tokens * projected if room.width == SINGLE else entries
    padded = room.rows * (room.seq + taps - 1) * channels
    return {
        "convolution": (kept + padded) * SINGLE,
        "activation's input": entries * room.width,
    }


def scan(
    room: Room, *, steps: int, chunk: int, heads: int, groups: int, width: int, state: int
) -> Saved:
    """Return what state space duality by chunks keeps in torch, everything in fp32.

    Args:
        room: Sizes.
        steps: Steps of a row.
        chunk: Steps of a chunk.
        heads: Heads on this rank.
        groups: Groups of B and C.
        width: Width of a head.
        state: State size.
    """
    chunk = min(chunk, steps)
    chunks = -(-steps // chunk)
    rows = room.rows * chunks * chunk
    inner, shared, states = rows * heads * width, rows * groups * state, chunks * room.rows
    # With several heads to a group their scores are copied for the product with the values.
    scores = 3 if heads > groups else 2
    # Of a single group a chunk's keys and queries lie as the products want them.
    copies = 4 if groups > 1 else 2
    return {
        "chunk scores": scores * rows * chunk * heads * SINGLE,
        "chunk values": 4 * inner * SINGLE,
        "chunk keys and queries": copies * shared * SINGLE,
        "chunk decays": (2 * rows + states) * heads * SINGLE,
        "chunk states": 2 * states * heads * width * state * SINGLE,
    }
