"""Operations of the recurrent mixers, per token: Mamba-2, Mamba-3, M2RNN and Gated DeltaNet.

Chunked scans are counted by their own algorithm at the recipe's chunk size: products between the
tokens of a chunk, and what each token gives to and takes from the state that travels on. Of the
pairs of a chunk, those that the causal mask leaves are the model's; `full` counts them all, with
the zeros that fill the last chunk, as dense products execute them.
"""

from __future__ import annotations

from megacpp_nemo.contract.recipe import HybridRecipe

# Megatron's kernels and its reference choose it, and no recipe.
GATED_DELTA_CHUNK = 64


def chunk_keys(length: int, chunk: int, full: bool) -> float:
    """Return the tokens of its own chunk that a token sees, in the mean over a row.

    Args:
        length: Tokens of the row.
        chunk: Tokens of a chunk; the last one may be shorter.
        full: Count every pair of a chunk, filled up to its size.
    """
    chunk = min(chunk, length)
    if full:
        return chunk * padding(length, chunk)
    whole, rest = divmod(length, chunk)
    return (whole * chunk * (chunk + 1) + rest * (rest + 1)) / 2 / length


def padding(length: int, chunk: int) -> float:
    """Return the tokens of whole chunks per token of the row."""
    chunk = min(chunk, length)
    return -(-length // chunk) * chunk / length


def mamba(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    """Return the terms of an M layer on the recipe's lane."""
    return (
        _author_mamba(recipe, full) if recipe.features.mamba == "author" else _mamba(recipe, full)
    )


def _mamba(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    """Mamba-2, arXiv 2405.21060: scores by group, states by head."""
    hidden, length, shape = recipe.model.hidden_size, recipe.model.seq_length, recipe.model.mamba
    inner, state = shape.num_heads * shape.head_dim, shape.num_groups * shape.state_dim
    seen = chunk_keys(length, shape.chunk_size, full)
    tokens = padding(length, shape.chunk_size) if full else 1.0
    return {
        "input projection": 2 * hidden * (2 * inner + 2 * state + shape.num_heads),
        "convolution": 2 * shape.conv_width * (inner + 2 * state),
        "scan within chunks": 2 * (state + inner) * seen,
        "scan between chunks": 4 * inner * shape.state_dim * tokens,
        "output projection": 2 * hidden * inner,
    }


def _author_mamba(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    """Mamba-3, arXiv 2603.15569: each of a token's ranks sees every rank of the tokens it sees.

    B and C have biases of their own in every head, and so have the scores. Of the scan's outputs
    a token takes back the share of its own input that belongs to the next token.
    """
    hidden, length = recipe.model.hidden_size, recipe.model.seq_length
    shape, heads = recipe.model.author_mamba, recipe.model.author_mamba.num_heads
    rank, state = shape.mimo_rank, shape.state_dim
    inner = heads * shape.head_dim
    rows = 2 * inner + 2 * rank * state + 3 * heads + shape.num_angles
    seen = chunk_keys(length, shape.chunk_size, full)
    tokens = padding(length, shape.chunk_size) if full else 1.0
    pair = 2 * rank * rank * (heads * state + inner)
    return {
        "input projection": 2 * hidden * rows,
        "scan within chunks": pair * seen,
        "scan between chunks": 4 * rank * inner * state * tokens,
        "share of the next token": pair,
        "output projection": 2 * hidden * inner,
    }


def recurrent(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    """M2RNN, arXiv 2603.14360: H W, k v^T and q^T H for every token and head."""
    hidden, shape = recipe.model.hidden_size, recipe.model.recurrent
    keys, values = shape.num_qk_heads * shape.key_dim, shape.num_heads * shape.value_dim
    state = shape.num_heads * shape.key_dim * shape.value_dim
    return {
        "input projection": 2 * hidden * (2 * keys + 2 * values + shape.num_heads),
        "convolution": 2 * shape.conv_width * (2 * keys + values),
        "state transition": 2 * state * shape.value_dim,
        "state in and out": 4 * state,
        "output projection": 2 * hidden * values,
    }


def gated_delta_net(recipe: HybridRecipe, full: bool) -> dict[str, float]:
    """Gated DeltaNet, arXiv 2412.06464, by chunks as in arXiv 2406.06484.

    Within a chunk: K K^T, the inverse of the triangular system it makes, that times keys and
    values, Q K^T, and that times the corrected values. Between chunks: the state is read by keys
    and by queries, and written by keys.
    """
    hidden, length = recipe.model.hidden_size, recipe.model.seq_length
    shape = recipe.model.gated_delta_net
    heads, key, value = shape.num_value_heads, shape.key_head_dim, shape.value_head_dim
    keys, values = shape.num_key_heads * key, heads * value
    chunk = GATED_DELTA_CHUNK
    # Chunks are filled up, however short the row is.
    tokens = -(-length // chunk) * chunk / length if full else 1.0
    seen = chunk * tokens if full else chunk_keys(length, chunk, full)
    # Row i of the inverse is a product with the i rows before it, a triangle of i (i - 1) / 2.
    rows = chunk if full else min(chunk, length)
    inverse = (rows - 1) * (2 * rows - 1 if full else rows - 2) / 3 * tokens
    return {
        "input projection": 2 * hidden * (2 * keys + 2 * values + 2 * heads),
        "convolution": 2 * shape.conv_width * (2 * keys + values),
        "delta rule within chunks": 2 * heads * (3 * key + 2 * value) * seen,
        "delta rule's inverse": heads * inverse,
        "delta rule between chunks": 6 * heads * key * value * tokens,
        "output projection": 2 * hidden * values,
    }
