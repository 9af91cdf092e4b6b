"""Shapes of a hybrid model: widths, heads and counts, one dataclass per block.

Field names are Megatron's or the paper's. Sizes count elements, not bytes. Every class
checks what can be checked without its neighbours; `HybridRecipe` checks the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from megacpp_nemo.contract.errors import RecipeError, nearest

EXPERT_ACTIVATIONS = ("gelu", "squared_relu", "swiglu")


def require_positive(owner: object, *, zero_allowed: frozenset[str] = frozenset()) -> None:
    """Raise unless every integer field of a shape is positive (or zero where listed).

    Raises:
        RecipeError: Naming the class, the field and its value.
    """
    for item in fields(owner):  # type: ignore[arg-type]
        value = getattr(owner, item.name)
        if str(item.type) not in ("int", "int | None") or value is None:
            continue
        least = 0 if item.name in zero_allowed else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(
                f"{type(owner).__name__}.{item.name} is a whole number",
                given=value,
                allowed=f"{least} or more",
                hint=f"{item.name}={item.default if isinstance(item.default, int) else least}",
            )


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Heads of the attention layers.

    Args:
        num_heads: Query heads.
        num_query_groups: Key/value heads of plain grouped-query attention; latent attention
            reads its own widths from `LatentShape` instead.
        head_dim: Width of one head of plain attention (Megatron's `kv_channels`).
    """

    num_heads: int = 56
    num_query_groups: int = 8
    head_dim: int = 64

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Widths of multi-latent attention (DeepSeek-V2, arXiv 2405.04434).

    Args:
        q_lora_rank: Rank of the query down-projection.
        kv_lora_rank: Rank of the joint key/value down-projection.
        qk_head_dim: Width per head of the query/key part without position.
        qk_pos_emb_head_dim: Width per head of the rotary part.
        v_head_dim: Width per head of the values.
    """

    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_head_dim: int = 64
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 64

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True)
class SparseAttentionShape:
    """DeepSeek sparse attention (DSA, DeepSeek-V3.2) on chosen attention layers.

    Args:
        a_ranks: 0-based indices among the attention layers that become sparse.
        indexer_num_heads: Heads of the lightning indexer.
        indexer_head_dim: Width of one indexer head.
        indexer_topk: Keys each query attends to.
        indexer_loss_coeff: Weight of the indexer's KL loss.
    """

    a_ranks: tuple[int, ...] = (1, 2, 3, 5, 6, 7, 9, 10, 11)
    indexer_num_heads: int = 32
    indexer_head_dim: int = 64
    indexer_topk: int = 256
    indexer_loss_coeff: float = 0.001

    def __post_init__(self) -> None:
        require_positive(self)
        object.__setattr__(self, "a_ranks", tuple(self.a_ranks))
        if list(self.a_ranks) != sorted(set(self.a_ranks)) or any(r < 0 for r in self.a_ranks):
            raise RecipeError(
                "DSA A-ranks are distinct, ascending and not negative",
                given=self.a_ranks,
                allowed="0-based indices among the attention layers, each once",
                hint=f"a_ranks={tuple(sorted({abs(r) for r in self.a_ranks}))}",
            )


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """Mixture of experts.

    Args:
        num_experts: Routed experts per layer.
        topk: Experts each token is sent to.
        ffn_hidden_size: Inner width of one routed expert.
        shared_expert_size: Inner width of the shared expert; 0 for none.
        activation: `gelu` or `squared_relu` (two matrices per expert), or `swiglu` (gated,
            three).
        aux_loss_coeff: Weight of the load-balancing loss.
    """

    num_experts: int = 16
    topk: int = 4
    ffn_hidden_size: int = 896
    shared_expert_size: int = 1024
    activation: str = "gelu"
    aux_loss_coeff: float = 1e-4

    def __post_init__(self) -> None:
        require_positive(self, zero_allowed=frozenset({"shared_expert_size"}))
        if self.topk > self.num_experts:
            raise RecipeError(
                "A token cannot be sent to more experts than there are",
                given=f"topk={self.topk} of num_experts={self.num_experts}",
                allowed=f"topk from 1 to {self.num_experts}",
                hint=f"topk={self.num_experts}",
            )
        if self.activation not in EXPERT_ACTIVATIONS:
            raise RecipeError(
                "Unknown activation of the experts",
                given=self.activation,
                allowed=", ".join(EXPERT_ACTIVATIONS),
                hint=f"activation={nearest(self.activation, EXPERT_ACTIVATIONS) or 'gelu'!r}",
            )


@dataclass(frozen=True, kw_only=True)
class MambaShape:
    """Mamba state-space mixer (Mamba-2, arXiv 2405.21060).

    Args:
        num_heads: Heads; the inner width is `num_heads * head_dim`.
        head_dim: Width of one head.
        state_dim: State size per head channel.
        num_groups: Groups that share B and C.
        conv_width: Taps of the causal convolution.
        chunk_size: Tokens per chunk of the scan.
    """

    num_heads: int = 56
    head_dim: int = 64
    state_dim: int = 64
    num_groups: int = 8
    conv_width: int = 4
    chunk_size: int = 128

    def __post_init__(self) -> None:
        require_positive(self)
        if self.num_heads % self.num_groups:
            raise RecipeError(
                "Mamba groups must divide the Mamba heads",
                given=f"num_heads={self.num_heads}, num_groups={self.num_groups}",
                allowed="num_heads divisible by num_groups",
                hint="fewer groups, or a multiple of num_groups heads",
            )


@dataclass(frozen=True, kw_only=True)
class AuthorMambaShape:
    """Mamba-3, the authored state-space mixer (arXiv 2603.15569).

    Args:
        num_heads: Heads; expand 2 gives twice the native lane's.
        head_dim: Width of one head.
        state_dim: State size.
        mimo_rank: Rank of the multi-input multi-output form; 1 is SISO.
        chunk_size: Tokens per chunk of the scan.
    """

    num_heads: int = 112
    head_dim: int = 64
    state_dim: int = 128
    mimo_rank: int = 4
    chunk_size: int = 16

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True)
class RecurrentShape:
    """M2RNN, a non-linear RNN with a matrix-valued state (arXiv 2603.14360).

    Args:
        num_heads: Heads of values, forget gates, output gates and transition matrices.
        num_qk_heads: Heads of queries and keys; `num_heads` is a multiple of it.
        key_dim: Rows K of the state.
        value_dim: Columns V of the state.
        conv_width: Taps of the causal convolution on q, k and v.
        state_gradient_clip: Elementwise bound on the state's gradient in backward.
    """

    num_heads: int = 44
    num_qk_heads: int = 1
    key_dim: int = 64
    value_dim: int = 16
    conv_width: int = 4
    state_gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self)
        if self.num_heads % self.num_qk_heads:
            raise RecipeError(
                "M2RNN query/key heads must divide its value heads",
                given=f"num_heads={self.num_heads}, num_qk_heads={self.num_qk_heads}",
                allowed="num_heads divisible by num_qk_heads",
                hint="num_qk_heads=1",
            )
        if not self.state_gradient_clip > 0:
            raise RecipeError(
                "The bound on M2RNN's state gradient is positive",
                given=self.state_gradient_clip,
                allowed="a number above 0",
                hint="state_gradient_clip=1.0",
            )


@dataclass(frozen=True, kw_only=True)
class NgramHashShape:
    """Hashed n-gram memory on the input side.

    Args:
        orders: Lengths of the n-grams.
        heads_per_order: Independent hashes per order.
        table_size: Rows per table, about; real sizes are primes near it.
        dim: Width of one table row.
    """

    orders: tuple[int, ...] = (2, 3)
    heads_per_order: int = 8
    table_size: int = 500_000
    dim: int = 16

    def __post_init__(self) -> None:
        require_positive(self)
        object.__setattr__(self, "orders", tuple(self.orders))


@dataclass(frozen=True, kw_only=True)
class StructureShape:
    """Code-structure channels on the input side.

    Args:
        bottleneck: Width of the stacked table before the up-projection.
    """

    bottleneck: int = 64

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True)
class EmbeddingShape:
    """The input side: vocabulary and the optional embeddings added to the tokens'.

    Args:
        vocab_size: Rows of the token embedding before padding. The data's tokenizer decides
            what is built; this is the size the recipe is planned for.
        make_vocab_size_divisible_by: The built size is the next multiple of this times the
            tensor-parallel size.
        ngram: Hashed n-gram memory, used when `Features.ngram_hash` is on.
        structure: Structure channels, used when `Features.structure` is set.
    """

    vocab_size: int = 65_536
    make_vocab_size_divisible_by: int = 128
    ngram: NgramHashShape = field(default_factory=NgramHashShape)
    structure: StructureShape = field(default_factory=StructureShape)

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, kw_only=True)
class MultiTokenPredictionShape:
    """Multi-token prediction (MTP): a suffix of the model, not a layer family.

    Args:
        num_layers: Prediction depth; 0 is off.
        loss_scaling_factor: Weight of the summed MTP losses.
    """

    num_layers: int = 1
    loss_scaling_factor: float = 0.1

    def __post_init__(self) -> None:
        require_positive(self, zero_allowed=frozenset({"num_layers"}))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that fixes the parameters of a model, besides its pattern.

    Args:
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of a dense MLP (Megatron wants one even if unused).
        seq_length: Tokens per training row.
        rotary_base: Base period of the rotary embedding; Megatron's flag takes an integer.
        norm_epsilon: Epsilon of every RMSNorm.
        init_std: Standard deviation of the initial weights.
    """

    hidden_size: int = 3584
    ffn_hidden_size: int = 18_944
    seq_length: int = 4096
    rotary_base: int = 500_000
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    attention: AttentionShape = field(default_factory=AttentionShape)
    latent: LatentShape = field(default_factory=LatentShape)
    sparse_attention: SparseAttentionShape = field(default_factory=SparseAttentionShape)
    experts: ExpertsShape = field(default_factory=ExpertsShape)
    mamba: MambaShape = field(default_factory=MambaShape)
    author_mamba: AuthorMambaShape = field(default_factory=AuthorMambaShape)
    recurrent: RecurrentShape = field(default_factory=RecurrentShape)
    embedding: EmbeddingShape = field(default_factory=EmbeddingShape)
    mtp: MultiTokenPredictionShape = field(default_factory=MultiTokenPredictionShape)

    def __post_init__(self) -> None:
        require_positive(self)
