"""What the forms of Mamba-3 (arXiv 2603.15569) share: the state and the steps around the scan.

- `Mamba3State`: what a row hands over to its next part
- `prepare`: checked arguments as the recurrence's inputs by token
- `turn`, `values_of`, `read_out`: rotation, inputs by rank, and the output from what each reads
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.arguments import (
    bind_shapes,
    check_shared,
    compute_dtype,
    document_index,
    document_starts,
)


@dataclass(frozen=True, kw_only=True)
class Mamba3State:
    """All that a row needs to go on after a token.

    Args:
        ssm: The state h [batch, heads, head_dim, state], fp32 or fp64.
        key: The last token's k, biased and turned [batch, heads, rank, state].
        value: The last token's x [batch, heads, head_dim].
        angle: The angle theta after it [batch, heads, angles], in [0, 2 pi), fp64: it is a sum
            over the whole row, and fp32 would lose what one token adds.
    """

    ssm: Tensor
    key: Tensor
    value: Tensor
    angle: Tensor


class Prepared(NamedTuple):
    """The inputs of the recurrence by token, in fp32 or fp64.

    Args:
        keys: Biased B, not turned yet [batch, seq, heads, rank, state].
        queries: Biased C, likewise.
        values: Inputs v [batch, seq, heads, rank, head_dim].
        log_decay: Logarithm of alpha [batch, seq, heads], fp64.
        own: gamma, the weight of a token's own input [batch, seq, heads].
        last: beta / alpha, the weight of the input before it; 0 where a document begins.
        turns: Angle that each token adds [batch, seq, heads, angles], fp64.
        starts: Where a document begins after the first token [batch, seq], or None.
        state: State before the first token.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    log_decay: Tensor
    own: Tensor
    last: Tensor
    turns: Tensor
    starts: Tensor | None
    state: Mamba3State


def prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    document_ids: Tensor | None,
    state: Mamba3State | None,
) -> Prepared:
    """Return the recurrence's inputs by token, of arguments as `mamba3_sequential` has them."""
    sizes = _check(
        x=(x, "batch seq heads head_dim"),
        dt=(dt, "batch seq heads"),
        A=(A, "batch seq heads"),
        trap=(trap, "batch seq heads"),
        B=(B, "batch seq rank groups state"),
        C=(C, "batch seq rank groups state"),
        angles=(angles, "batch seq angles"),
        B_bias=(B_bias, "heads rank state"),
        C_bias=(C_bias, "heads rank state"),
        D=(D, "heads"),
        z=(z, "batch seq heads head_dim"),
        mimo_x=(mimo_x, "heads rank head_dim"),
        mimo_z=(mimo_z, "heads rank head_dim"),
        mimo_o=(mimo_o, "heads rank head_dim"),
        document_ids=(document_ids, "batch seq"),
        **_named(state),
    )
    _check_rank(sizes["rank"], mimo_x, mimo_z, mimo_o, z)
    dtype, shared = compute_dtype(x, dt, A, B, C), sizes["heads"] // sizes["groups"]
    keys, queries = (
        t.to(dtype).transpose(2, 3).repeat_interleave(shared, dim=2) + bias.to(dtype)
        for t, bias in ((B, B_bias), (C, C_bias))
    )
    steps, weight = dt.to(dtype), torch.sigmoid(trap.to(dtype))
    last, starts = (1 - weight) * steps, None
    if document_ids is not None:
        document = document_index(document_ids)
        starts = document_starts(document)
        last = last.masked_fill(starts.unsqueeze(-1), 0.0)
    turns = torch.tanh(angles.to(dtype)).unsqueeze(2) * (steps * math.pi).unsqueeze(-1)
    return Prepared(
        keys=keys,
        queries=queries,
        values=values_of(x.to(dtype), mimo_x),
        log_decay=dt.double() * A.double(),
        own=weight * steps,
        last=last,
        turns=turns.double(),
        starts=starts,
        state=_entering(state, keys, sizes),
    )


def _named(state: Mamba3State | None) -> dict[str, tuple[Tensor | None, str]]:
    """Return the parts of a state with the names of their dimensions."""
    if state is None:
        return {}
    return {
        "ssm": (state.ssm, "batch heads head_dim state"),
        "key": (state.key, "batch heads rank state"),
        "value": (state.value, "batch heads head_dim"),
        "angle": (state.angle, "batch heads angles"),
    }


