"""What one micro-batch makes a layer send; `communication` is the public form."""

from __future__ import annotations

from collections.abc import Callable

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.planner.collectives import (
    CONTEXT,
    EXCHANGE,
    GATHER,
    REDUCE,
    SCATTER,
    SEND,
    TENSOR,
    Exchange,
    Exchanges,
)
from megacpp_nemo.planner.dispatch import dispatch
from megacpp_nemo.planner.pieces import Role
from megacpp_nemo.planner.saved import SINGLE, Room
from megacpp_nemo.planner.saved_mixers import mamba_path


def column(room: Room, width: int) -> Exchanges:
    """Yield what a column-parallel projection of `width` inputs sends.

    Under sequence parallelism its input is gathered, in backward once more for the weight's
    gradient, and the gradient of the input is scattered; without, that is reduced.
    """
    yield from _column(room, room.tokens * width * room.width)


def _column(room: Room, payload: int) -> Exchanges:
    if room.residual == room.tokens:
        yield Exchange(TENSOR, REDUCE, True, payload)
        return
    yield Exchange(TENSOR, GATHER, False, payload)
    yield Exchange(TENSOR, GATHER, True, payload)
    yield Exchange(TENSOR, SCATTER, True, payload)


def row(room: Room) -> Exchanges:
    """Yield what a row-parallel projection to the residual stream sends, or an embedding."""
    payload = room.tokens * room.recipe.model.hidden_size * room.width
    if room.residual == room.tokens:
        yield Exchange(TENSOR, REDUCE, False, payload)
        return
    yield Exchange(TENSOR, SCATTER, False, payload)
    yield Exchange(TENSOR, GATHER, True, payload)


def _shared(room: Room, width: int) -> Exchanges:
    """Yield what a part that is split by its width, and that all ranks' heads read, sends."""
    payload = room.tokens * width * room.width
    yield Exchange(TENSOR, GATHER, False, payload)
    yield Exchange(TENSOR, REDUCE, True, payload)


def _spread(room: Room, width: int) -> Exchanges:
    """Yield what columns of a split projection send until a rank has its tokens' whole rows."""
    payload = room.tokens * width * room.width
    yield Exchange(TENSOR, GATHER, False, payload)
    if room.residual != room.tokens:
        yield Exchange(TENSOR, GATHER, True, payload)


def _latent(room: Room) -> Exchanges:
    model = room.recipe.model
    shape, split = model.latent, room.residual != room.tokens
    # Transformer Engine's down-projections are whole on every rank.
    if not room.fused:
        for width in (shape.q_lora_rank, shape.kv_lora_rank + shape.qk_pos_emb_head_dim):
            yield from column(room, model.hidden_size)
            yield from _spread(room, width)
    yield from column(room, shape.q_lora_rank)
    yield from column(room, shape.kv_lora_rank)
    if split:
        rotary = room.tokens * shape.qk_pos_emb_head_dim * room.width
        yield Exchange(TENSOR, GATHER, False, rotary)
        yield Exchange(TENSOR, SCATTER, True, rotary)
    yield from row(room)


def _sparse(room: Room) -> Exchanges:
    yield from _latent(room)
    model = room.recipe.model
    if room.residual != room.tokens:
        # The indexer reads whole sequences, of inputs that its loss does not reach.
        for width in (model.hidden_size, model.latent.q_lora_rank):
            yield Exchange(TENSOR, GATHER, False, room.tokens * width * room.width)
    # What the heads of all ranks look at, which the indexer learns.
    yield Exchange(TENSOR, REDUCE, False, room.tokens * room.seq * SINGLE)


def _projections(room: Room) -> Exchanges:
    yield from column(room, room.recipe.model.hidden_size)
    yield from row(room)


def _recurrent(room: Room) -> Exchanges:
    shape = room.recipe.model.recurrent
    yield from _projections(room)
    if shape.num_qk_heads < room.tensor:
        for _ in ("queries", "keys"):
            yield from _shared(room, shape.num_qk_heads * shape.key_dim)
    squares = room.tokens * SINGLE
    yield Exchange(TENSOR, REDUCE, False, squares)
    yield Exchange(TENSOR, REDUCE, True, squares)


