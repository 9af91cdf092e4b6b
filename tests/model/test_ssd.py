"""State space duality: both forms against a loop written here, and their promises."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.ssd import ssd_chunked, ssd_sequential
from tests.model import scans
from tests.model.scans import boundaries, outcome

few = settings(max_examples=50, deadline=None)
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
assert_same = partial(scans.assert_same, inputs=NAMES)


def make(
    seed: int = 0,
    *,
    batch: int = 2,
    seq: int = 19,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 3,
    state: int = 5,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Return differentiable inputs by name; the same numbers for every dtype."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = {
        "x": normal(batch, seq, heads, head_dim),
        "dt": normal(batch, seq, heads).exp() * 0.3,
        "A": -normal(heads).exp(),
        "B": normal(batch, seq, groups, state),
        "C": normal(batch, seq, groups, state),
        "D": normal(heads),
        "initial_state": normal(batch, heads, head_dim, state),
    }
    # Rounded to fp32 first, so that fp32 and fp64 runs see equal inputs.
    return {name: t.float().to(dtype).requires_grad_() for name, t in inputs.items()}


def loop(inputs: dict[str, Tensor], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Write the recurrence row by row and head by head."""
    x, dt, A, B, C, D, initial = (inputs[name] for name in NAMES)
    (batch, seq, heads, _), groups = x.shape, B.shape[2]
    ys, finals = [], []
    for b in range(batch):
        for h in range(heads):
            g, state = h // (heads // groups), initial[b, h]
            for t in range(seq):
                if ids is not None and t > 0 and ids[b, t] != ids[b, t - 1]:
                    state = torch.zeros_like(state)
                state = torch.exp(dt[b, t, h] * A[h]) * state
                state = state + torch.outer(dt[b, t, h] * x[b, t, h], B[b, t, g])
                ys.append(state @ C[b, t, g] + D[h] * x[b, t, h])
            finals.append(state)
    y = torch.stack(ys).view(batch, heads, seq, -1).transpose(1, 2)
    return y, torch.stack(finals).view_as(initial)


@few
@given(
    seed=st.integers(0, 999),
    seq=st.integers(1, 23),
    chunk_size=st.integers(1, 30),
    heads_and_groups=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    packed=st.booleans(),
)
def test_both_forms_equal_the_loop_in_values_and_gradients(
    seed: int, seq: int, chunk_size: int, heads_and_groups: tuple[int, int], packed: bool
) -> None:
    heads, groups = heads_and_groups
    ids = boundaries(seed, 2, seq) if packed else None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        inputs = make(seed, seq=seq, heads=heads, groups=groups, dtype=dtype)
        expected = outcome(*loop(inputs, ids), inputs)
        sequential = ssd_sequential(**inputs, document_ids=ids)
        assert_same(outcome(*sequential, inputs), expected, tolerance)
        chunked = ssd_chunked(**inputs, document_ids=ids, chunk_size=chunk_size)
        assert_same(outcome(*chunked, inputs), expected, tolerance)