def values_of(x: Tensor, mimo_x: Tensor | None) -> Tensor:
    """Return the inputs by rank [..., heads, rank, head_dim] of x [..., heads, head_dim]."""
    values = x.unsqueeze(-2)
    return values if mimo_x is None else values * mimo_x.to(x.dtype)


def turn(keys: Tensor, queries: Tensor, angle: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Return keys and queries [..., rank, state], pairs of entries turned by an angle.

    Args:
        keys: Keys.
        queries: Queries.
        angle: Angle of each pair [..., angles], fp64.
        halves: Pairs are entries i and i + state / 2; else entries 2 i and 2 i + 1.
    """
    # Whole turns are taken off before the rounding.
    angle = torch.remainder(angle, 2 * math.pi).to(keys.dtype).unsqueeze(-2)
    cos, sin = angle.cos(), angle.sin()
    return _turned(keys, cos, sin, halves), _turned(queries, cos, sin, halves)


def _turned(t: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    count = cos.size(-1)
    if halves:
        low, high = t.chunk(2, dim=-1)
        a, b = low[..., :count], high[..., :count]
        turned = (a * cos - b * sin, low[..., count:], a * sin + b * cos, high[..., count:])
        return torch.cat(turned, dim=-1)
    a, b = t[..., 0 : 2 * count : 2], t[..., 1 : 2 * count : 2]
    pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((pairs, t[..., 2 * count :]), dim=-1)


def read_out(
    y: Tensor,
    values: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
) -> Tensor:
    """Return [batch, seq, heads, head_dim] from what each rank reads of the state."""
    if D is not None:
        y = y + D.to(y.dtype)[:, None, None] * values
    if z is not None:
        y = y * functional.silu(values_of(z.to(y.dtype), mimo_z))
    return y.squeeze(3) if mimo_o is None else (y * mimo_o.to(y.dtype)).sum(3)


def leaving(ssm: Tensor, key: Tensor, x: Tensor, angle: Tensor) -> Mamba3State:
    """Return the state after the last token of x; it keeps no other token alive."""
    return Mamba3State(
        ssm=ssm,
        key=key.clone(),
        value=x[:, -1].to(ssm.dtype, copy=True),
        angle=torch.remainder(angle, 2 * math.pi),
    )


def _entering(state: Mamba3State | None, keys: Tensor, sizes: dict[str, int]) -> Mamba3State:
    if state is not None:
        ssm, key, value = (t.to(keys.dtype) for t in (state.ssm, state.key, state.value))
        return Mamba3State(ssm=ssm, key=key, value=value, angle=state.angle.double())
    batch, heads, width = (sizes[name] for name in ("batch", "heads", "head_dim"))
    return Mamba3State(
        ssm=keys.new_zeros(batch, heads, width, sizes["state"]),
        key=keys.new_zeros(batch, heads, sizes["rank"], sizes["state"]),
        value=keys.new_zeros(batch, heads, width),
        angle=keys.new_zeros(batch, heads, sizes["angles"], dtype=torch.float64),
    )


def _check(**named: tuple[Tensor | None, str]) -> dict[str, int]:
    sizes = bind_shapes(**named)
    check_shared(sizes, "heads", "groups")
    state, angles = sizes["state"], sizes["angles"]
    if state % 2 or 2 * angles > state:
        raise RuntimeRefusal(
            "the rotation turns pairs of entries of the state, each at most once",
            given=f"{angles} angles for a state of {state}",
            allowed="an even state, and at most half as many angles",
            hint=f"{max(1, state // 4)} angles, a quarter of the state",
        )
    return sizes


def _check_rank(
    rank: int,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    z: Tensor | None,
) -> None:
    multiple = [t is not None for t in (mimo_x, mimo_o)] + [mimo_z is not None] * (z is not None)
    if any(multiple) != all(multiple) or (rank > 1 and not any(multiple)):
        raise RuntimeRefusal(
            "several inputs and outputs need scales of each",
            given=f"rank {rank}, "
            + ", ".join(
                f"{name} {'missing' if t is None else 'given'}"
                for name, t in (("mimo_x", mimo_x), ("mimo_z", mimo_z), ("mimo_o", mimo_o))
            ),
            allowed="mimo_x, mimo_o and, with a gate, mimo_z; or rank 1 and none of them",
            hint="all three scales, each [heads, rank, head_dim]",
        )
