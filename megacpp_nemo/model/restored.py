"""A trained model, built again on one process from a run's checkpoint.

However many processes trained it, it is whole here: Megatron's checkpoints hold whole tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from nemo.lightning.io import load_context
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megacpp_nemo.contract.errors import DataError, MegaCppError, RuntimeRefusal
from megacpp_nemo.contract.pattern import LayerPattern
from megacpp_nemo.data.checks import load_tokenizer
from megacpp_nemo.host import compat
from megacpp_nemo.host.cpu import CUDA_FUSIONS
from megacpp_nemo.host.groups import one_process
from megacpp_nemo.model.config import HybridConfig

# What a run had for its processes, its speed or its memory, and the weights do not depend on.
ALONE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "fp8": None,
    "recompute_granularity": None,
    "cuda_graph_impl": "none",
    "required_packages": (),
    "mamba_path": "portable",
    "moe_token_dispatcher_type": "alltoall",
    "moe_enable_deepep": False,
    # With a capacity, what a token's experts do would depend on the tokens beside it.
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "gradient_accumulation_fusion": False,
}
PREFIX, EMBEDDING = "module.", "embedding.word_embeddings.weight"
# Names that an error lists.
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A trained model and what it reads and writes.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, as NeMo wraps it.
        config: Its configuration.
        folder: The checkpoint `step=N` it came from.
    """

    model: nn.Module
    tokenizer: Any
    config: HybridConfig
    folder: Path


@contextlib.contextmanager
def restored(folder: Path) -> Iterator[Restored]:
    """Have the model of a checkpoint on this process, on CUDA where it is.

    Its parallel groups, of size 1, end with the context.

    Args:
        folder: Checkpoint `step=N`, complete.

    Raises:
        RuntimeRefusal: If it is no hybrid model's, or its weights are not its configuration's.
        DataError: If its tokenizer is missing or unusable.
    """
    compat.install()
    config = saved_config(folder)
    tokenizer = _tokenizer(folder)
    with one_process(), torch.no_grad():
        model = config.configure_model(tokenizer, pre_process=True, post_process=True)
        model.cuda()
        _load(model, folder)
        yield Restored(model=model.eval(), tokenizer=tokenizer, config=config, folder=folder)


def saved_config(folder: Path) -> HybridConfig:
    """Return the configuration of a checkpoint's model, for one process.

    Raises:
        RuntimeRefusal: If it cannot be read, or is no hybrid model's.
    """
    try:
        saved = load_context(folder / "context", subpath="model.config", build=False)
    except Exception as error:
        raise _other(folder, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if not isinstance(saved, fdl.Config) or fdl.get_callable(saved) is not HybridConfig:
        kind = fdl.get_callable(saved) if isinstance(saved, fdl.Config) else type(saved)
        raise _other(folder, f"a configuration of the kind {kind.__qualname__}")
    pattern = LayerPattern.parse(saved.hybrid_override_pattern).tile(saved.num_layers)
    # Where pipeline stages begin is the layout's, which is another here.
    saved.hybrid_override_pattern = str(LayerPattern.of(pattern.layers))
    fusions = {} if torch.cuda.is_available() else dict.fromkeys(CUDA_FUSIONS, False)
    for name, value in {**ALONE, **fusions, **_as_stored(folder)}.items():
        setattr(saved, name, value)
    try:
        config: HybridConfig = fdl.build(saved)
    except MegaCppError:
        raise
    except Exception as error:
        raise _other(folder, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return config


def _as_stored(folder: Path) -> dict[str, Any]:
    """Return the settings that the stored tensors decide.

    The vocabulary was padded for the layout that the model was trained in. Weights are computed
    with in their own type on CUDA, and in fp32 on a CPU.
    """
    embedding = _tensors(folder).get(EMBEDDING)
    if embedding is None:
        raise _other(folder, f"no {EMBEDDING} in its weights")
    half = torch.cuda.is_available() and embedding.dtype is torch.bfloat16
    dtype = torch.bfloat16 if half else torch.float32
    return {
        "make_vocab_size_divisible_by": embedding.global_shape[0],
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": half,
    }


def _tensors(folder: Path) -> dict[str, Any]:
    """Return what is known of the tensors in a checkpoint's weights, by name."""
    try:
        tensors = dist_checkpointing.load_tensors_metadata(str(folder / "weights"))
    except Exception as error:
        raise _unreadable(folder, error) from error
    return {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}


def _load(model: nn.Module, folder: Path) -> None:
    """Fill a model's parameters from a checkpoint.

    Raises:
        RuntimeRefusal: If the weights are not those of the model, or cannot be read.
    """
    _check_same(model, folder)
    try:
        loaded = dist_checkpointing.load(_sharded(model), str(folder / "weights"))
    # Torch's own is no Exception, so that nothing catches it by chance.
    except (Exception, CheckpointException) as error:
        raise _unreadable(folder, error) from error
    # With what else the run stored: its progress, its optimizer's settings.
    own = {name: value for name, value in loaded.items() if name.startswith(PREFIX)}
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in own.items()})


def _sharded(model: nn.Module) -> dict[str, Any]:
    sharded: dict[str, Any] = model.sharded_state_dict(prefix=PREFIX)  # type: ignore[operator]
    return sharded


def _check_same(model: nn.Module, folder: Path) -> None:
    """Refuse weights that are not those of the model, by their names and shapes."""
    wanted = _sharded(model)
    apply_factories(wanted)
    tensors = [item for item in nested_values(wanted) if isinstance(item, ShardedTensor)]
    mine = {item.key.removeprefix(PREFIX): tuple(item.global_shape) for item in tensors}
    theirs = {name: tuple(item.global_shape) for name, item in _tensors(folder).items()}
    other = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if other:
        shown = [f"{name} {_shape(theirs.get(name))}" for name in other[:SHOWN]]
        raise RuntimeRefusal(
            "The weights of this checkpoint are those of another model than its configuration",
            given=f"{', '.join(shown)}; {len(other)} differ",
            allowed=", ".join(f"{name} {_shape(mine.get(name))}" for name in other[:SHOWN]),
            hint="weights and context of the same run",
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else " x ".join(map(str, shape))


def _tokenizer(folder: Path) -> Any:
    own = folder / "context" / "tokenizer"
    if not own.is_dir():
        raise DataError(
            "The checkpoint has no copy of its tokenizer",
            given=f"no folder {own}",
            allowed="'tokenizer' in the checkpoint's 'context', which a run puts there",
            hint="a copy of the tokenizer that the model was trained with, in that folder",
        )
    return load_tokenizer(own)


def _other(folder: Path, given: str) -> RuntimeRefusal:
    return RuntimeRefusal(
        "This checkpoint is not of a model that is built here",
        given=f"{folder}: {given}",
        allowed="a checkpoint of a hybrid model, with its configuration in 'context'",
        hint="a run of one of these recipes, such as runs/nam56r_tiny",
    )


def _unreadable(folder: Path, error: BaseException) -> RuntimeRefusal:
    return RuntimeRefusal(
        "The weights of this checkpoint cannot be read",
        given=f"{folder / 'weights'}: {type(error).__name__}: {error}".splitlines()[0],
        allowed="weights as a run writes them",
        hint="another checkpoint of the run",
    )