def _author_mamba(room: Room) -> Exchanges:
    shape = room.recipe.model.author_mamba
    yield from _projections(room)
    for width in (shape.mimo_rank * shape.state_dim, shape.mimo_rank * shape.state_dim):
        yield from _shared(room, width)
    yield from _shared(room, shape.num_angles)


def _tensor_of_layer(room: Room, family: BlockFamily) -> Exchanges:
    features = room.recipe.features
    kinds: dict[BlockFamily, Callable[[Room], Exchanges]] = {
        BlockFamily.ATTENTION: _latent if features.latent_attention else _projections,
        BlockFamily.SPARSE_ATTENTION: _sparse,
        BlockFamily.MAMBA: _author_mamba if features.mamba == "author" else _projections,
        BlockFamily.RECURRENT: _recurrent,
        BlockFamily.GATED_DELTA_NET: _projections,
    }
    if family is not BlockFamily.EXPERTS:
        return kinds[family](room)
    whole = not features.experts or bool(room.recipe.model.experts.shared_expert_size)
    return _projections(room) if whole else iter(())


def of_layer(room: Room, family: BlockFamily, dispatcher: str) -> Exchanges:
    """Yield what a layer sends.

    Args:
        room: Sizes.
        family: Its family.
        dispatcher: How tokens reach their experts, `alltoall` or `allgather`.
    """
    if room.tensor > 1:
        yield from _tensor_of_layer(room, family)
    if family is BlockFamily.EXPERTS and room.recipe.features.experts:
        yield from dispatch(room, dispatcher)
    if room.recipe.parallelism.context_parallel_size > 1:
        yield from _context(room, family)


def _context(room: Room, family: BlockFamily) -> Exchanges:
    """Yield what a layer sends over the ranks that share a sequence, on kernels.

    Attention passes keys and values around a ring, and in backward their gradients with them;
    Mamba-2 trades its part of the sequence for a part of the heads, and back.
    """
    ranks, model = room.recipe.parallelism.context_parallel_size, room.recipe.model
    if family is BlockFamily.ATTENTION:
        if room.recipe.features.latent_attention:
            latent, heads = model.latent, model.attention.num_heads // room.tensor
            keys = latent.qk_head_dim + latent.qk_pos_emb_head_dim
            width = heads * (keys + latent.v_head_dim)
        else:
            groups = model.attention.num_query_groups // room.tensor
            width = 2 * groups * model.attention.head_dim
        payload = room.tokens * width * room.width
        yield Exchange(CONTEXT, SEND, False, payload, ranks - 1)
        yield Exchange(CONTEXT, SEND, True, payload, 2 * ranks - 1)
    elif family is BlockFamily.MAMBA and mamba_path(room) == "fused":
        shape = model.mamba
        inner = shape.num_heads * shape.head_dim // room.tensor
        groups = max(1, shape.num_groups // room.tensor, ranks)
        heads = shape.num_heads // room.tensor
        for backward in (False, True):
            for width in (2 * inner + 2 * groups * shape.state_dim + heads, inner):
                payload = room.tokens * width * room.width
                yield Exchange(CONTEXT, EXCHANGE, backward, payload)


def outside_layers(room: Room, role: Role) -> Exchanges:
    """Yield what a part outside of the layers sends."""
    if room.tensor == 1:
        return
    hidden = room.recipe.model.hidden_size
    if role in (Role.EMBEDDING, Role.DEPTH_ENTRY):
        yield from row(room)
        if room.recipe.features.ngram_hash:
            # Its projection has a sum over the ranks of its own.
            yield from row(room)
    if role is Role.DEPTH_ENTRY:
        yield from column(room, 2 * hidden)
        yield from _spread(room, hidden)
    if role in (Role.HEAD, Role.DEPTH_NORM):
        yield from column(room, hidden)
        # Largest logit, the target's, and the sum of the exponentials; the fused loss sends the
        # last two together.
        each = room.tokens * SINGLE
        for payload in (each, 2 * each) if room.fused else (each, each, each):
            yield Exchange(TENSOR, REDUCE, False, payload)
