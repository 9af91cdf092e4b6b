"""The input embedding's copy on the last pipeline stage, kept equal to the first stage's.

The prediction depths read what the first stage reads. Megatron keeps the two word embeddings
equal; this does it for the n-gram memory and the structure embedding:

- `tie`: equal at first, and marked for Megatron's optimizer.
- `with_copies`: Megatron's end of a backward pass, and the sum of both stages' gradients.
- `refuse_drift`: no training without it.
- `as_replicas`: the copy in a checkpoint, which has one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal

# Parts of the input embedding that Megatron does not know of.
MEMORY, STRUCTURE = "ngram_hash", "structure"
# Registered in this order. Megatron's buffers begin with the last parameter, and the state of the
# distributed optimizer cannot be saved where one with a bucket of its own comes after one whose
# size is no multiple of 64, as the scale of the structure channels.
ORDER = (STRUCTURE, MEMORY, "word_embeddings")


def order_parts(embedding: nn.Module) -> None:
    """Register the parts of an input embedding in the order that can be saved."""
    for name in ORDER:
        if name in embedding._modules:
            embedding._modules[name] = embedding._modules.pop(name)


def tie(embedding: nn.Module, group: Any, *, copy: bool) -> None:
    """Make the copy of an input embedding equal to the first stage's, and mark both.

    Collective over the stages that have one.

    Args:
        embedding: `InputEmbedding` of this stage.
        group: Megatron's embedding group, whose first rank is the first stage.
        copy: Whether this stage's is the copy.
    """
    first = torch.distributed.get_process_group_ranks(group)[0]
    for weight in tied_parameters(embedding):
        weight.data = weight.data.cuda()
        torch.distributed.broadcast(weight.data, first, group=group)
        if copy:
            weight.shared = True  # type: ignore[attr-defined]
    for weight in _parameters(embedding, MEMORY):
        # A bucket of its own: data-parallel ranks of both stages then have the same parts of it.
        # The structure embedding is too small: a rank without a part could not be saved.
        weight.shared_embedding = True  # type: ignore[attr-defined]


def tied_parameters(embedding: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of an input embedding that Megatron does not tie, in one order."""
    return [*_parameters(embedding, MEMORY), *_parameters(embedding, STRUCTURE)]


def with_copies(finalize: Callable[..., None]) -> Callable[..., None]:
    """Return Megatron's `finalize_model_grads`, after which the stages' gradients are summed.

    Gradients are then divided already where the loss is per token: by one number on all stages.

    Args:
        finalize: Megatron's function, or one with its arguments.
    """

    @functools.wraps(finalize)
    def finalize_model_grads(model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        for chunk in model:
            sum_gradients(chunk)

    finalize_model_grads.sums_copies = True  # type: ignore[attr-defined]
    return finalize_model_grads


def refuse_drift(model: Any) -> None:
    """Refuse to train where nothing would keep the copies equal.

    Args:
        model: A pipeline stage of a hybrid model whose inputs are tied.

    Raises:
        RuntimeRefusal: If gradients are finished by another function than `with_copies` makes.
    """
    config = model.config
    finalize = config.finalize_model_grads_func
    ours = config.ngram_hash or config.structure
    if not ours or finalize is None or getattr(finalize, "sums_copies", False):
        return
    raise RuntimeRefusal(
        "The copies of the input embedding would drift apart: nothing sums their gradients",
        given="n-gram memory or structure channels, prediction depths on another pipeline stage, "
        "and a strategy that does not know of them",
        allowed="HybridStrategy, or a finalize_model_grads_func from tied.with_copies",
        hint="megacpp_nemo.host.strategy.HybridStrategy in place of MegatronStrategy",
    )


def sum_gradients(chunk: nn.Module) -> None:
    """Sum the gradients of the copies over the stages that have one.

    Args:
        chunk: One pipeline stage of a hybrid model in its wrappers, after the gradients were
            reduced over data-parallel ranks.
    """
    stage: Any = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    if not getattr(stage, "has_tied_inputs", False):
        return
    for weight in _trained(stage.embedding, MEMORY):
        torch.distributed.all_reduce(_gradient(weight), group=stage.embd_group)
    small = _trained(stage.embedding, STRUCTURE)
    if small:
        flat = torch.cat([_reduced(chunk, weight).flatten() for weight in small])
        torch.distributed.all_reduce(flat, group=stage.embd_group)
        for weight, whole in zip(small, flat.split([w.numel() for w in small]), strict=True):
            _gradient(weight).copy_(whole.view_as(weight))


def _reduced(chunk: Any, weight: nn.Parameter) -> Tensor:
    """Return a gradient reduced over data-parallel ranks, `[...]` as the weight.

    With the distributed optimizer each rank has a part of it reduced, and which one differs
    between the stages for parameters without a bucket of their own.
    """
    gradient = _gradient(weight)
    if not (hasattr(weight, "main_grad") and chunk.ddp_config.use_distributed_optimizer):
        return gradient
    (buffer,) = (each for each in chunk.buffers if weight in each.param_index_map)
    begin, _, number = buffer.param_index_map[weight]
    bucket, group = buffer.buckets[number], buffer.data_parallel_group
    size = bucket.grad_data.numel() // group.size()
    own = bucket.offset + group.rank() * size - begin
    part = torch.zeros_like(gradient).flatten()
    mine = slice(max(own, 0), max(own + size, 0))
    part[mine] = gradient.flatten()[mine]
    torch.distributed.all_reduce(part, group=group)
    return part.view_as(gradient)


def as_replicas(state: dict[str, Any], prefix: str) -> None:
    """Make the copy's tensors in a sharded state replicas of the first stage's, in place.

    Args:
        state: Sharded state of the last stage.
        prefix: Of the embedding's keys.
    """
    kept = tuple(f"{prefix}{name}." for name in (MEMORY, STRUCTURE))
    copies = {key: part for key, part in state.items() if key.startswith(kept)}
    for part in nested_values(copies):
        # Tensor ranks and data-parallel ranks stay told apart as they are on the first stage.
        part.replica_id = (1, *part.replica_id[1:])


def _parameters(embedding: nn.Module, part: str) -> list[nn.Parameter]:
    module = getattr(embedding, part)
    return [] if module is None else list(module.parameters())


def _trained(embedding: nn.Module, part: str) -> list[nn.Parameter]:
    return [weight for weight in _parameters(embedding, part) if weight.requires_grad]


def _gradient(weight: nn.Parameter) -> Tensor:
    gradient: Any = weight.main_grad if hasattr(weight, "main_grad") else weight.grad
    return gradient  # type: ignore[no-any-return]
