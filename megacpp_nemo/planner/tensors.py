"""The parameters of each piece of a model: name, shape, and what splits it over ranks."""

from __future__ import annotations

from collections.abc import Callable

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.layer_tensors import (
    COLUMNS,
    ROWS,
    PieceTensor,
    Tensors,
    layer_tensors,
    no_rule,
)
from megacpp_nemo.planner.pieces import Piece, Role


def piece_tensors(recipe: HybridRecipe, piece: Piece) -> Tensors:
    """Yield the parameters of a piece in Megatron's order.

    Raises:
        RecipeError: If no rule says what parameters the piece has.
    """
    if piece.family is not None:
        return layer_tensors(recipe, piece.family)
    if piece.role not in _OUTSIDE:
        raise no_rule(piece.name, piece.role.value)
    return _OUTSIDE[piece.role](recipe)


def padded_vocabulary(recipe: HybridRecipe) -> int:
    """Return the rows of the token embedding as it is built."""
    embedding = recipe.model.embedding
    step = embedding.make_vocab_size_divisible_by * recipe.parallelism.tensor_model_parallel_size
    return -(-embedding.vocab_size // step) * step


def _embedding(recipe: HybridRecipe) -> Tensors:
    """Yield the input side: structure channels, n-gram memory and tokens.

    Prediction depths keep a copy of it all on the last of several stages. The n-gram tables are
    one stack, split by its width: every rank holds a part of every row, whatever the primes are,
    and the columns of out_proj that read it. The structure channels are small, and whole on every
    rank.
    """
    hidden, embedding = recipe.model.hidden_size, recipe.model.embedding
    if recipe.features.structure:
        sizes = embedding.structure.table_sizes(recipe.features.structure)
        width = embedding.structure.bottleneck
        yield PieceTensor("structure.scale", (len(sizes),))
        yield PieceTensor("structure.table.weight", (sum(sizes), width))
        yield PieceTensor("structure.up_proj.weight", (hidden, width))
    if recipe.features.ngram_hash:
        sizes, dim = embedding.ngram.table_sizes, embedding.ngram.dim
        host = embedding.ngram.placement == "host"
        yield PieceTensor("ngram_hash.table.weight", (sum(sizes), dim), COLUMNS, host=host)
        yield PieceTensor("ngram_hash.out_proj.weight", (hidden, len(sizes) * dim), COLUMNS)
    yield PieceTensor("word_embeddings.weight", (padded_vocabulary(recipe), hidden), ROWS)


def _norm(recipe: HybridRecipe) -> Tensors:
    yield PieceTensor("weight", (recipe.model.hidden_size,))


def _head(recipe: HybridRecipe) -> Tensors:
    yield PieceTensor("weight", (padded_vocabulary(recipe), recipe.model.hidden_size), ROWS)


def _depth_entry(recipe: HybridRecipe) -> Tensors:
    hidden = recipe.model.hidden_size
    yield PieceTensor("enorm.weight", (hidden,))
    yield PieceTensor("hnorm.weight", (hidden,))
    yield PieceTensor("eh_proj.weight", (hidden, 2 * hidden), ROWS)


_OUTSIDE: dict[Role, Callable[[HybridRecipe], Tensors]] = {
    Role.EMBEDDING: _embedding,
    Role.EMBEDDING_COPY: _embedding,
    Role.FINAL_NORM: _norm,
    Role.HEAD: _head,
    Role.DEPTH_ENTRY: _depth_entry,
    Role.DEPTH_NORM: _norm,
}
