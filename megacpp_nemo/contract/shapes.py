"""Shapes of a hybrid model: widths, heads and counts, one dataclass per block.

Field names are Megatron's or the paper's. Sizes count elements, not bytes. Every class
checks what can be checked without its neighbours; `HybridRecipe` checks the rest. The layers
that mix tokens are in `mixers`, and are re-exported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megacpp_nemo.contract.checks import (
    AtLeastTwo,
    Checked,
    Count,
    Experts,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rows,
    Rule,
    Tables,
    one_of,
)
from megacpp_nemo.contract.errors import PatternError, RecipeError
from megacpp_nemo.contract.mixers import (
    AttentionShape,
    AuthorMambaShape,
    GatedDeltaNetShape,
    LatentShape,
    MambaShape,
    RecurrentShape,
    SparseAttentionShape,
)
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.contract.primes import first_primes
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS, structure_channels

__all__ = [
    "EXPERT_ACTIVATIONS",
    "AttentionShape",
    "AuthorMambaShape",
    "EmbeddingShape",
    "ExpertsShape",
    "GatedDeltaNetShape",
    "LatentShape",
    "MambaShape",
    "ModelShape",
    "MultiTokenPredictionShape",
    "NgramHashShape",
    "RecurrentShape",
    "SparseAttentionShape",
    "StructureShape",
]

PLACEMENTS = ("device", "host")
EXPERT_ACTIVATIONS = ("gelu", "squared_relu", "swiglu")
MTP_FAMILIES = (
    BlockFamily.ATTENTION,
    BlockFamily.EXPERTS,
    BlockFamily.GATED_DELTA_NET,
    BlockFamily.MAMBA,
)
DISTINCT = Rule(
    "a tuple or list of distinct whole numbers, each 2 or more, at least one",
    lambda orders: 0 < len(orders) == len(set(orders)),
)


@dataclass(frozen=True, kw_only=True)
class ExpertsShape(Checked):
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

    num_experts: Experts = 16
    topk: Positive = 4
    ffn_hidden_size: Positive = 896
    shared_expert_size: Count = 1024
    activation: Annotated[str, one_of(*EXPERT_ACTIVATIONS)] = "gelu"
    aux_loss_coeff: NonNegativeFloat = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_experts:
            raise RecipeError(
                "A token cannot be sent to more experts than there are",
                given=f"topk={self.topk} of num_experts={self.num_experts}",
                allowed=f"topk from 1 to {self.num_experts}",
                hint=f"topk={self.num_experts}",
            )


@dataclass(frozen=True, kw_only=True)
class NgramHashShape(Checked):
    """Hashed n-gram memory on the input side.

    Args:
        orders: Lengths of the n-grams.
        heads_per_order: Independent hashes per order.
        table_size: Rows per table, at least; `table_sizes` are primes.
        dim: Width of one table row.
        placement: Where the tables lie and are trained: on the `device`, or in `host` memory,
            from which the rows of a micro-batch are moved.
    """

    orders: Annotated[tuple[AtLeastTwo, ...], DISTINCT] = (2, 3)
    heads_per_order: Tables = 8
    table_size: Rows = 500_000
    dim: Positive = 16
    placement: Annotated[str, one_of(*PLACEMENTS)] = "device"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "orders", tuple(self.orders))

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """Rows of each table, one order after another: the first primes from `table_size` on.

        Different primes, so that n-grams that meet in one table part in the others.
        """
        return first_primes(self.table_size, len(self.orders) * self.heads_per_order)


@dataclass(frozen=True, kw_only=True)
class StructureShape(Checked):
    """Code-structure channels on the input side.

    Args:
        bottleneck: Width of the stacked table before the up-projection.
    """

    bottleneck: Positive = 64

    def table_sizes(self, choice: str) -> tuple[int, ...]:
        """Return the rows of each channel's table, of a choice of `Features.structure`.

        The last row of each is for a token that has no such value.
        """
        return tuple(STRUCTURE_CHANNELS[name] + 1 for name in structure_channels(choice))


@dataclass(frozen=True, kw_only=True)
class EmbeddingShape(Checked):
    """The input side: vocabulary and the optional embeddings added to the tokens'.

    Args:
        vocab_size: Rows of the token embedding before padding. The data's tokenizer decides
            what is built; this is the size the recipe is planned for.
        make_vocab_size_divisible_by: The built size is the next multiple of this times the
            tensor-parallel size.
        ngram: Hashed n-gram memory, used when `Features.ngram_hash` is on.
        structure: Structure channels, used when `Features.structure` is set.
    """

    vocab_size: Positive = 65_536
    make_vocab_size_divisible_by: Positive = 128
    ngram: NgramHashShape = field(default_factory=NgramHashShape)
    structure: StructureShape = field(default_factory=StructureShape)


@dataclass(frozen=True, kw_only=True)
class MultiTokenPredictionShape(Checked):
    """Multi-token prediction (MTP): a suffix of the model, not a layer family.

    Args:
        num_layers: Prediction depth; 0 is off.
        pattern: Layers of one depth, of A, E, G and M; text is parsed. As in DeepSeek-V3, one
            attention and one expert layer unless said otherwise.
        loss_scaling_factor: Weight of the summed MTP losses.

    Raises:
        PatternError: If the pattern cannot be read, is cut into stages, or has a family whose
            layers are told apart by their place in the main pattern.
    """

    num_layers: Count = 1
    pattern: LayerPattern = field(default_factory=lambda: LayerPattern.parse("AE"))
    loss_scaling_factor: NonNegativeFloat = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, LayerPattern):
            object.__setattr__(self, "pattern", LayerPattern.parse(self.pattern))
        super().__post_init__()
        others = [family for family in self.pattern.counts() if family not in MTP_FAMILIES]
        if others or self.pattern.is_segmented:
            raise PatternError(
                "A multi-token prediction depth is a few plain layers on the last stage",
                given=f"mtp.pattern={str(self.pattern)!r}",
                allowed="letters " + ", ".join(family.letter for family in MTP_FAMILIES),
                hint="mtp.pattern='AE'",
            )


@dataclass(frozen=True, kw_only=True)
class ModelShape(Checked):
    """Everything that fixes the parameters of a model, besides its pattern.

    Args:
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Inner width of a dense MLP (Megatron wants one even if unused).
        seq_length: Tokens per training row.
        rotary_base: Base period of the rotary embedding; Megatron's flag takes an integer.
        norm_epsilon: Epsilon of every RMSNorm.
        init_std: Standard deviation of the initial weights.
    """

    hidden_size: Positive = 3584
    ffn_hidden_size: Positive = 18_944
    seq_length: Positive = 4096
    rotary_base: Positive = 500_000
    norm_epsilon: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02
    attention: AttentionShape = field(default_factory=AttentionShape)
    latent: LatentShape = field(default_factory=LatentShape)
    sparse_attention: SparseAttentionShape = field(default_factory=SparseAttentionShape)
    experts: ExpertsShape = field(default_factory=ExpertsShape)
    mamba: MambaShape = field(default_factory=MambaShape)
    author_mamba: AuthorMambaShape = field(default_factory=AuthorMambaShape)
    gated_delta_net: GatedDeltaNetShape = field(default_factory=GatedDeltaNetShape)
    recurrent: RecurrentShape = field(default_factory=RecurrentShape)
    embedding: EmbeddingShape = field(default_factory=EmbeddingShape)
    mtp: MultiTokenPredictionShape = field(default_factory=MultiTokenPredictionShape)
