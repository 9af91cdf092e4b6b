"""Mamba-3 on mamba-ssm's kernels: Triton for SISO, TileLang for MIMO.

- `machine_obstacle`: why this machine or a layer's shape rules the kernels out
- `call_obstacle`: why one call does, though the machine has them
- `no_kernels`, `state_once`: what is said of it, as an error and in the log
- `mamba3_kernels`: the call itself, with the arguments of `mamba3_chunked`

The kernels compute in bf16 with an fp32 state, on whole rows that start from nothing; everything
else is `mamba3_chunked`'s.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging

import torch
from packaging.version import Version
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.mixers import AuthorMambaShape

logger = logging.getLogger(__name__)
SEVERAL_DOCUMENTS = "its rows hold several documents"
FIRST_VERSION = Version("2.3.2")
# Newer ones give their Triton kernel one pipeline stage there; these corrupt its result silently.
WRONG_ON_BLACKWELL, BLACKWELL = Version("2.3.2.post1"), (10, 12)
MIMO_STATES, MIMO_WIDTHS, MIMO_RANKS = (16, 32, 64, 128, 256), (32, 64, 128), (2, 4, 8)


def machine_obstacle(shape: AuthorMambaShape) -> str | None:
    """Return why a layer of this shape cannot run on kernels here; None if it can."""
    return _machine(shape.mimo_rank > 1) or _shape(shape)


@functools.cache
def _machine(mimo: bool) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    for module in ("mamba_ssm", "tilelang")[: 1 + mimo]:
        if importlib.util.find_spec(module) is None:
            return f"{module.replace('_', '-')} is not installed"
    version = Version(importlib.metadata.version("mamba-ssm"))
    if version < FIRST_VERSION:
        return f"mamba-ssm {version} has no Mamba-3, which came with {FIRST_VERSION}"
    major, _ = torch.cuda.get_device_capability()
    if not mimo and version <= WRONG_ON_BLACKWELL and major in BLACKWELL:
        return f"mamba-ssm {version} computes wrong values on Blackwell devices"
    return None


def _shape(shape: AuthorMambaShape) -> str | None:
    widths, rank = (shape.state_dim, shape.head_dim), shape.mimo_rank
    if rank == 1:
        whole = all(width & (width - 1) == 0 for width in widths)
        return None if whole else f"state and head widths {widths} are not powers of two"
    if shape.state_dim not in MIMO_STATES or shape.head_dim not in MIMO_WIDTHS:
        return f"the MIMO kernel is not made for state and head widths {widths}"
    if rank not in MIMO_RANKS or shape.chunk_size < 8 or shape.chunk_size * rank > 64:
        return f"the MIMO kernel is not made for rank {rank} in chunks of {shape.chunk_size}"
    return None


def call_obstacle(
    x: Tensor, *, rank: int, chunk_size: int, documents: bool, carries_state: bool
) -> str | None:
    """Return why one call cannot run on kernels; None if it can.

    Args:
        x: Input [batch, seq, heads, head_dim].
        rank: 1 for SISO.
        chunk_size: Tokens per chunk.
        documents: Whether rows hold several documents.
        carries_state: Whether a state enters or is kept.
    """
    if documents:
        return SEVERAL_DOCUMENTS
    if carries_state:
        return "it carries its state from token to token"
    if x.dtype is not torch.bfloat16:
        return f"its inputs are {x.dtype}, and the kernels compute in bfloat16"
    if rank > 1 and x.size(1) % chunk_size:
        return f"{x.size(1)} tokens are no multiple of chunks of {chunk_size}"
    return None


def no_kernels(obstacle: str) -> RuntimeRefusal:
    """Return the refusal of a layer whose kernels are demanded and cannot run."""
    return RuntimeRefusal(
        f"The Mamba-3 kernels cannot run: {obstacle}",
        given="mamba_path='fused'",
        allowed="mamba_path='auto' or 'portable'",
        hint="mamba_path='auto', which uses the kernels wherever they can run",
    )


@functools.cache
def state_once(obstacle: str | None) -> None:
    """State in the log which path Mamba-3 layers take and why, once for each reason."""
    if obstacle is None:
        logger.info("Mamba-3 layers run on mamba-ssm's kernels")
    else:
        logger.info("Mamba-3 layers run in plain torch: %s", obstacle)


def mamba3_kernels(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    *,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    z: Tensor,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """Return the y of `mamba3_chunked` for whole rows, computed by mamba-ssm 2.3.2 or later."""
    by_head = {
        "ADT": (A.float() * dt.float()).transpose(1, 2).contiguous(),
        "DT": dt.float().transpose(1, 2).contiguous(),
        "Trap": trap.transpose(1, 2).contiguous(),
        "Angles": angles.float().unsqueeze(2).expand(-1, -1, x.size(2), -1).contiguous(),
        "V": x.contiguous(),
        "Z": z.contiguous(),
        "D": D.float(),
        "chunk_size": chunk_size,
    }
    if mimo_x is None:
        from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

        y = mamba3_siso_combined(
            Q=C.squeeze(2).contiguous(),
            K=B.squeeze(2).contiguous(),
            Q_bias=C_bias.float().squeeze(1),
            K_bias=B_bias.float().squeeze(1),
            **by_head,
        )
    else:
        from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo

        assert mimo_z is not None
        assert mimo_o is not None
        y = mamba3_mimo(
            Q=C.contiguous(),
            K=B.contiguous(),
            Q_bias=C_bias.float(),
            K_bias=B_bias.float(),
            MIMO_V=mimo_x.float(),
            MIMO_Z=mimo_z.float(),
            MIMO_Out=mimo_o.float(),
            # The state's width over the number of pairs that turn, each of them twice.
            rotary_dim_divisor=B.size(-1) // angles.size(-1),
            dtype=x.dtype,
            **by_head,
        )
    return y.to(x.dtype)
