"""The classes that a NeMo recipe is made of. Another in their place would train something else."""

from __future__ import annotations

from typing import NoReturn

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.leaves import Leaves, name_of, shown
from megacpp_nemo.lowering.schedules import SCHEDULE_CLASS, SCHEDULE_NODES, entry_of

ENTRY = "nemo.collections.llm.api.pretrain"
FINETUNE = "nemo.collections.llm.api.finetune"
# Data module by corpus.
DATA = {
    "megacpp_nemo.data.module.IndexedDataModule": "indexed",
    "megacpp_nemo.data.module.CppDataModule": "sources",
}
NODES = {
    "": ENTRY,
    "model": "megacpp_nemo.model.module.HybridModel",
    "model.config": "megacpp_nemo.model.config.HybridConfig",
    "trainer": "nemo.lightning.pytorch.trainer.Trainer",
    "trainer.strategy": "megacpp_nemo.host.strategy.HybridStrategy",
    "trainer.strategy.ddp": "megatron.core.distributed.distributed_data_parallel_config."
    "DistributedDataParallelConfig",
    "optim": "nemo.lightning.pytorch.optim.megatron.MegatronOptimizerModule",
    "optim.config": "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "optim.lr_scheduler": "megacpp_nemo.host.schedule.CosineSchedule",
    "log": "nemo.lightning.nemo_logger.NeMoLogger",
    "log.ckpt": "megacpp_nemo.host.checkpoint.LatestCheckpoints",
    "log.tensorboard": "lightning.pytorch.loggers.tensorboard.TensorBoardLogger",
    "resume": "megacpp_nemo.host.checkpoint.LatestResume",
}
# Only some recipes have these.
OPTIONAL_NODES = {
    "trainer.plugins": "nemo.lightning.pytorch.plugins.mixed_precision.MegatronMixedPrecision",
}
# Callbacks that only show a NeMo run's progress.
HOST_CALLBACKS = (
    "megacpp_nemo.host.progress.RunProgress",
    "megacpp_nemo.host.progress.RunSummary",
)
# What users know these by, and what to do instead.
ADVICE = {
    "trainer.callbacks": "the recipe without it: callbacks run in NeMo only, and of all of them "
    "a recipe knows the levers of PlasticitySchedule",
    "trainer.plugins": "precision='bf16', 'fp8' or 'fp32' as an argument of the recipe",
    "data": "indexed_files(paths=PREFIX, tokenizer_dir=FOLDER) of megacpp_nemo.recipes",
    "resume.restore_config": "the recipe without it: Megatron's script resumes from its own "
    "checkpoints only",
    "log.wandb": "the recipe without it: Megatron writes TensorBoard files",
}


def check_nodes(leaves: Leaves) -> None:
    """Check that a configuration is made of a recipe's classes, each in its place.

    Raises:
        LoweringError: If a class is not a recipe's, or one of the recipe's is missing.
    """
    for path, node in leaves.nodes.items():
        name = name_of(node)
        if name not in _allowed(path):
            _refuse(path, name)
    missing = [path for path in (*NODES, "data") if path not in leaves.nodes]
    if missing:
        raise LoweringError(
            "A part of the NeMo recipe is missing: " + ", ".join(missing),
            given=", ".join(
                f"{path}={shown(leaves.values[path])}" if path in leaves.values else f"no {path}"
                for path in missing
            ),
            allowed="a configuration of " + ", ".join(_allowed(missing[0])),
            hint=f"{missing[0]} of a recipe of megacpp_nemo.recipes, with only leaves overridden",
        )


def corpus_of(leaves: Leaves) -> str:
    """Return the corpus of a recipe whose nodes were checked."""
    return DATA[name_of(leaves.nodes["data"])]


def _allowed(path: str) -> tuple[str, ...]:
    if path == "data":
        return tuple(DATA)
    if entry := entry_of(path):
        below = entry[1]
        if not below:
            return (*HOST_CALLBACKS, SCHEDULE_CLASS)
        return (SCHEDULE_NODES[below],) if below in SCHEDULE_NODES else ()
    known = NODES | OPTIONAL_NODES
    return (known[path],) if path in known else ()


def _refuse(path: str, name: str) -> NoReturn:
    allowed = ", ".join(_allowed(path)) or "nothing at this path"
    if name == FINETUNE:
        raise LoweringError(
            "Fine-tuning has no counterpart on Megatron's command line: its script does not read "
            "the weights of a NeMo checkpoint",
            given=name,
            allowed=allowed,
            hint="the pretraining recipe of the same name",
        )
    if not path:
        raise LoweringError(
            "This is not a recipe's configuration",
            given=name,
            allowed=allowed,
            hint="megacpp_nemo.recipes.nam56r(), or another recipe of this package",
        )
    advice = next((text for begun, text in ADVICE.items() if path.startswith(begun)), None)
    raise LoweringError(
        f"{path} has no counterpart on Megatron's command line",
        given=f"{path}={name}",
        allowed=allowed,
        hint=advice or (f"{path} as the recipe makes it" if _allowed(path) else f"without {path}"),
    )
