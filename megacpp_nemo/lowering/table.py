"""The correspondence table: where each recipe field stands in NeMo's configuration.

Every leaf field of `HybridRecipe` has a row. A row lists the paths in the NeMo recipe (a
`nemo_run.Partial` of `llm.pretrain`) that carry the field, and how NeMo spells the value; a
field that NeMo spells in two ways has two rows. A row without paths says why. The NeMo recipe
is built from this table, and a test holds it complete: adding a field to the contract without a
row fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.training import Precision


def _same(value: Any, recipe: HybridRecipe) -> Any:
    return value


def _always(recipe: HybridRecipe) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe field and its places.

    Args:
        field: Dotted path in the recipe.
        nemo: Dotted paths in the NeMo recipe that carry it.
        built: Dotted paths that carry it as an object of torch or NeMo, which this storey does
            not import; `recipes.build` makes the objects.
        spell: `(value, recipe) -> value` as NeMo spells it at the `nemo` paths.
        when: Whether the field is carried for this recipe; the paths keep NeMo's defaults
            otherwise.
        note: Why there is no path, or what is special.
    """

    field: str
    nemo: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    spell: Callable[[Any, HybridRecipe], Any] = _same
    when: Callable[[HybridRecipe], bool] = _always
    note: str = ""

    def value(self, recipe: HybridRecipe) -> Any:
        """Return the field's value in `recipe`."""
        value: Any = recipe
        for name in self.field.split("."):
            value = getattr(value, name)
        return value


NOT_BUILT = "the model does not build this yet; a run that asks for it is refused"


def _rows(prefix: str, target: str, names: dict[str, str], **more: Any) -> list[Row]:
    """Return rows for fields below `prefix` that each have one place below `target`."""
    return [
        Row(field=f"{prefix}.{name}", nemo=(f"{target}.{place}",), **more)
        for name, place in names.items()
    ]


def _not_built(prefix: str, *names: str) -> list[Row]:
    return [Row(field=f"{prefix}.{name}", note=NOT_BUILT) for name in names]


CONFIG = "model.config"
GPU_PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d")
SAMPLES = "data.num_train_samples"

