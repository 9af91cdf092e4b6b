"""Recipes' models built on the meta device, as any rank of a layout builds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megacpp_nemo.contract import HybridRecipe
from megacpp_nemo.host.cpu import RUNTIME
from megacpp_nemo.host.patching import Patches
from megacpp_nemo.lowering.table import carried
from megacpp_nemo.model.config import HybridConfig

CONFIG = "model.config."
# What this machine lacks, and what changes no parameter.
HERE = {
    "required_packages": (),
    "moe_grouped_gemm": False,
    "bf16": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "perform_initialization": False,
}


def config_of(recipe: HybridRecipe, **changes: Any) -> HybridConfig:
    """Return the configuration that NeMo would build a recipe's model from."""
    settings = {
        path.removeprefix(CONFIG): value
        for path, value in carried(recipe).items()
        if path.startswith(CONFIG)
    }
    dtypes = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    return HybridConfig(**{**settings, **dtypes, **HERE, **changes})


@contextlib.contextmanager
def rank_of(recipe: HybridRecipe, stage: int) -> Iterator[None]:
    """Be the first rank of a pipeline stage, among as many as the layout has, without them."""
    layout, patches, meta = recipe.parallelism, Patches(), torch.device("meta")
    ranks = layout.world_size // layout.pipeline_model_parallel_size
    environment = dict(os.environ)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=stage * ranks, world_size=layout.world_size
    )
    RUNTIME.install()
    patches.set(torch.cuda, "current_device", lambda: meta)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            expert_model_parallel_size=layout.expert_model_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        with torch.compiler.set_stance("force_eager"), meta:
            yield
    finally:
        patches.undo()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        RUNTIME.uninstall()
        os.environ.clear()
        os.environ.update(environment)


def build_stage(recipe: HybridRecipe, **changes: Any) -> nn.Module:
    """Return this rank's part of a recipe's model."""
    tokenizer = SimpleNamespace(vocab_size=recipe.model.embedding.vocab_size)
    return config_of(recipe, **changes).configure_model(tokenizer)
