"""The configuration of the whole model: Megatron's dataclass, plus what is ours."""

# NeMo-Run reads these annotations to parse its command line: it resolves neither annotations
# kept as text nor `X | Y`.
# ruff: noqa: UP045

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel as MegatronMambaModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig
from nemo.collections.llm.gpt.model.ssm import SSMConfig
from nemo.lightning import get_vocab_size

from megacpp_nemo.contract.errors import RecipeError, lookup
from megacpp_nemo.contract.pattern import FULL_NAM56R_PATTERN, BlockFamily, LayerPattern
from megacpp_nemo.contract.rules import check_layout, check_model
from megacpp_nemo.contract.training import MAMBA_PATHS
from megacpp_nemo.host.preflight import refuse_unbuilt
from megacpp_nemo.model.hybrid import HybridMambaModel
from megacpp_nemo.model.limits import refuse_settings
from megacpp_nemo.model.recompute import complete_recompute
from megacpp_nemo.model.shape import parallelism_of, shape_of
from megacpp_nemo.model.specs import hybrid_stack_spec
from megacpp_nemo.model.steps import hybrid_data_step, hybrid_forward_step


@dataclass
class HybridConfig(SSMConfig, MLATransformerConfig):
    """Megatron configuration of a hybrid model.

    Fields of Megatron keep Megatron's names. `hybrid_override_pattern` holds our pattern
    (`AEMEAEMEAEMR`, tiled to `num_layers`), read by `HybridStack`. The defaults are NAM56R's.

    `recompute_granularity="full"` recomputes whole layers of every family, prediction depths
    included, by `recompute_method` and `recompute_num_layers` (each layer by itself if they are
    not given). `"selective"` recomputes those `recompute_modules` that a layer has: `core_attn`
    of A layers, `mla_up_proj` of A and D layers, `moe`, `moe_act` and `shared_experts` of expert
    layers, `mlp` of dense E layers and, with Transformer Engine, `layernorm`. M and R layers are
    recomputed whole or not at all.

    Args:
        experts: E layers are mixtures of experts; off, dense MLPs of `ffn_hidden_size`.
        m2rnn_num_heads: Value, gate and transition heads of R layers.
        m2rnn_num_qk_heads: Query/key heads of R layers.
        m2rnn_key_dim: Rows of the recurrent state.
        m2rnn_value_dim: Columns of the recurrent state.
        m2rnn_conv_width: Taps of the R layers' convolution.
        m2rnn_state_gradient_clip: Elementwise bound on the state's gradient.
        mamba_lane: `native` for Mamba-2, `author` for Mamba-3.
        mamba_path: `auto`, or a demanded path: `fused`, `split` (native lane) or `portable`.
        mamba_conv_width: Taps of the Mamba layers' convolution.
        mamba_chunk_size: Tokens per chunk of the Mamba scan.
        author_mamba_num_heads: Heads of Mamba-3; with the four after it, its shape.
        author_mamba_head_dim: Width of one head.
        author_mamba_state_dim: State size.
        author_mamba_mimo_rank: Rank of the multi-input multi-output form; 1 is SISO.
        author_mamba_chunk_size: Tokens per chunk of the scan.
        dsa_a_ranks: A-ranks whose attention is sparse (DSA); the indexer's shape and loss are
            Megatron's `dsa_indexer_*`.
        mtp_pattern: Layers of one multi-token prediction depth.
        ngram_hash: Hashed n-gram memory on the input side.
        ngram_orders: Lengths of the n-grams; with the three after it, the memory's shape.
        ngram_heads_per_order: Independent hashes per order.
        ngram_table_size: Rows per table, at least; the tables' sizes are primes.
        ngram_dim: Width of one table row, split over the tensor ranks.
        ngram_placement: Where the tables lie and are trained: on the `device`, or in `host`
            memory, from which the rows of a micro-batch are moved.
        structure: Code-structure channels on the input side: None, `core`, `all`, or names of
            channels joined by `+`.
        structure_bottleneck: Width of the structure table before its up-projection.
        reset_state: M and R layers start anew at each document of a packed row.
        reset_attention_mask: Attention stays within each document of a packed row.
        seed: Seed of the initial weights; pipeline and tensor ranks draw apart from it.
        mamba_stack_spec: Function from this configuration to the spec of its stack.
        required_packages: Import names without which the model refuses to be built.

    Raises:
        PatternError: If the pattern cannot be read or does not fit `num_layers`.
        RecipeError: If the sizes contradict each other or the parallel sizes.
        RuntimeRefusal: If the layers as built here cannot run, or train, with the settings.
    """

    hybrid_override_pattern: str = FULL_NAM56R_PATTERN
    is_hybrid_model: bool = True  # scales the initial weights by the layers, not twice them
    num_layers: int = 52
    hidden_size: int = 3584
    ffn_hidden_size: int = 18_944
    seq_length: int = 4096
    rotary_base: int = 500_000
    num_attention_heads: int = 56
    kv_channels: int = 64
    # Of the two ancestors that set it, Python takes the one that turns it off.
    multi_latent_attention: bool = True
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_head_dim: int = 64
    v_head_dim: int = 64
    qk_layernorm: bool = False
    rope_type: str = "rope"
    apply_rope_fusion: bool = False
    # NeMo names FlashAttention; Megatron lets Transformer Engine choose, as this does.
    attention_backend: AttnBackend = AttnBackend.auto
    experts: bool = True
    num_moe_experts: Optional[int] = 16
    moe_router_topk: int = 4
    moe_ffn_hidden_size: Optional[int] = 896
    moe_shared_expert_intermediate_size: Optional[int] = 1024
    moe_aux_loss_coeff: float = 1e-4
    mamba_num_heads: int = 56
    mamba_head_dim: int = 64
    mamba_state_dim: int = 64
    mamba_num_groups: int = 8
    mamba_conv_width: int = 4
    mamba_chunk_size: int = 128
    mamba_lane: str = "native"
    mamba_path: str = "auto"
    m2rnn_num_heads: int = 44
    m2rnn_num_qk_heads: int = 1
    m2rnn_key_dim: int = 64
    m2rnn_value_dim: int = 16
    m2rnn_conv_width: int = 4
    m2rnn_state_gradient_clip: float = 1.0
    author_mamba_num_heads: int = 112
    author_mamba_head_dim: int = 64
    author_mamba_state_dim: int = 128
    author_mamba_mimo_rank: int = 4
    author_mamba_chunk_size: int = 16
    dsa_a_ranks: tuple[int, ...] = ()
    dsa_indexer_n_heads: Optional[int] = 32
    dsa_indexer_head_dim: Optional[int] = 64
    dsa_indexer_topk: Optional[int] = 256
    dsa_indexer_loss_coeff: Optional[float] = 0.001
    mtp_pattern: str = "AE"
    ngram_hash: bool = False
    ngram_orders: tuple[int, ...] = (2, 3)
    ngram_heads_per_order: int = 8
    ngram_table_size: int = 500_000
    ngram_dim: int = 16
    ngram_placement: str = "device"
    structure: Optional[str] = None
    structure_bottleneck: int = 64
    reset_state: bool = False
    reset_attention_mask: bool = False
    seed: int = 1234
    required_packages: tuple[str, ...] = ()
    mamba_stack_spec: Callable[..., ModuleSpec] = hybrid_stack_spec
    forward_step_fn: Callable = hybrid_forward_step
    data_step_fn: Callable = hybrid_data_step

    def __post_init__(self) -> None:
        self.dsa_a_ranks, self.ngram_orders = tuple(self.dsa_a_ranks), tuple(self.ngram_orders)
        self.required_packages = tuple(self.required_packages)
        if not self.experts:
            self.num_moe_experts = None
        complete_recompute(self)
        self._check()
        if not self.num_moe_experts:
            # Megatron accepts no expert width where there are no experts.
            self.num_moe_experts = self.moe_ffn_hidden_size = None
        if self.multi_latent_attention:
            # Latent attention makes keys and values for every head; a smaller group count would
            # make Megatron's attention cores repeat them.
            self.num_query_groups = self.num_attention_heads
        super().__post_init__()

    def _check(self) -> None:
        """Check what the contract has rules for, before Megatron asserts on it."""
        lookup(
            {path: path for path in MAMBA_PATHS},
            self.mamba_path,
            what=f"No way to run the Mamba layers is called {self.mamba_path!r}",
            field="mamba_path",
        )
        model, features = shape_of(self)
        check_model(self.layers, model, features)
        # NeMo sets the parallel sizes after construction and checks again; until then a pattern
        # with stage boundaries has no stages to fit.
        if self.pipeline_model_parallel_size > 1 or not self.layers.is_segmented:
            check_layout(self.layers, model, features, parallelism_of(self))
        wanted = self.experts and BlockFamily.EXPERTS in self.families
        if wanted and not self.num_moe_experts:
            raise RecipeError(
                "The pattern has expert layers, but the model has no experts",
                given=f"pattern {self.hybrid_override_pattern}, "
                f"num_moe_experts={self.num_moe_experts}",
                allowed="a number of experts, dense MLPs (experts=False), or a pattern without E",
                hint="num_moe_experts=16",
            )
        refuse_settings(self)

    @property
    def layers(self) -> LayerPattern:
        """The pattern laid out to `num_layers`."""
        return LayerPattern.parse(self.hybrid_override_pattern).tile(self.num_layers)

    @property
    def families(self) -> tuple[BlockFamily, ...]:
        """Families of the layers, those of the prediction depths included, each once."""
        depth = LayerPattern.parse(self.mtp_pattern).layers if self.mtp_num_layers else ()
        return tuple(dict.fromkeys((*self.layers.layers, *depth)))

    @property
    def has_own_model(self) -> bool:
        """Whether the model is `HybridMambaModel`; Megatron's own class does without it."""
        return bool(self.mtp_num_layers or self.ngram_hash or self.structure)

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: Optional[bool] = None,
        post_process: Optional[bool] = None,
        vp_stage: Optional[int] = None,
    ) -> MegatronMambaModel:
        """Build this pipeline stage of the model on the current parallel groups.

        Raises:
            RuntimeRefusal: If the configuration asks for something that is not built here.
        """
        refuse_unbuilt(self)
        # NeMo's inference takes Megatron's own class only.
        build = HybridMambaModel if self.has_own_model else MegatronMambaModel
        return build(
            self,
            mamba_stack_spec=self.mamba_stack_spec(self),
            vocab_size=get_vocab_size(
                self, tokenizer.vocab_size, self.make_vocab_size_divisible_by
            ),
            max_sequence_length=self.seq_length,
            hybrid_override_pattern=self.hybrid_override_pattern,
            fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
            parallel_output=self.parallel_output,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            seq_len_interpolation_factor=self.seq_len_interpolation_factor,
            pre_process=_or_else(pre_process, parallel_state.is_pipeline_first_stage),
            post_process=_or_else(post_process, parallel_state.is_pipeline_last_stage),
        )


def _or_else(given: Optional[bool], default: Callable[[], bool]) -> bool:
    return default() if given is None else given
