"""A slot of the release's stack that builds each layer from the name of the spec.

The stack knows a slot by its symbol in the pattern. Which of its layers are this package's is
in the name; the rest are built from the release's own spec of the slot.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.spec_name import NamedLayer
from megacpp_nemo.model.experts import ExpertsLayer
from megacpp_nemo.model.recompute import FULL, run_again
from megacpp_nemo.spec.layers import RECOMPUTE, OwnLayers
from megacpp_nemo.spec.upstream import SLOT_OF_ROLE, global_number, layer_arguments


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One slot of a stack.

    Args:
        name: The slot's name among the stack's submodules.
        native: The release's own spec of it.
        layers: Every layer of the part of the model that the stack builds.
        part: The part, in words.
        own: Specs of this package's layers.
        fp8_config: Configuration of expert layers that enter FP8 by themselves; None where the
            stack decides.
    """

    name: str
    native: ModuleSpec | type
    layers: tuple[NamedLayer, ...]
    part: str
    own: OwnLayers
    fp8_config: Any = None

    @property
    def spec(self) -> ModuleSpec:
        """The slot as a spec for the release's stack.

        It carries the native spec's submodules, which some releases edit before they build.
        """
        submodules = getattr(self.native, "submodules", None)
        return ModuleSpec(module=SlotLayer, params={"slot": self}, submodules=submodules)

    def build(self, config: Any, number: int, submodules: Any, arguments: dict[str, Any]) -> Any:
        """Return the layer that stands at the `number` the stack gave it."""
        layer = self._built(config, number, submodules, arguments)
        if self.own.name.settings.get(RECOMPUTE) == FULL:
            run_again(layer)
        return layer

    def _built(self, config: Any, number: int, submodules: Any, arguments: dict[str, Any]) -> Any:
        place = global_number(config, number, arguments)
        layer = self._layer_at(place)
        if layer.custom:
            spec = self.own.spec(layer.role, config)
            return build_module(
                spec, config=config, **layer_arguments(spec.module, config, place, arguments)
            )
        self._check_native(layer, place)
        native = self.native
        if submodules is not None:
            native = replace(native, submodules=submodules)  # type: ignore[type-var]
        arguments["layer_number"] = number
        if layer.role is Role.EXPERTS and self.fp8_config is not None:
            return self._experts_in_fp8(native, place, arguments)
        return build_module(native, config=config, **arguments)

    def _experts_in_fp8(self, native: Any, place: int, arguments: dict[str, Any]) -> Any:
        if native.module is not MoETransformerLayer:
            raise LoweringError(
                "This release's expert layers are not of the class that can enter FP8 alone",
                given=f"{native.module.__name__} in {self.name}",
                allowed=MoETransformerLayer.__name__,
                hint="precision=bf16",
            )
        context = nullcontext()
        if self.fp8_config.fp8:
            context = get_fp8_context(self.fp8_config, place - 1, is_init=True)
        with context:
            return build_module(
                replace(native, module=ExpertsLayer), config=self.fp8_config, **arguments
            )

    def _layer_at(self, place: int) -> NamedLayer:
        if not 1 <= place <= len(self.layers):
            raise LoweringError(
                f"Megatron builds a layer of {self.part} that the name of the spec does not have",
                given=f"layer {place} of {self.part}; the name has {len(self.layers)}",
                allowed="the pattern and the spec of one lowering",
                hint="the whole command that megacpp lower prints",
            )
        return self.layers[place - 1]

    def _check_native(self, layer: NamedLayer, place: int) -> None:
        if SLOT_OF_ROLE.get(layer.role) != self.name:
            raise LoweringError(
                f"Megatron's pattern and the name of the spec disagree on layer {place} of "
                f"{self.part}",
                given=f"slot {self.name} for {layer.letter!r} ({layer.role.words})",
                allowed=f"slot {SLOT_OF_ROLE.get(layer.role)}",
                hint="the whole command that megacpp lower prints",
            )


class SlotLayer:
    """Stands in a stack's slot; building one returns the layer that belongs there."""

    def __new__(  # type: ignore[misc]
        cls,
        config: Any,
        slot: Slot,
        layer_number: int = 1,
        submodules: Any = None,
        **arguments: Any,
    ) -> Any:
        """Return the layer at `layer_number` of the slot's stack."""
        return slot.build(config, layer_number, submodules, arguments)
