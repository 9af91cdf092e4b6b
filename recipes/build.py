"""A recipe as NeMo's configuration: `to_nemo(recipe)` returns what `llm.pretrain` takes.

The frame says which classes a recipe is made of; every value is set from the correspondence
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nemo_run as run
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.lightning.pytorch.plugins.mixed_precision import MegatronMixedPrecision

from megacpp_nemo.callbacks.schedule import PlasticitySchedule
from megacpp_nemo.contract import HybridRecipe, Precision
from megacpp_nemo.contract.plasticity import Plasticity
from megacpp_nemo.data.module import CppDataModule, IndexedDataModule
from megacpp_nemo.host.checkpoint import LatestCheckpoints, LatestResume
from megacpp_nemo.host.progress import RunProgress, RunSummary
from megacpp_nemo.host.schedule import CosineSchedule
from megacpp_nemo.host.strategy import HybridStrategy
from megacpp_nemo.lowering.table import carried
from megacpp_nemo.model.config import HybridConfig
from megacpp_nemo.model.module import HybridModel

CORPORA = {"sources": CppDataModule, "indexed": IndexedDataModule}
ACTIVATIONS = {"gelu": F.gelu, "squared_relu": squared_relu, "swiglu": F.silu}


def to_nemo(recipe: HybridRecipe, *, log_dir: str | None = None) -> run.Partial:
    """Return the NeMo recipe: a `run.Partial` of `llm.pretrain` with every part configured.

    Args:
        recipe: What to train.
        log_dir: Folder of this run; `runs/NAME` if not given.
    """
    frame = _frame(recipe)
    if recipe.plasticity.on:
        frame.trainer.callbacks.append(schedule_of(recipe.plasticity.on))
    for path, value in carried(recipe).items():
        _set(frame, path, value)
    frame.model.config.activation_func = ACTIVATIONS[recipe.model.experts.activation]
    _set_precision(frame, recipe.precision)
    if log_dir is not None:
        frame.log.explicit_log_dir = str(log_dir)
    return frame


def schedule_of(levers: Iterable[str], **arguments: Any) -> run.Config:
    """Return the callback of levers: `PlasticitySchedule`, nothing set but what is given.

    Args:
        levers: Names of the levers that it is to have.
        arguments: Arguments of each of them.
    """
    kinds = {name: type(getattr(Plasticity(), name)) for name in levers}
    plasticity = {name: run.Config(kind, **arguments) for name, kind in kinds.items()}
    return run.Config(PlasticitySchedule, plasticity=run.Config(Plasticity, **plasticity))


def model_config(recipe: HybridRecipe) -> run.Config:
    """Return only the model of a recipe, as `run.Config[HybridModel]`."""
    return to_nemo(recipe).model


def _frame(recipe: HybridRecipe) -> run.Partial:
    return run.Partial(
        llm.pretrain,
        model=run.Config(HybridModel, config=run.Config(HybridConfig)),
        trainer=_trainer_frame(),
        data=run.Config(CORPORA[recipe.corpus]),
        optim=run.Config(
            MegatronOptimizerModule,
            config=run.Config(OptimizerConfig),
            lr_scheduler=run.Config(CosineSchedule),
        ),
        log=run.Config(
            nl.NeMoLogger,
            ckpt=run.Config(LatestCheckpoints),
            tensorboard=run.Config(TensorBoardLogger),
        ),
        resume=run.Config(LatestResume),
    )


def _trainer_frame() -> run.Config:
    return run.Config(
        nl.Trainer,
        strategy=run.Config(HybridStrategy, ddp=run.Config(DistributedDataParallelConfig)),
        callbacks=[run.Config(RunProgress), run.Config(RunSummary)],
    )


def _set_precision(frame: run.Partial, precision: Precision) -> None:
    full = precision is Precision.FP32
    dtype = torch.float32 if full else torch.bfloat16
    config, strategy = frame.model.config, frame.trainer.strategy
    config.params_dtype = config.pipeline_dtype = strategy.pipeline_dtype = dtype
    frame.optim.config.params_dtype = dtype
    if full:
        return
    frame.trainer.plugins = run.Config(
        MegatronMixedPrecision,
        precision="bf16-mixed",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )
    if precision is Precision.FP8_EXPERTS:
        frame.trainer.plugins.fp8 = "hybrid"
        frame.trainer.plugins.fp8_recipe = "tensorwise"


def _set(config: Any, path: str, value: Any) -> None:
    """Set a dotted path in a configuration whose inner configurations exist.

    The entry of a list is named by its class.
    """
    *parents, name = path.split(".")
    for parent in parents:
        if isinstance(config, list):
            config = next(entry for entry in config if entry.__fn_or_cls__.__name__ == parent)
        else:
            config = getattr(config, parent)
    setattr(config, name, value)
