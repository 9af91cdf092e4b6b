"""Which of the three ways a Mamba-2 layer runs, and why.

- `fused`: convolution and scan in one kernel of mamba-ssm, which calls causal-conv1d's
- `split`: convolution, scan, norm and projection apart; the scan in mamba-ssm's kernel, the
  convolution in causal-conv1d's where that is installed
- `portable`: plain torch

All have the same parameters under the same names. `auto` takes the first that can run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.ssm.mamba_mixer import _check_mamba_sequence_packing_support

from megacpp_nemo.contract.errors import RuntimeRefusal, lookup
from megacpp_nemo.contract.training import MAMBA_PATHS
from megacpp_nemo.host.preflight import missing_packages

FUSED, SPLIT, PORTABLE = "fused", "split", "portable"
# Taps that causal-conv1d's kernels are made for.
KERNEL_TAPS = (2, 3, 4)


class MambaPath(NamedTuple):
    """A way to run a Mamba-2 layer.

    Args:
        name: `fused`, `split` or `portable`.
        reason: Why this one, as the log says it.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_path(
    demanded: str = "auto", *, conv_width: int = 4, documents: bool = False
) -> MambaPath:
    """Return the way that layers of these taps run on this machine.

    Args:
        demanded: A path, or `auto`.
        conv_width: Taps of the layers' convolution.
        documents: Whether the state starts anew at each document of a row, for which the fused
            kernel needs recent packages.

    Raises:
        RuntimeRefusal: If there is no such path, or a demanded one cannot run here.
    """
    lookup(
        {path: path for path in MAMBA_PATHS},
        demanded,
        what=f"No way to run the Mamba layers is called {demanded!r}",
        field="mamba_path",
        error=RuntimeRefusal,
    )
    obstacles = {FUSED: _fused_needs(conv_width, documents), SPLIT: _split_needs(), PORTABLE: []}
    if demanded == "auto":
        name = next(path for path, needs in obstacles.items() if not needs)
        ruled_out = [f"{path} needs {', '.join(obstacles[path])}" for path in _before(name)]
        return MambaPath(name, "; ".join(ruled_out) or "its kernels are installed")
    if needs := obstacles[demanded]:
        raise RuntimeRefusal(
            f"The {demanded} Mamba path cannot run here",
            given=f"mamba_path={demanded!r} without {', '.join(needs)}",
            allowed=" or ".join(repr(p) for p in MAMBA_PATHS if not obstacles.get(p)),
            hint="mamba_path='auto', or the 'gpu' extra on a CUDA machine",
        )
    return MambaPath(demanded, "demanded")


def kernel_convolution(conv_width: int) -> bool:
    """Whether causal-conv1d can convolve with these taps here."""
    return not missing_packages(("causal_conv1d",)) and conv_width in KERNEL_TAPS


def _before(name: str) -> list[str]:
    order = [FUSED, SPLIT, PORTABLE]
    return order[: order.index(name)]


def _fused_needs(conv_width: int, documents: bool) -> list[str]:
    """Return what the fused path lacks."""
    needs = missing_packages(("mamba_ssm", "causal_conv1d")) + _device()
    if conv_width not in KERNEL_TAPS:
        needs.append(f"a convolution of {KERNEL_TAPS[0]} to {KERNEL_TAPS[-1]} taps")
    if documents and not needs:
        try:
            takes, why = _check_mamba_sequence_packing_support(for_inference_not_training=False)
        except ImportError as error:
            takes, why = False, f"packages that can be imported ({error})"
        needs += [] if takes else [why or "packages that know documents"]
    return needs


def _split_needs() -> list[str]:
    return missing_packages(("mamba_ssm",)) + _device()


def _device() -> list[str]:
    return [] if torch.cuda.is_available() else ["a CUDA device"]
