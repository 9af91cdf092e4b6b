"""Rows of the correspondence table for what every recipe fixes.

A recipe has no field for these. Each is written out on Megatron's command line wherever
Megatron's own default is another; in NeMo they are the frame that every recipe starts from.
"""

from __future__ import annotations

from typing import Any

from megacpp_nemo.lowering.readers import EXPERTS, LATENT
from megacpp_nemo.lowering.row import CONFIG, EVERY, Condition, Row, Spelling


def _fixed(
    name: str, flag: str, value: Any, *, nemo: Any = None, read: Condition = EVERY, **more: Any
) -> Row:
    """Return the row of a fixed setting of NeMo's model with one flag.

    Args:
        name: Its name in NeMo's model; empty if NeMo has no such setting.
        flag: Its flag.
        value: The flag's value.
        nemo: NeMo's value, if it is another.
        read: Which models read the flag.
        more: Range of releases, as in `Spelling`.
    """
    return Row(
        fixed=value if nemo is None else nemo,
        nemo=(f"{CONFIG}.{name}",) if name else (),
        flags=(Spelling(flag=flag, value=lambda fixed, recipe: value, read=read, **more),),
    )


FIXED_ROWS: tuple[Row, ...] = (
    _fixed("normalization", "--normalization", "RMSNorm"),
    _fixed("add_bias_linear", "--disable-bias-linear", True, nemo=False),
    _fixed("hidden_dropout", "--hidden-dropout", 0.0),
    _fixed("attention_dropout", "--attention-dropout", 0.0),
    _fixed(
        "share_embeddings_and_output_weights",
        "--untie-embeddings-and-output-weights",
        True,
        nemo=False,
    ),
    _fixed("position_embedding_type", "--position-embedding-type", "none"),
    _fixed("rope_type", "--rope-type", "rope", read=LATENT),
    _fixed("apply_rope_fusion", "--no-rope-fusion", True, nemo=False, read=LATENT),
    _fixed("moe_router_score_function", "--moe-router-score-function", "sigmoid", read=EXPERTS),
    _fixed("moe_router_enable_expert_bias", "--moe-router-enable-expert-bias", True, read=EXPERTS),
    _fixed(
        "moe_router_load_balancing_type",
        "--moe-router-load-balancing-type",
        ("aux_loss",),
        nemo="aux_loss",
        read=EXPERTS,
    ),
    _fixed("moe_router_dtype", "--moe-router-dtype", "fp32", read=EXPERTS),
    _fixed("moe_token_dispatcher_type", "--moe-token-dispatcher-type", "alltoall", read=EXPERTS),
    _fixed("is_hybrid_model", "--is-hybrid-model", True, until="0.16"),
    _fixed("", "--lr-decay-style", "cosine"),
    _fixed("", "--ckpt-format", "torch_dist"),
    Row(
        fixed="adam",
        nemo=("optim.config.optimizer",),
        flags=(Spelling(flag="--optimizer"),),
    ),
)


def _host(path: str, value: Any, note: str) -> Row:
    return Row(fixed=value, nemo=(path,), owner="host", note=note)


# What NeMo needs to be told and Megatron's command line has no word for, or does by itself.
HOST_ROWS: tuple[Row, ...] = (
    _host("trainer.accelerator", "auto", "Megatron's entry script needs CUDA"),
    _host("trainer.use_distributed_sampler", False, "Megatron samples by data-parallel rank"),
    _host("trainer.enable_model_summary", False, "Lightning's own table"),
    _host("trainer.strategy.ckpt_async_save", False, "--async-save is off by default"),
    _host("trainer.strategy.replace_progress_bar", False, "NeMo's own progress bar"),
    _host("trainer.strategy.ddp.check_for_nan_in_grad", True, "on by default in Megatron"),
    _host("log.tensorboard.save_dir", "tensorboard", "below the run's folder"),
    _host("log.tensorboard.name", "", "below the run's folder"),
    _host("resume.resume_if_exists", True, "--load of the run's own folder"),
    _host("resume.resume_ignore_no_checkpoint", True, "--load of the run's own folder"),
)
