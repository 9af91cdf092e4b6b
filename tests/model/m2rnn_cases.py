"""M2RNN's scan against its plain loop: one set of cases for every path and device.

`python -m tests.model.m2rnn_cases PATH` prints the errors of all cases as JSON. Triton's
interpreter is chosen for good when triton is imported, so it has a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megacpp_nemo.model.m2rnn import m2rnn_scan, m2rnn_sequential
from tests.model.scans import boundaries, difference, outcome

NAMES = ("q", "k", "v", "f", "W", "initial_state")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, precision and options of one comparison; `loss_scale` makes a clip bind."""

    batch: int = 2
    seq: int = 11
    heads: int = 2
    qk_heads: int = 1
    key_dim: int = 3
    value_dim: int = 5
    dtype: torch.dtype = torch.float32
    chunk_size: int = 4
    documents: bool = False
    clip: float | None = 1.0
    loss_scale: float = 1.0
    entering_state: bool = True
    one_projection: bool = False

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == torch.float32 else 2e-2


CASES = {
    "odd_length": Case(),
    "one_token": Case(seq=1),
    "one_token_per_chunk": Case(seq=5, chunk_size=1),
    "one_chunk": Case(seq=7, chunk_size=64),
    "whole_chunks": Case(seq=8),
    "one_sequence_and_head": Case(batch=1, heads=1),
    "two_shared_heads": Case(batch=1, heads=4, qk_heads=2),
    "no_shared_head": Case(batch=1, heads=3, qk_heads=3),
    "published_head": Case(batch=1, seq=21, key_dim=64, value_dim=16, chunk_size=8),
    "wide_head": Case(seq=5, key_dim=20, value_dim=35),
    "documents": Case(documents=True),
    "documents_without_clip": Case(documents=True, clip=None, seq=8),
    "no_entering_state": Case(entering_state=False),
    "clip_binds": Case(loss_scale=100.0, clip=0.3),
    "clip_binds_at_documents": Case(loss_scale=100.0, documents=True),
    "no_clip": Case(loss_scale=100.0, clip=None),
    "views_of_one_projection": Case(one_projection=True),
    "bf16": Case(dtype=torch.bfloat16, documents=True),
    "bf16_no_shared_head": Case(dtype=torch.bfloat16, batch=1, qk_heads=2),
    "fp16": Case(dtype=torch.float16),
}


def inputs_of(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Return differentiable inputs by name; f and W stay in fp32, as in the mixer."""
    draw = torch.Generator().manual_seed(case.seq)
    widths = [case.qk_heads * case.key_dim] * 2 + [case.heads * case.value_dim]
    tokens = torch.randn(case.batch, case.seq, sum(widths), generator=draw)
    tokens = tokens.to(device, case.dtype)
    q, k, v = (
        part.unflatten(-1, (count, -1)) if case.one_projection else part.reshape(
            case.batch, case.seq, count, -1
        ).contiguous()
        for part, count in zip(
            tokens.split(widths, -1), (case.qk_heads, case.qk_heads, case.heads), strict=True
        )
    )  # fmt: skip
    noise = torch.randn(case.heads, case.value_dim, case.value_dim, generator=draw)
    gates = torch.randn(case.batch, case.seq, case.heads, generator=draw).sigmoid()
    # Far from the identity the map is chaotic, and rounding alone grows past the tolerance.
    made = {"q": q, "k": k, "v": v, "f": gates, "W": torch.eye(case.value_dim) + 0.1 * noise}
    if case.entering_state:
        state = torch.randn(case.batch, case.heads, case.key_dim, case.value_dim, generator=draw)
        made["initial_state"] = state.tanh()
    return {name: t.to(device).detach().requires_grad_() for name, t in made.items()}


def results_of(case: Case, device: str, path: str | None) -> list[Tensor]:
    """Return y, the final state and every gradient, by a path or, without one, by the loop."""
    inputs = inputs_of(case, device)
    ids = boundaries(case.seq, case.batch, case.seq).to(device) if case.documents else None
    options: dict[str, Any] = {"document_ids": ids, "state_gradient_clip": case.clip}
    if path is None:
        inputs = {name: t.detach().float().requires_grad_() for name, t in inputs.items()}
        y, final = m2rnn_sequential(**inputs, **options)
    else:
        with fresh_memory_is_nan():
            y, final = m2rnn_scan(**inputs, **options, chunk_size=case.chunk_size, path=path)
            assert (y.dtype, final.dtype) == (case.dtype, torch.float32)
            found = outcome(y.cpu(), final.cpu(), inputs, case.loss_scale)
            assert all(g.dtype == t.dtype for g, t in zip(found[2:], inputs.values(), strict=True))
            return [t.cpu() for t in found]
    return [t.cpu() for t in outcome(y.cpu(), final.cpu(), inputs, case.loss_scale)]


def errors_of(case: Case, device: str, path: str) -> dict[str, float]:
    """Return the largest error of each result against the loop, relative where that is above 1."""
    names = NAMES if case.entering_state else NAMES[:-1]
    expected = results_of(case, device, None)
    return difference(results_of(case, device, path), expected, inputs=names)


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill what torch allocates without a value, so that an unwritten place shows."""

    def poisoned(original: Any) -> Any:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    owners = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    patches = [mock.patch.object(own, name, poisoned(getattr(own, name))) for own, name in owners]
    for patch in patches:
        patch.start()
    try:
        assert torch.ones(2).new_empty(3).isnan().all()
        yield
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: errors_of(case, "cpu", sys.argv[1]) for name, case in CASES.items()}))
