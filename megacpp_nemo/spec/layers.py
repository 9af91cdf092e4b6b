"""The layers that this package builds in Megatron's stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_nemo.contract.shapes import RecurrentShape
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.spec_name import SpecName
from megacpp_nemo.model import blocks
from megacpp_nemo.model.blocks import Backend

RECURRENT = "model.recurrent."
CONV_WIDTH, CHUNK_SIZE = "model.mamba.conv_width", "model.mamba.chunk_size"


@dataclass(frozen=True, kw_only=True)
class OwnLayers:
    """Specs by role, with the settings that the name of a spec carries.

    Args:
        name: The name of the spec.
        backend: What to build from.
    """

    name: SpecName
    backend: Backend

    def spec(self, role: Role, config: Any) -> ModuleSpec:
        """Return the spec of this package's layer of a role."""
        return _MAKERS[role](self, config)

    def _latent(self, config: Any) -> ModuleSpec:
        return blocks.latent_attention_layer(self.backend, layernorm=config.qk_layernorm)

    def _mamba(self, config: Any) -> ModuleSpec:
        settings = self.name.settings
        return blocks.mamba_layer(
            self.backend, conv_width=settings[CONV_WIDTH], chunk_size=settings[CHUNK_SIZE]
        )

    def _recurrent(self, config: Any) -> ModuleSpec:
        return blocks.recurrent_layer(self.backend, recurrent_shape(self.name.settings))


def recurrent_shape(settings: Mapping[str, Any]) -> RecurrentShape:
    """Return the shape of R layers from the settings of a name."""
    sizes = {
        path.removeprefix(RECURRENT): value
        for path, value in settings.items()
        if path.startswith(RECURRENT)
    }
    return RecurrentShape(**sizes)


_MAKERS: dict[Role, Callable[[OwnLayers, Any], ModuleSpec]] = {
    Role.LATENT_ATTENTION: OwnLayers._latent,
    Role.MAMBA: OwnLayers._mamba,
    Role.RECURRENT: OwnLayers._recurrent,
}
BUILT = tuple(_MAKERS)