ROWS: tuple[Row, ...] = (
    Row(
        field="name",
        nemo=("log.explicit_log_dir",),
        spell=lambda name, recipe: f"runs/{name}",
    ),
    Row(
        field="pattern",
        nemo=(f"{CONFIG}.hybrid_override_pattern",),
        spell=lambda pattern, recipe: str(pattern),
    ),
    Row(field="depth", nemo=(f"{CONFIG}.num_layers",)),
    Row(field="corpus", built=("data",), note="decides which data module serves the run"),
    *_rows(
        "model",
        CONFIG,
        {
            "hidden_size": "hidden_size",
            "ffn_hidden_size": "ffn_hidden_size",
            "rotary_base": "rotary_base",
            "norm_epsilon": "layernorm_epsilon",
            "init_std": "init_method_std",
        },
    ),
    Row(field="model.seq_length", nemo=(f"{CONFIG}.seq_length", "data.seq_length")),
    *_rows(
        "model.attention",
        CONFIG,
        {"num_heads": "num_attention_heads", "head_dim": "kv_channels"},
    ),
    Row(
        field="model.attention.num_query_groups",
        nemo=(f"{CONFIG}.num_query_groups",),
        when=lambda recipe: not recipe.features.latent_attention,
        note="latent attention has keys and values for every head",
    ),
    *_rows(
        "model.latent",
        CONFIG,
        {
            name: name
            for name in (
                "q_lora_rank",
                "kv_lora_rank",
                "qk_head_dim",
                "qk_pos_emb_head_dim",
                "v_head_dim",
            )
        },
    ),
    Row(
        field="model.sparse_attention.a_ranks",
        nemo=(f"{CONFIG}.dsa_a_ranks",),
        when=lambda recipe: recipe.features.sparse_attention,
        note="empty unless features.sparse_attention is on",
    ),
    *_rows(
        "model.sparse_attention",
        CONFIG,
        {
            "indexer_num_heads": "dsa_indexer_n_heads",
            "indexer_head_dim": "dsa_indexer_head_dim",
            "indexer_topk": "dsa_indexer_topk",
            "indexer_loss_coeff": "dsa_indexer_loss_coeff",
        },
        when=lambda recipe: recipe.features.sparse_attention,
    ),
    *_rows(
        "model.experts",
        CONFIG,
        {
            "num_experts": "num_moe_experts",
            "topk": "moe_router_topk",
            "ffn_hidden_size": "moe_ffn_hidden_size",
            "aux_loss_coeff": "moe_aux_loss_coeff",
        },
    ),
    Row(
        field="model.experts.shared_expert_size",
        nemo=(f"{CONFIG}.moe_shared_expert_intermediate_size",),
        spell=lambda size, recipe: size or None,
    ),
    Row(
        field="model.experts.activation",
        nemo=(f"{CONFIG}.gated_linear_unit",),
        built=(f"{CONFIG}.activation_func",),
        spell=lambda activation, recipe: activation == "swiglu",
    ),
    *_rows(
        "model.mamba",
        CONFIG,
        {
            "num_heads": "mamba_num_heads",
            "head_dim": "mamba_head_dim",
            "state_dim": "mamba_state_dim",
            "num_groups": "mamba_num_groups",
            "conv_width": "mamba_conv_width",
            "chunk_size": "mamba_chunk_size",
        },
    ),
    *_not_built(
        "model.author_mamba", "num_heads", "head_dim", "state_dim", "mimo_rank", "chunk_size"
    ),
    *_rows(
        "model.recurrent",
        CONFIG,
        {
            name: f"m2rnn_{name}"
            for name in (
                "num_heads",
                "num_qk_heads",
                "key_dim",
                "value_dim",
                "conv_width",
                "state_gradient_clip",
            )
        },
    ),
    Row(
        field="model.embedding.vocab_size",
        nemo=("data.vocab_size",),
        when=lambda recipe: recipe.corpus == "sources",
        note="the tokenizer of existing data decides for full sizes",
    ),
    Row(
        field="model.embedding.make_vocab_size_divisible_by",
        nemo=(f"{CONFIG}.make_vocab_size_divisible_by",),
    ),
    *_not_built("model.embedding.ngram", "orders", "heads_per_order", "table_size", "dim"),
    *_not_built("model.embedding.structure", "bottleneck"),
    Row(
        field="model.mtp.num_layers",
        nemo=(f"{CONFIG}.mtp_num_layers",),
        spell=lambda depth, recipe: depth or None,
    ),
    Row(
        field="model.mtp.loss_scaling_factor",
        nemo=(f"{CONFIG}.mtp_loss_scaling_factor",),
        when=lambda recipe: recipe.model.mtp.num_layers > 0,
    ),
    Row(field="parallelism.num_nodes", nemo=("trainer.num_nodes",)),
    Row(field="parallelism.devices_per_node", nemo=("trainer.devices",)),
    # The strategy's value is the one that runs; the model's is checked as it is built.
    *(
        Row(field=f"parallelism.{name}", nemo=(f"trainer.strategy.{name}", f"{CONFIG}.{name}"))
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "sequence_parallel",
        )
    ),
    Row(
        field="parallelism.use_distributed_optimizer",
        nemo=(
            "trainer.strategy.ddp.use_distributed_optimizer",
            "optim.config.use_distributed_optimizer",
        ),
    ),
    *_rows(
        "parallelism",
        "trainer.strategy.ddp",
        {
            "overlap_grad_reduce": "overlap_grad_reduce",
            "overlap_param_gather": "overlap_param_gather",
        },
    ),
    Row(
        field="precision",
        nemo=(f"{CONFIG}.bf16", "optim.config.bf16"),
        built=(
            f"{CONFIG}.params_dtype",
            f"{CONFIG}.pipeline_dtype",
            "optim.config.params_dtype",
            "trainer.strategy.pipeline_dtype",
            "trainer.plugins",
        ),
        spell=lambda precision, recipe: precision is not Precision.FP32,
    ),
    *_rows(
        "batch",
        "data",
        {"micro_batch_size": "micro_batch_size", "global_batch_size": "global_batch_size"},
    ),
    *_rows(
        "schedule",
        "optim.config",
        {
            "lr": "lr",
            "weight_decay": "weight_decay",
            "adam_beta1": "adam_beta1",
            "adam_beta2": "adam_beta2",
            "adam_eps": "adam_eps",
            "clip_grad": "clip_grad",
        },
    ),
    Row(
        field="batch.global_batch_size",
        nemo=(SAMPLES,),
        spell=lambda size, recipe: size * recipe.schedule.decay_steps,
        note="rows laid out up to decay_steps, so that extending a run keeps their order",
    ),
    *_rows(
        "schedule",
        "optim.lr_scheduler",
        {"min_lr": "min_lr", "warmup_steps": "warmup_steps", "decay_steps": "decay_steps"},
    ),
    Row(
        field="schedule.decay_steps",
        nemo=(SAMPLES,),
        spell=lambda steps, recipe: steps * recipe.batch.global_batch_size,
    ),
    Row(field="schedule.train_steps", nemo=("trainer.max_steps",)),
    Row(field="schedule.seed", nemo=("data.seed", f"{CONFIG}.seed")),
    Row(field="cadence.eval_interval", nemo=("trainer.val_check_interval",)),
    Row(
        field="cadence.eval_batches",
        nemo=("trainer.limit_val_batches", "trainer.num_sanity_val_steps"),
    ),
    Row(field="cadence.save_interval", nemo=("log.ckpt.save_interval",)),
    Row(field="cadence.log_interval", nemo=("trainer.log_every_n_steps",)),
    Row(field="features.latent_attention", nemo=(f"{CONFIG}.multi_latent_attention",)),
    Row(
        field="features.sparse_attention",
        nemo=(f"{CONFIG}.experimental_attention_variant",),
        spell=lambda on, recipe: "dsa" if on else None,
    ),
    Row(field="features.mamba", nemo=(f"{CONFIG}.mamba_lane",)),
    Row(
        field="features.kernels",
        nemo=(f"{CONFIG}.required_packages",),
        spell=lambda kernels, recipe: GPU_PACKAGES if kernels == "required" else (),
    ),
    Row(
        field="features.kernels",
        nemo=(f"{CONFIG}.moe_grouped_gemm",),
        spell=lambda kernels, recipe: kernels == "required",
    ),
    *_rows(
        "features",
        CONFIG,
        {name: name for name in ("ngram_hash", "structure", "reset_state", "reset_attention_mask")},
    ),
)


def carried(recipe: HybridRecipe) -> dict[str, Any]:
    """Return every path of the NeMo recipe that carries a field of `recipe`, with its value."""
    return {
        path: row.spell(row.value(recipe), recipe)
        for row in ROWS
        if row.when(recipe)
        for path in row.nemo
    }
