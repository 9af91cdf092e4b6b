"""The layers that this package builds in Megatron's stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_nemo.contract.shapes import AuthorMambaShape, RecurrentShape, SparseAttentionShape
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.spec_name import SpecName
from megacpp_nemo.model import attention_blocks, blocks
from megacpp_nemo.model.backend import Backend
from megacpp_nemo.model.mamba_paths import choose_path

AUTHOR_MAMBA, RECURRENT = "model.author_mamba.", "model.recurrent."
SPARSE_ATTENTION = "model.sparse_attention."
CONV_WIDTH, CHUNK_SIZE = "model.mamba.conv_width", "model.mamba.chunk_size"
MAMBA_PATH = "features.mamba_path"
RECOMPUTE = "parallelism.recompute"


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
        return attention_blocks.latent_attention_layer(self.backend, layernorm=config.qk_layernorm)

    def _sparse(self, config: Any) -> ModuleSpec:
        shape = sparse_attention_shape(self.name.settings)
        return attention_blocks.sparse_attention_layer(
            self.backend, shape, layernorm=config.qk_layernorm
        )

    def _mamba(self, config: Any) -> ModuleSpec:
        settings, backend = self.name.settings, self.backend
        if demanded := settings.get(MAMBA_PATH):
            path = choose_path(demanded, conv_width=settings[CONV_WIDTH])
            backend = replace(backend, mamba=path.name, reason=path.reason)
        return blocks.mamba_layer(
            backend, conv_width=settings[CONV_WIDTH], chunk_size=settings[CHUNK_SIZE]
        )

    def _author_mamba(self, config: Any) -> ModuleSpec:
        shape, path = author_mamba_shape(self.name.settings), self.name.settings.get(MAMBA_PATH)
        return blocks.author_mamba_layer(self.backend, shape, path=path or "auto")

    def _recurrent(self, config: Any) -> ModuleSpec:
        return blocks.recurrent_layer(self.backend, recurrent_shape(self.name.settings))


def recurrent_shape(settings: Mapping[str, Any]) -> RecurrentShape:
    """Return the shape of R layers from the settings of a name."""
    return RecurrentShape(**_below(RECURRENT, settings))


def sparse_attention_shape(settings: Mapping[str, Any]) -> SparseAttentionShape:
    """Return the shape of D layers from the settings of a name; its letters say which they are."""
    return SparseAttentionShape(a_ranks=(), **_below(SPARSE_ATTENTION, settings))


def author_mamba_shape(settings: Mapping[str, Any]) -> AuthorMambaShape:
    """Return the shape of M layers of the authored lane from the settings of a name."""
    return AuthorMambaShape(**_below(AUTHOR_MAMBA, settings))


def _below(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path.removeprefix(prefix): value
        for path, value in settings.items()
        if path.startswith(prefix)
    }


_MAKERS: dict[Role, Callable[[OwnLayers, Any], ModuleSpec]] = {
    Role.LATENT_ATTENTION: OwnLayers._latent,
    Role.SPARSE_ATTENTION: OwnLayers._sparse,
    Role.MAMBA: OwnLayers._mamba,
    Role.AUTHOR_MAMBA: OwnLayers._author_mamba,
    Role.RECURRENT: OwnLayers._recurrent,
}
BUILT = tuple(_MAKERS)
