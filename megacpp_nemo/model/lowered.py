"""The model that a lowered command line describes, built as Megatron's entry script would."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import __version__ as installed
from megatron.core.transformer.spec_utils import import_module
from torch import nn

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.host.groups import one_process
from megacpp_nemo.host.patching import Patches
from megacpp_nemo.lowering.arguments import Arguments, parse
from megacpp_nemo.lowering.lower import Lowering
from megacpp_nemo.lowering.releases import Release, load_release
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.seams import SEAMS
from megacpp_nemo.lowering.spec_name import SPEC_MODULE, NamedLayer, SpecName
from megacpp_nemo.model.backend import Backend
from megacpp_nemo.model.flags import MODEL_FLAGS, configuration
from megacpp_nemo.model.mamba_paths import FUSED
from megacpp_nemo.model.proof import Claim
from megacpp_nemo.spec.build import stack_spec
from megacpp_nemo.spec.layers import (
    CHUNK_SIZE,
    CONV_WIDTH,
    RECURRENT,
    author_mamba_shape,
    recurrent_shape,
    sparse_attention_shape,
)
from megacpp_nemo.spec.upstream import adapt, model_class

LARGE_HIDDEN_SIZE = 1024
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class LoweredModel:
    """A lowering, read back as a model.

    Args:
        lowering: The lowering.
        release: Its release.
        arguments: Its argument vector, as the release's parser reads it.
    """

    lowering: Lowering
    release: Release
    arguments: Arguments

    @classmethod
    def of(cls, lowering: Lowering, release: str) -> LoweredModel:
        """Return the model of a lowering to the installed release.

        Raises:
            LoweringError: If another release is installed.
        """
        known = load_release(release)
        if known.package_version != installed:
            raise LoweringError(
                "A lowering is proven by the release it is for, and another one is installed",
                given=f"release {known.name} (megatron-core {known.package_version}); "
                f"{installed} is installed",
                allowed=f"megatron-core {known.package_version}",
                hint="another release, or a process with that Megatron-LM first on its path",
            )
        return cls(lowering=lowering, release=known, arguments=parse(lowering.argv, known))

    @property
    def name(self) -> SpecName | None:
        """What the spec's name says; None for the release's stock spec."""
        module, name = self.arguments["--spec"]
        return SpecName.parse(name) if module == SPEC_MODULE else None

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What the lowering says of the main pattern."""
        return self._claims(self.lowering.layers)

    @property
    def prediction_claims(self) -> tuple[Claim, ...]:
        """What it says of one prediction depth."""
        return self._claims(self.lowering.prediction)

    def _claims(self, layers: Any) -> tuple[Claim, ...]:
        return tuple(
            Claim(
                number=layer.number,
                role=layer.role,
                custom=not layer.native,
                owner=layer.owner if layer.native else SEAMS[layer.owner].owner,
                sizes=self._sizes(layer),
            )
            for layer in layers
        )

    def _sizes(self, layer: Any) -> Mapping[str, Any]:
        settings = self.name.settings if self.name else {}
        if layer.role is Role.MAMBA:
            widths = {"d_conv": (CONV_WIDTH, 4), "chunk_size": (CHUNK_SIZE, 128)}
            return {
                name: stock if layer.native else settings[path]
                for name, (path, stock) in widths.items()
            }
        if layer.role is Role.SPARSE_ATTENTION and not layer.native:
            return {"indexer_shape": sparse_attention_shape(settings)}
        if layer.role is Role.AUTHOR_MAMBA:
            return {"shape": author_mamba_shape(settings)}
        if layer.role is Role.RECURRENT and any(path.startswith(RECURRENT) for path in settings):
            return {"shape": recurrent_shape(settings)}
        return {}

    @contextlib.contextmanager
    def built(self, *, meta: bool | None = None) -> Iterator[nn.Module]:
        """Build the model on one process; its groups end with the context.

        Args:
            meta: Build without memory for the weights; by default, if the model is not small.
        """
        config = configuration(self.arguments, self.release, len(self.lowering.layers))
        meta = config.hidden_size >= LARGE_HIDDEN_SIZE if meta is None else meta
        with one_process(), _same_environment(), _on_meta() if meta else contextlib.nullcontext():
            adapt()
            yield self._model(config)

    def _model(self, config: Any) -> nn.Module:
        model = model_class()
        later = model.__name__ == "HybridModel"
        words = {
            place: self.arguments[flag]
            for flag, place in MODEL_FLAGS.items()
            if flag in self.arguments
        }
        # Read by the entry script as the name of the stages' own counts; one process has one.
        for place in ("hybrid_layer_pattern", "hybrid_override_pattern"):
            if place in words:
                words[place] = words[place].replace("|", "")
        spec = self._spec()
        built: nn.Module = model(
            config=config,
            **{"hybrid_stack_spec" if later else "mamba_stack_spec": spec},
            vocab_size=VOCABULARY,
            share_embeddings_and_output_weights=(
                "--untie-embeddings-and-output-weights" not in self.arguments
            ),
            **words,
        )
        return built

    def _spec(self) -> Any:
        """Return the spec that the command line names."""
        backend = Backend.probe()
        if self.name is None and not (backend.transformer_engine and backend.mamba == FUSED):
            # The stock spec cannot be built here; ours can, with every layer the release's.
            layers, mtp = (
                tuple(NamedLayer(layer.role, False) for layer in part)
                for part in (self.lowering.layers, self.lowering.prediction)
            )
            return stack_spec(SpecName(layers=layers, mtp=mtp), backend)
        return import_module(tuple(self.arguments["--spec"]))  # type: ignore[arg-type]


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Keep the attention kernels that Megatron's model writes to the environment to this model.

    It refuses to be built where another model has chosen others.
    """
    before = dict(os.environ)
    for name in ATTENTION_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Put new parameters on the meta device, also those that Megatron puts on CUDA's."""
    patches, meta = Patches(), torch.device("meta")
    patches.set(torch.cuda, "current_device", lambda: meta)
    try:
        with meta:
            yield
    finally:
        patches.undo()
