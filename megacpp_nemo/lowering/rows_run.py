"""Rows of the correspondence table that say how a run goes."""

from __future__ import annotations

from typing import Any

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.readers import EXPERTS
from megacpp_nemo.lowering.row import CONFIG, Condition, Row, Spelling
from megacpp_nemo.lowering.rows_recompute import RECOMPUTE_ROWS

GPU_PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d")
SAMPLES = "data.num_train_samples"

FP8 = Condition(
    "FP8 in experts only, which Megatron's stack cannot do",
    lambda plan: any(seam.id == "fp8-experts" for seam in plan.seams),
)
DATA = Condition("a data_path", lambda plan: bool(plan.recipe.files.data_path))
TOKENIZER = Condition("a tokenizer_dir", lambda plan: bool(plan.recipe.files.tokenizer_dir))


def _above_one(size: int | None, recipe: HybridRecipe) -> int | None:
    return size if size and size > 1 else None


def _bare(on: bool, recipe: HybridRecipe) -> bool | None:
    return on or None


def _parallel(name: str, flag: str | None, **more: Any) -> Row:
    """Return a row of a parallel size or switch."""
    # The strategy's value is the one that runs in NeMo; the model's is checked as it is built.
    return Row(
        field=f"parallelism.{name}",
        nemo=(f"trainer.strategy.{name}", f"{CONFIG}.{name}"),
        flags=(Spelling(flag=flag, **more),) if flag else (),
    )


def _flagged(prefix: str, target: str, names: dict[str, tuple[str, str]]) -> list[Row]:
    return [
        Row(
            field=f"{prefix}.{name}",
            nemo=(f"{target}.{place}",),
            flags=(Spelling(flag=flag),),
        )
        for name, (place, flag) in names.items()
    ]


PARALLEL_ROWS: tuple[Row, ...] = (
    Row(
        field="parallelism.num_nodes",
        nemo=("trainer.num_nodes",),
        owner="policy",
        note="torchrun's --nnodes",
    ),
    Row(
        field="parallelism.devices_per_node",
        nemo=("trainer.devices",),
        owner="policy",
        note="torchrun's --nproc-per-node",
    ),
    _parallel("tensor_model_parallel_size", "--tensor-model-parallel-size"),
    _parallel("pipeline_model_parallel_size", "--pipeline-model-parallel-size"),
    Row(
        field="parallelism.virtual_pipeline_model_parallel_size",
        nemo=(
            "trainer.strategy.virtual_pipeline_model_parallel_size",
            f"{CONFIG}.virtual_pipeline_model_parallel_size",
        ),
        owner="pattern",
        note="from 0.17.1, more | segments than stages; refused before",
    ),
    _parallel("context_parallel_size", "--context-parallel-size", value=_above_one),
    _parallel(
        "expert_model_parallel_size",
        "--expert-model-parallel-size",
        value=_above_one,
        read=EXPERTS,
    ),
    _parallel("expert_tensor_parallel_size", "--expert-tensor-parallel-size", read=EXPERTS),
    _parallel("sequence_parallel", "--sequence-parallel", value=_bare),
    Row(
        field="parallelism.use_distributed_optimizer",
        nemo=(
            "trainer.strategy.ddp.use_distributed_optimizer",
            "optim.config.use_distributed_optimizer",
        ),
        flags=(Spelling(flag="--use-distributed-optimizer", value=_bare),),
    ),
    *(
        Row(
            field=f"parallelism.{name}",
            nemo=(f"trainer.strategy.ddp.{name}",),
            flags=(Spelling(flag=flag, value=_bare),),
        )
        for name, flag in (
            ("overlap_grad_reduce", "--overlap-grad-reduce"),
            ("overlap_param_gather", "--overlap-param-gather"),
        )
    ),
)

