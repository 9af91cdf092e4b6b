"""How a mixer of ours is saved: by logical parts, so that it moves between layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.ssm.mamba_mixer import _split_tensor_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn


def sharded_mixer_state(
    mixer: nn.Module,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
    *,
    fused: Mapping[str, tuple[Sequence[str], Sequence[int]]],
) -> dict[str, Any]:
    """Return a mixer's parameters as sharded tensors, the fused ones by their logical parts.

    Its own parameters, and those of its convolution, are split over the tensor ranks along their
    first dimension; its other modules know themselves how they are split.

    Args:
        mixer: A mixer with a `tp_group`.
        prefix: Megatron's, of the names.
        sharded_offsets: Megatron's.
        metadata: Megatron's.
        fused: By the name of a parameter, the names and this rank's sizes of the parts that it
            holds one after the other.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    group: Any = mixer.tp_group
    groups = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
    own: dict[str, Any] = {}
    mixer._save_to_state_dict(own, "", keep_vars=True)
    for name, module in mixer.named_children():
        if isinstance(module, nn.Conv1d):
            own.update(module.state_dict(prefix=f"{name}.", keep_vars=True))
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups
    )
    for name, module in mixer.named_children():
        if not isinstance(module, nn.Conv1d):
            part = sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group
            )
            state.update(part)
    for name, (names, sizes) in fused.items():
        key = f"{prefix}{name}"
        state[key] = _split_tensor_factory(state[key], list(sizes), list(names), 0)
    return state
