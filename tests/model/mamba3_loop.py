"""Mamba-3 written as a loop over heads and tokens, in complex numbers, and inputs for it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from megacpp_nemo.model.mamba3 import Mamba3State

WIDE = torch.float64
TOKENS = ("x", "dt", "A", "trap", "B", "C", "angles", "z")
STATE = tuple(field.name for field in fields(Mamba3State))


def make(
    seed: int = 0,
    *,
    batch: int = 2,
    seq: int = 19,
    heads: int = 4,
    groups: int = 1,
    head_dim: int = 3,
    state: int = 8,
    angles: int = 2,
    rank: int = 1,
    dtype: torch.dtype = WIDE,
) -> dict[str, Tensor]:
    """Return differentiable inputs by name, the entering state's among them.

    The same numbers for every dtype.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=WIDE)

    inputs = {
        "x": normal(batch, seq, heads, head_dim),
        "dt": normal(batch, seq, heads).exp() * 0.3,
        "A": -normal(batch, seq, heads).exp(),
        "trap": normal(batch, seq, heads),
        "B": normal(batch, seq, rank, groups, state),
        "C": normal(batch, seq, rank, groups, state),
        "angles": normal(batch, seq, angles),
        "B_bias": normal(heads, rank, state),
        "C_bias": normal(heads, rank, state),
        "D": normal(heads),
        "z": normal(batch, seq, heads, head_dim),
        "ssm": normal(batch, heads, head_dim, state),
        "key": normal(batch, heads, rank, state),
        "value": normal(batch, heads, head_dim),
        "angle": normal(batch, heads, angles),
    }
    if rank > 1:
        inputs |= {name: normal(heads, rank, head_dim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    # Rounded to fp32 first, so that fp32 and fp64 runs see equal inputs.
    return {name: t.float().to(dtype).requires_grad_() for name, t in inputs.items()}


def split(inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Mamba3State]:
    """Return the arguments of a form, and the entering state."""
    rest = {name: t for name, t in inputs.items() if name not in STATE}
    return rest, Mamba3State(**{name: inputs[name] for name in STATE})


def packed(state: Mamba3State) -> Tensor:
    parts = (state.ssm, state.key, state.value, state.angle.cos(), state.angle.sin())
    return torch.cat([part.flatten().to(WIDE) for part in parts])


def loop(inputs: dict[str, Tensor], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Write the recurrence head by head, pairs of entries as complex numbers.

    The state is kept in the frame of its token: instead of B and C turning on, it turns back.
    """
    x, rank = inputs["x"], inputs["B"].size(2)
    rows = [
        [one_head(inputs, b, h, rank, None if ids is None else ids[b]) for h in range(x.size(2))]
        for b in range(len(x))
    ]
    y = torch.stack([torch.stack([head[0] for head in row], dim=1) for row in rows])
    parts = [torch.stack([torch.stack([h[1][i] for h in row]) for row in rows]) for i in range(4)]
    state = Mamba3State(**dict(zip(STATE, parts, strict=True)))
    return y, packed(state)


def complex_pairs(t: Tensor, rank: int) -> Tensor:
    if rank > 1:
        return torch.complex(*t.chunk(2, dim=-1))
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())


def real_pairs(t: Tensor, rank: int) -> Tensor:
    return torch.cat((t.real, t.imag), -1) if rank > 1 else torch.view_as_real(t).flatten(-2)


def one_head(inputs: dict[str, Tensor], b: int, h: int, rank: int, ids: Tensor | None) -> Any:
    heads, groups = inputs["x"].size(2), inputs["B"].size(3)
    pad = inputs["ssm"].size(-1) // 2 - inputs["angles"].size(-1)
    ones = torch.ones(rank, inputs["x"].size(-1), dtype=WIDE)
    scale, gate, out = (
        inputs[name][h] if rank > 1 else ones for name in ("mimo_x", "mimo_z", "mimo_o")
    )
    theta = torch.nn.functional.pad(inputs["angle"][b, h], (0, pad))
    back = torch.exp(-1j * theta)
    state = complex_pairs(inputs["ssm"][b, h], rank) * back
    key, value = complex_pairs(inputs["key"][b, h], rank) * back, inputs["value"][b, h]
    ys = []
    for t in range(inputs["x"].size(1)):
        if ids is not None and t > 0 and ids[t] != ids[t - 1]:
            state, key, theta = state * 0, key * 0, theta * 0
        dt, lam = inputs["dt"][b, t, h], 1 / (1 + torch.exp(-inputs["trap"][b, t, h]))
        alpha = torch.exp(dt * inputs["A"][b, t, h])
        step = math.pi * torch.tanh(inputs["angles"][b, t]) * dt
        step = torch.nn.functional.pad(step, (0, pad))
        theta, back = theta + step, torch.exp(-1j * step)
        g = h // (heads // groups)
        before = torch.einsum("rp,rn->pn", (value * scale).to(key.dtype), key)
        key = complex_pairs(inputs["B"][b, t, :, g] + inputs["B_bias"][h], rank)
        query = complex_pairs(inputs["C"][b, t, :, g] + inputs["C_bias"][h], rank)
        value = inputs["x"][b, t, h]
        now = torch.einsum("rp,rn->pn", (value * scale).to(key.dtype), key)
        state = alpha * back * (state + (1 - lam) * dt * before) + lam * dt * now
        read = torch.einsum("pn,rn->rp", state, query.conj()).real
        read = read + inputs["D"][h] * value * scale
        opening = inputs["z"][b, t, h] * gate
        ys.append((read * opening / (1 + torch.exp(-opening)) * out).sum(0))
    frame = torch.exp(1j * theta)
    angle = theta[: inputs["angles"].size(-1)]
    ends = (real_pairs(state * frame, rank), real_pairs(key * frame, rank), value, angle)
    return torch.stack(ys), ends