TRAINING_ROWS: tuple[Row, ...] = (
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
        unspell=None,
        flags=(
            Spelling(
                flag="--bf16",
                value=lambda precision, recipe: _bare(precision is not Precision.FP32, recipe),
            ),
            Spelling(
                flag="--fp8-format",
                value=lambda precision, recipe: (
                    "hybrid" if precision is Precision.FP8_EXPERTS else None
                ),
            ),
            Spelling(
                flag="--fp8-recipe",
                value=lambda precision, recipe: (
                    "tensorwise" if precision is Precision.FP8_EXPERTS else None
                ),
            ),
        ),
        spec=FP8,
    ),
    *_flagged(
        "batch",
        "data",
        {
            "micro_batch_size": ("micro_batch_size", "--micro-batch-size"),
            "global_batch_size": ("global_batch_size", "--global-batch-size"),
        },
    ),
    *_flagged(
        "schedule",
        "optim.config",
        {
            "lr": ("lr", "--lr"),
            "weight_decay": ("weight_decay", "--weight-decay"),
            "adam_beta1": ("adam_beta1", "--adam-beta1"),
            "adam_beta2": ("adam_beta2", "--adam-beta2"),
            "adam_eps": ("adam_eps", "--adam-eps"),
            "clip_grad": ("clip_grad", "--clip-grad"),
        },
    ),
    Row(
        field="batch.global_batch_size",
        nemo=(SAMPLES,),
        spell=lambda size, recipe: size * recipe.schedule.decay_steps,
        unspell=None,
        note="rows laid out up to decay_steps, so that extending a run keeps their order",
    ),
    *_flagged(
        "schedule",
        "optim.lr_scheduler",
        {
            "min_lr": ("min_lr", "--min-lr"),
            "warmup_steps": ("warmup_steps", "--lr-warmup-iters"),
            "decay_steps": ("decay_steps", "--lr-decay-iters"),
        },
    ),
    Row(
        field="schedule.decay_steps",
        nemo=(SAMPLES,),
        spell=lambda steps, recipe: steps * recipe.batch.global_batch_size,
        unspell=None,
    ),
    Row(
        field="schedule.train_steps",
        nemo=("trainer.max_steps",),
        flags=(Spelling(flag="--train-iters"),),
    ),
    Row(
        field="schedule.seed",
        nemo=("data.seed", f"{CONFIG}.seed"),
        flags=(Spelling(flag="--seed"),),
    ),
    Row(
        field="cadence.eval_interval",
        nemo=("trainer.val_check_interval",),
        flags=(Spelling(flag="--eval-interval"),),
    ),
    Row(
        field="cadence.eval_batches",
        nemo=("trainer.limit_val_batches", "trainer.num_sanity_val_steps"),
        flags=(Spelling(flag="--eval-iters"),),
    ),
    Row(
        field="cadence.save_interval",
        nemo=("log.ckpt.save_interval",),
        flags=(Spelling(flag="--save-interval"),),
    ),
    Row(
        field="cadence.log_interval",
        nemo=("trainer.log_every_n_steps",),
        flags=(Spelling(flag="--log-interval"),),
    ),
)

PLACE_ROWS: tuple[Row, ...] = (
    Row(field="name", owner="recipe", note="names the run's folder unless files.run_dir is given"),
    Row(
        field="corpus",
        built=("data",),
        unspell=None,
        owner="recipe",
        note="decides which data module serves a NeMo run; Megatron reads indexed files",
    ),
    Row(
        field="files.run_dir",
        nemo=("log.explicit_log_dir",),
        spell=lambda run_dir, recipe: recipe.run_dir,
        flags=tuple(
            Spelling(flag=flag, value=lambda run_dir, recipe: recipe.run_dir)
            for flag in ("--save", "--load", "--tensorboard-dir")
        ),
        note="both resume from the folder if it holds a checkpoint",
    ),
    Row(
        field="files.data_path",
        nemo=("data.paths",),
        spell=lambda paths, recipe: list(paths),
        unspell=lambda paths: tuple(paths or ()),
        when=lambda recipe: recipe.corpus == "indexed" and bool(recipe.files.data_path),
        flags=(Spelling(flag="--data-path", read=DATA),),
    ),
    Row(
        field="files.split",
        nemo=("data.split",),
        when=lambda recipe: recipe.corpus == "indexed",
        flags=(Spelling(flag="--split", read=DATA),),
    ),
    Row(
        field="files.tokenizer_dir",
        nemo=("data.tokenizer_dir",),
        when=lambda recipe: bool(recipe.files.tokenizer_dir),
        flags=(
            Spelling(
                flag="--tokenizer-type",
                value=lambda folder, recipe: "HuggingFaceTokenizer",
                read=TOKENIZER,
            ),
            Spelling(flag="--tokenizer-model", read=TOKENIZER),
        ),
    ),
    Row(
        field="features.kernels",
        nemo=(f"{CONFIG}.required_packages",),
        spell=lambda kernels, recipe: GPU_PACKAGES if kernels == "required" else (),
        unspell=lambda packages: "required" if packages else "available",
        owner="recipe",
        note="Megatron's stock specs need Transformer Engine in any case",
    ),
    Row(
        field="features.kernels",
        nemo=(f"{CONFIG}.moe_grouped_gemm",),
        spell=lambda kernels, recipe: kernels == "required",
        unspell=None,
        owner="recipe",
        note="stock specs group the experts' products in any case; --moe-grouped-gemm is not read",
    ),
)

RUN_ROWS = (*PLACE_ROWS, *PARALLEL_ROWS, *RECOMPUTE_ROWS, *TRAINING_ROWS)
