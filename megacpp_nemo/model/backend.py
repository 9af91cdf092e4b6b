"""What layers are built from on this machine.

Transformer Engine's modules are used where it is installed and Megatron's local ones where
it is not; the fused Mamba mixer where its kernels are and the portable one where they are
not. Checkpoints use the names of the fused modules either way, so they move between machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

from megacpp_nemo.host import compat
from megacpp_nemo.model.mamba_paths import choose_path
from megacpp_nemo.model.norms import LocalRMSNorm

# Where a fused projection keeps the norm in front of it, in checkpoints.
FUSED_NORM_NAMES = {
    "self_attention.linear_qkv": {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    "self_attention.in_proj": {"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    "mlp.linear_fc1": {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    "mixer.in_proj": {"norm.": "mixer.in_proj.layer_norm_"},
}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What the specs are built from.

    Args:
        transformer_engine: Use Transformer Engine's modules.
        mamba: How Mamba-2 layers run: `fused`, `split` or `portable` (`mamba_paths`).
        reason: Why Mamba-2 layers run so.
    """

    transformer_engine: bool
    mamba: str
    reason: str = field(default="", compare=False)

    @classmethod
    def probe(
        cls, mamba_path: str = "auto", *, conv_width: int = 4, documents: bool = False
    ) -> Backend:
        """Return what this machine can run; the arguments are `choose_path`'s.

        Raises:
            RuntimeRefusal: If a Mamba path is demanded where it cannot run.
        """
        path = choose_path(mamba_path, conv_width=conv_width, documents=documents)
        engine = compat.transformer_engine_available()
        return cls(transformer_engine=engine, mamba=path.name, reason=path.reason)

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.modules}, {self.mamba} Mamba mixer{why}"

    @property
    def modules(self) -> str:
        """Whose modules stand outside of the mixers, in words."""
        return f"{'Transformer Engine' if self.transformer_engine else 'local'} modules"

    @property
    def provider(self) -> BackendSpecProvider:
        """Megatron's provider of linear layers and attention cores."""
        return TESpecProvider() if self.transformer_engine else LocalSpecProvider()

    @property
    def norm(self) -> type:
        """The norm that stands alone."""
        return self.provider.layer_norm() if self.transformer_engine else LocalRMSNorm
