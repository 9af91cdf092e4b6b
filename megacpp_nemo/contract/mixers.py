"""Shapes of the layers that mix tokens: attention, state space and the recurrent tail.

Field names are Megatron's or the paper's. Sizes count elements, not bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megacpp_nemo.contract.checks import Checked, Count, NonNegativeFloat, Positive, PositiveFloat
from megacpp_nemo.contract.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class AttentionShape(Checked):
    """Heads of the attention layers.

    Args:
        num_heads: Query heads.
        num_query_groups: Key/value heads of plain grouped-query attention; latent attention
            reads its own widths from `LatentShape` instead.
        head_dim: Width of one head of plain attention (Megatron's `kv_channels`).
    """

    num_heads: Positive = 56
    num_query_groups: Positive = 8
    head_dim: Positive = 64


@dataclass(frozen=True, kw_only=True)
class LatentShape(Checked):
    """Widths of multi-latent attention (DeepSeek-V2, arXiv 2405.04434).

    Args:
        q_lora_rank: Rank of the query down-projection.
        kv_lora_rank: Rank of the joint key/value down-projection.
        qk_head_dim: Width per head of the query/key part without position.
        qk_pos_emb_head_dim: Width per head of the rotary part.
        v_head_dim: Width per head of the values.
        layernorm: Norms on the two latents. Megatron's own hybrid layers have none before 0.19,
            whatever the command line says.
    """

    q_lora_rank: Positive = 64
    kv_lora_rank: Positive = 64
    qk_head_dim: Positive = 64
    qk_pos_emb_head_dim: Positive = 64
    v_head_dim: Positive = 64
    layernorm: bool = False


@dataclass(frozen=True, kw_only=True)
class SparseAttentionShape(Checked):
    """DeepSeek sparse attention (DSA, DeepSeek-V3.2) on chosen attention layers.

    Args:
        a_ranks: 0-based indices among the attention layers that become sparse.
        indexer_num_heads: Heads of the lightning indexer.
        indexer_head_dim: Width of one indexer head.
        indexer_topk: Keys each query attends to.
        indexer_loss_coeff: Weight of the indexer's KL loss.
    """

    a_ranks: tuple[Count, ...] = (1, 2, 3, 5, 6, 7, 9, 10, 11)
    indexer_num_heads: Positive = 32
    indexer_head_dim: Positive = 64
    indexer_topk: Positive = 256
    indexer_loss_coeff: NonNegativeFloat = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = tuple(sorted(set(self.a_ranks)))
        if self.a_ranks != ordered:
            raise RecipeError(
                "DSA A-ranks are distinct and ascending",
                given=f"a_ranks={self.a_ranks}",
                allowed="0-based indices among the attention layers, each once, in order",
                hint=f"a_ranks={ordered}",
            )


@dataclass(frozen=True, kw_only=True)
class MambaShape(Checked):
    """Mamba state-space mixer (Mamba-2, arXiv 2405.21060).

    Args:
        num_heads: Heads; the inner width is `num_heads * head_dim`.
        head_dim: Width of one head.
        state_dim: State size per head channel.
        num_groups: Groups that share B and C.
        conv_width: Taps of the causal convolution.
        chunk_size: Tokens per chunk of the scan.
    """

    num_heads: Positive = 56
    head_dim: Positive = 64
    state_dim: Positive = 64
    num_groups: Positive = 8
    conv_width: Positive = 4
    chunk_size: Positive = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_groups:
            raise RecipeError(
                "Mamba groups must divide the Mamba heads",
                given=f"num_heads={self.num_heads}, num_groups={self.num_groups}",
                allowed="num_heads divisible by num_groups",
                hint=f"num_groups={math.gcd(self.num_heads, self.num_groups)}, "
                f"or heads in multiples of {self.num_groups}",
            )


@dataclass(frozen=True, kw_only=True)
class AuthorMambaShape(Checked):
    """Mamba-3, the authored state-space mixer (arXiv 2603.15569).

    Args:
        num_heads: Heads; expand 2 gives twice the native lane's.
        head_dim: Width of one head.
        state_dim: State size; half of it turns, in pairs.
        mimo_rank: Rank of the multi-input multi-output form; 1 is SISO.
        chunk_size: Tokens per chunk of the scan.
    """

    num_heads: Positive = 112
    head_dim: Positive = 64
    state_dim: Positive = 128
    mimo_rank: Positive = 4
    chunk_size: Positive = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim % 4:
            raise RecipeError(
                "Mamba-3 turns half of its state in pairs",
                given=f"state_dim={self.state_dim}",
                allowed="multiples of 4",
                hint=f"state_dim={4 * max(1, round(self.state_dim / 4))}",
            )

    @property
    def num_angles(self) -> int:
        """Pairs of the state's entries that turn."""
        return self.state_dim // 4


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetShape(Checked):
    """Gated DeltaNet (arXiv 2412.06464), the pattern's G. The defaults are Megatron's.

    Args:
        num_key_heads: Heads of queries and keys.
        num_value_heads: Heads of values; a multiple of `num_key_heads`.
        key_head_dim: Width of one query or key head.
        value_head_dim: Width of one value head.
        conv_width: Taps of the causal convolution.
    """

    num_key_heads: Positive = 16
    num_value_heads: Positive = 32
    key_head_dim: Positive = 128
    value_head_dim: Positive = 128
    conv_width: Positive = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_value_heads % self.num_key_heads:
            raise RecipeError(
                "Gated DeltaNet key heads must divide its value heads",
                given=f"num_key_heads={self.num_key_heads}, num_value_heads={self.num_value_heads}",
                allowed="num_value_heads divisible by num_key_heads",
                hint=f"num_key_heads={math.gcd(self.num_key_heads, self.num_value_heads)}",
            )


@dataclass(frozen=True, kw_only=True)
class RecurrentShape(Checked):
    """M2RNN, a non-linear RNN with a matrix-valued state (arXiv 2603.14360).

    Args:
        num_heads: Heads of values, forget gates, output gates and transition matrices.
        num_qk_heads: Heads of queries and keys; `num_heads` is a multiple of it.
        key_dim: Rows K of the state.
        value_dim: Columns V of the state.
        conv_width: Taps of the causal convolution on q, k and v.
        state_gradient_clip: Elementwise bound on the state's gradient in backward.
    """

    num_heads: Positive = 44
    num_qk_heads: Positive = 1
    key_dim: Positive = 64
    value_dim: Positive = 16
    conv_width: Positive = 4
    state_gradient_clip: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_qk_heads:
            raise RecipeError(
                "M2RNN query/key heads must divide its value heads",
                given=f"num_heads={self.num_heads}, num_qk_heads={self.num_qk_heads}",
                allowed="num_heads divisible by num_qk_heads",
                hint="num_qk_heads=1",
            )
