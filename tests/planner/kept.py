"""What autograd keeps of a small model's forward pass, by piece of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megacpp_nemo.contract import HybridRecipe, Precision, recipe
from megacpp_nemo.host.cpu import CUDA_FUSIONS
from megacpp_nemo.planner.pieces import pieces
from tests.model.building import megatron
from tests.planner.building import build_stage

OUTSIDE = "outside of the layers"
SMALL: dict[str, Any] = {
    "model.seq_length": 96,
    "batch.micro_batch_size": 2,
    "batch.global_batch_size": 4,
    "features.reset_state": False,
    "model.embedding.vocab_size": 512,
}
BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}


def small(pattern: str, **changes: Any) -> HybridRecipe:
    """Return a recipe that a CPU runs in milliseconds; `__` stands for `.` in changes."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    depth = len(pattern.replace("|", ""))
    sparse = {"model.sparse_attention.a_ranks": ()} if "D" in pattern else {}
    base = {"pattern": pattern, "depth": depth, **SMALL, **sparse}
    return recipe("nam56r_tiny", changes={**base, **named})


def groups_of(intent: HybridRecipe) -> Any:
    """Return Megatron's parallel groups of a recipe, over this process and its peers."""
    layout = intent.parallelism
    return megatron(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )


def settings_of(intent: HybridRecipe) -> dict[str, Any]:
    """Return what makes a recipe's configuration run here: precision, and no CUDA fusions."""
    half = {} if intent.precision is Precision.FP32 else BF16
    return {"perform_initialization": True, **dict.fromkeys(CUDA_FUSIONS, False), **half}


class Kept:
    """Bytes of storages that autograd keeps, each counted once where it is first kept."""

    def __init__(self, model: nn.Module, places: Iterable[str]) -> None:
        owned = (*model.parameters(), *model.buffers())
        self.bytes: dict[str, int] = {}
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in owned}
        # A storage that is freed would lend its address to the next.
        self._alive: list[Tensor] = []
        self._place = OUTSIDE
        modules = dict(model.named_modules())
        self._hooks = []
        for name in places:
            if name in modules:
                self._hooks.append(modules[name].register_forward_pre_hook(self._enter(name)))
                self._hooks.append(modules[name].register_forward_hook(self._leave))

    def __enter__(self) -> Kept:
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._saving.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str) -> Any:
        def enter(*_: Any) -> None:
            self._place = name

        return enter

    def _leave(self, *_: Any) -> None:
        self._place = OUTSIDE

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address and address not in self._seen:
            self._seen.add(address)
            self._alive.append(tensor)
            self.bytes[self._place] = self.bytes.get(self._place, 0) + size
        return tensor


def layer_names(intent: HybridRecipe) -> list[str]:
    """Return the modules of a recipe's layers by name."""
    return [piece.prefix.rstrip(".") for piece in pieces(intent) if piece.family is not None]


def kept_bytes(intent: HybridRecipe, **settings: Any) -> dict[str, int]:
    """Return the bytes that a model keeps of one micro-batch, by layer, and outside of them."""
    torch.manual_seed(0)
    with groups_of(intent):
        model = build_stage(intent, **{**settings_of(intent), **settings})
        shape = intent.batch.micro_batch_size, intent.model.seq_length
        tokens = torch.randint(0, intent.model.embedding.vocab_size, shape)
        positions = torch.arange(shape[1]).expand(shape)
        with Kept(model, layer_names(intent)) as kept, contextlib.suppress(StopIteration):
            model(tokens, positions, None, labels=tokens)
    return kept.bytes