def test_skip_and_initial_state_are_optional() -> None:
    inputs = make()
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("D", "initial_state")}
    required = {name: t for name, t in inputs.items() if name not in zeros}
    expected = loop({**inputs, **zeros})
    for form in (ssd_sequential, ssd_chunked):
        torch.testing.assert_close(form(**required), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", [ssd_sequential, ssd_chunked])
def test_a_packed_row_equals_its_documents_one_by_one(form: Any) -> None:
    inputs = make(batch=1, seq=12)
    ids = torch.tensor([[4, 4, 4, 4, 4, 9, 4, 4, 4, 4, 4, 4]])
    options = {} if form is ssd_sequential else {"chunk_size": 4}
    y, final = form(**inputs, document_ids=ids, **options)
    state: Tensor | None = inputs["initial_state"]
    pieces, start = [], 0
    for length in (5, 1, 6):
        cut = {n: inputs[n][:, start : start + length] for n in ("x", "dt", "B", "C")}
        shared = {n: inputs[n] for n in ("A", "D")}
        piece, last = form(**cut, **shared, initial_state=state, **options)
        pieces.append(piece)
        state, start = None, start + length
    torch.testing.assert_close(y, torch.cat(pieces, dim=1))
    torch.testing.assert_close(final, last)


def test_a_sequence_cut_in_two_hands_its_state_over() -> None:
    inputs = make(seq=17)
    y, final = ssd_chunked(**inputs, chunk_size=5)
    cuts = [{n: inputs[n][:, s] for n in ("x", "dt", "B", "C")} for s in (slice(6), slice(6, 17))]
    shared = {n: inputs[n] for n in ("A", "D")}
    first, state = ssd_chunked(
        **cuts[0], **shared, initial_state=inputs["initial_state"], chunk_size=5
    )
    second, last = ssd_chunked(**cuts[1], **shared, initial_state=state, chunk_size=5)
    torch.testing.assert_close(torch.cat((first, second), dim=1), y)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_a_token_changes_no_earlier_output(name: str) -> None:
    inputs = make(dtype=torch.float32)
    changed = dict(inputs)
    changed[name] = inputs[name].detach().clone()
    changed[name][:, 11] += 1
    before, after = (ssd_chunked(**i, chunk_size=8)[0] for i in (inputs, changed))
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11], after[:, 11])


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_strong_decay_is_finite_and_exact(chunk_size: int) -> None:
    inputs = make(seq=64, dtype=torch.float32)
    with torch.no_grad():
        inputs["A"].fill_(-50.0)
        inputs["dt"].fill_(1.0)
    ids = boundaries(3, 2, 64)
    actual = outcome(*ssd_chunked(**inputs, document_ids=ids, chunk_size=chunk_size), inputs)
    assert all(t.isfinite().all() for t in actual)
    assert_same(actual, outcome(*loop(inputs, ids), inputs), 1e-5)


def test_small_steps_after_large_ones_keep_their_precision() -> None:
    inputs = make(seq=64, dtype=torch.float32)
    with torch.no_grad():
        inputs["A"].fill_(-1.0)
        inputs["dt"][:, :32] = 50.0
        inputs["dt"][:, 32:] = 0.01
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = outcome(*loop(wide), wide)
    assert_same(outcome(*ssd_chunked(**inputs), inputs), expected, 1e-5)


def test_gradients_pass_gradcheck() -> None:
    inputs = make(batch=1, seq=5, heads=2, groups=1, head_dim=2, state=2)
    ids = torch.tensor([[0, 0, 1, 1, 1]])

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_chunked(**dict(zip(NAMES, leaves, strict=True)), document_ids=ids, chunk_size=2)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_keep_an_fp32_state(autocast: bool) -> None:
    inputs = make(seq=40, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, final = ssd_chunked(**inputs, chunk_size=16)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected_y, expected_final = loop(exact)
    torch.testing.assert_close(y.double(), expected_y, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(final.double(), expected_final, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(y.float().sum(), [inputs["x"], inputs["A"]])
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_autocast_does_not_touch_the_arithmetic() -> None:
    inputs = make(dtype=torch.float32)
    expected = outcome(*ssd_chunked(**inputs, chunk_size=8), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = ssd_chunked(**inputs, chunk_size=8)
    assert_same(outcome(y, final, inputs), expected, 1e-7)


def test_reads_no_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(dtype=torch.float32)
    ids = boundaries(5, 2, 19)
    expected = outcome(*loop(inputs, ids), inputs)

    def poisoned(original: Any) -> Any:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert_same(outcome(*ssd_chunked(**inputs, document_ids=ids), inputs), expected, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (2, 19, 3)}, "the shape of dt "),
        ({"A": (4, 1)}, "the shape of A "),
        ({"C": (2, 19, 2, 6)}, "the shape of C "),
        ({"initial_state": (2, 4, 5, 3)}, "the shape of initial_state "),
        ({"B": (2, 19, 3, 5), "C": (2, 19, 3, 5)}, "the heads cannot be divided"),
    ],
)
@pytest.mark.parametrize("form", [ssd_sequential, ssd_chunked])
def test_shapes_that_do_not_fit_are_refused(
    form: Any, change: dict[str, tuple[int, ...]], message: str
) -> None:
    wrong = {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(RuntimeRefusal, match=message):
        form(**{**make(), **wrong})


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(RuntimeRefusal, match="at least one token"):
        ssd_chunked(**make(), chunk_size=0)
