"""The release's stack, and its prediction layers, with the little that has to differ.

- without Transformer Engine the stack's final norm is a local one;
- with FP8 in expert layers only, the stack itself does not enter FP8;
- a prediction depth is a stack inside a layer and gets slots of its own.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.experts import without_fp8
from megacpp_nemo.model.norms import LocalRMSNorm

_PREDICTION_SLOTS = ("hybrid_submodules", "mamba_submodules")


# Upstream's stack in a type checker's eyes: these parts are always in front of one.
_Stack: Any = object


class LocalFinalNorm(_Stack):
    """A stack whose final norm is local: upstream's own is Transformer Engine's."""

    def __init__(
        self,
        config: Any,
        *args: Any,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **kwargs: Any,
    ) -> None:
        require_rms_norm(config)
        super().__init__(config, *args, post_layer_norm=False, post_process=post_process, **kwargs)
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = LocalRMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)


class ExpertsInFP8(_Stack):
    """A stack that enters FP8 in its expert layers only."""

    def __init__(self, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(without_fp8(config), experts_in_fp8(submodules, config), *args, **kwargs)


def stack_class(base: type, *, local: bool, fp8_experts: bool) -> type:
    """Return the release's stack class, changed only as far as asked."""
    parts = [*[ExpertsInFP8] * fp8_experts, *[LocalFinalNorm] * local]
    return type(base.__name__, (*parts, base), {"__doc__": base.__doc__}) if parts else base


def prediction_class(base: type, *, fp8_experts: bool) -> type:
    """Return the release's prediction layer, whose inner stack has slots of its own."""

    class PredictionLayer(base):  # type: ignore[misc, valid-type]
        """The release's prediction layer."""

        def __init__(self, config: Any, *args: Any, slots: Any, **kwargs: Any) -> None:
            if fp8_experts:
                slots, config = experts_in_fp8(slots, config), without_fp8(config)
            for name in _PREDICTION_SLOTS:
                if kwargs.get(name) is not None:
                    kwargs[name] = slots
            super().__init__(config, *args, **kwargs)

    PredictionLayer.__name__ = PredictionLayer.__qualname__ = base.__name__
    return PredictionLayer


def with_prediction(block: ModuleSpec, slots: Any, *, fp8_experts: bool) -> ModuleSpec:
    """Return a spec of prediction depths that are built from `slots`."""
    (layer,) = block.submodules.layer_specs
    layer = replace(
        layer,
        module=prediction_class(layer.module, fp8_experts=fp8_experts),
        params={**layer.params, "slots": slots},
    )
    return replace(block, submodules=replace(block.submodules, layer_specs=[layer]))


def experts_in_fp8(submodules: Any, config: Any) -> Any:
    """Return a stack's submodules whose expert layers enter FP8 by `config`."""
    slot = replace(submodules.moe_layer.params["slot"], fp8_config=config)
    return replace(submodules, moe_layer=slot.spec)


def require_rms_norm(config: Any) -> None:
    """Refuse another norm than the one local modules have.

    Raises:
        RuntimeRefusal: Naming the norm.
    """
    if config.normalization != "RMSNorm":
        raise RuntimeRefusal(
            "Without Transformer Engine the layers are built with RMSNorm",
            given=f"normalization={config.normalization!r}",
            allowed="--normalization RMSNorm, or a machine with Transformer Engine",
            hint="--normalization RMSNorm",
        )


def has_prediction(submodules: Any) -> bool:
    """Whether a release's stack can have prediction depths."""
    return any(item.name == "mtp_block_spec" for item in fields(submodules))
