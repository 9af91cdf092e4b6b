"""Which code runs M2RNN's scan, and why: chosen by device and by what is installed, or demanded.

- `triton`: kernels on a GPU
- `compiled`: C code on a CPU, built at first use
- `torch`: batched torch code, anywhere

The choice and its reason are logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal

logger = logging.getLogger(__name__)

PATHS = ("auto", "compiled", "torch", "triton")
# Widest V of a head whose loops are worth unrolling into one function.
WIDEST_COMPILED = 64
# Most values of a padded state that a GPU's registers hold, several times over, and widest V.
LARGEST_ON_CHIP, WIDEST_ON_CHIP = 4096, 64


def choose_path(demanded: str, like: Tensor, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """Return the path for a scan: `compiled`, `torch` or `triton`.

    Args:
        demanded: One of `PATHS`.
        like: Any input, for its device.
        dtype: What the arithmetic runs in.
        sizes: Sizes `K` and `V` of a head.

    Raises:
        RuntimeRefusal: There is no such path, or the demanded one cannot run.
    """
    if demanded not in PATHS:
        raise RuntimeRefusal(
            f"No way to run M2RNN is called {demanded!r}",
            given=f"path={demanded!r}",
            allowed=", ".join(PATHS),
            hint="path='auto' takes the fastest that can run",
        )
    device = like.device.type
    fast = {"cuda": "triton", "cpu": "compiled"}.get(device, "torch")
    wanted = fast if demanded == "auto" else demanded
    K, V = sizes["K"], sizes["V"]
    missing = {"compiled": _missing_for_compiled, "triton": _missing_for_triton}.get(wanted)
    reason = missing(device, dtype, K, V) if missing else None
    if reason is None:
        _announce(wanted, "demanded" if wanted == demanded else f"tensors on {device}")
        return wanted
    if demanded != "auto":
        raise RuntimeRefusal(
            f"M2RNN's {demanded} path cannot run here",
            given=f"path={demanded!r}: {reason}",
            allowed="path='auto' or 'torch'",
            hint="path='auto' takes the fastest that can run",
        )
    _announce("torch", f"not {wanted}: {reason}")
    return "torch"


def _missing_for_compiled(device: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Return why C code cannot run a scan, or None."""
    if device != "cpu":
        return f"the tensors are on {device}"
    if dtype != torch.float32:
        return f"it computes in fp32, not {dtype}"
    if V > WIDEST_COMPILED:
        return f"heads are {V} values wide, more than {WIDEST_COMPILED}"
    from megacpp_nemo.model.m2rnn_build import BuildError, library

    built = library(V)
    return str(built) if isinstance(built, BuildError) else None


def _missing_for_triton(device: str, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Return why the kernels cannot run a scan, or None."""
    if dtype != torch.float32:
        return f"it computes in fp32, not {dtype}"
    if not _triton_installed():
        return "triton is not installed"
    from megacpp_nemo.model.m2rnn_triton import INTERPRETED, padded

    if device != "cuda" and not INTERPRETED:
        return f"the tensors are on {device}, and triton compiles for GPUs"
    rows, columns = padded(K), padded(V)
    if rows * columns > LARGEST_ON_CHIP or columns > WIDEST_ON_CHIP:
        return (
            f"a state of {K} x {V}, {rows} x {columns} as the kernels hold it, exceeds "
            f"{LARGEST_ON_CHIP} values or {WIDEST_ON_CHIP} columns"
        )
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _announce(path: str, reason: str) -> None:
    """Log a choice, the first time it is made in this process."""
    logger.info("M2RNN runs by its %s path (%s)", path, reason)
