"""M2RNN: both forms against a loop written here, and their promises."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.m2rnn import forget_gate, m2rnn_scan, m2rnn_sequential
from tests.model import scans
from tests.model.scans import boundaries, outcome

few = settings(max_examples=50, deadline=None)
NAMES = ("q", "k", "v", "f", "W", "initial_state")
difference = partial(scans.difference, inputs=NAMES)
assert_same = partial(scans.assert_same, inputs=NAMES)


def make(
    seed: int = 0,
    *,
    batch: int = 2,
    seq: int = 19,
    heads: int = 4,
    qk_heads: int = 2,
    key_dim: int = 3,
    value_dim: int = 5,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Return differentiable inputs by name; the same numbers for every dtype."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = {
        "q": normal(batch, seq, qk_heads, key_dim),
        "k": normal(batch, seq, qk_heads, key_dim),
        "v": normal(batch, seq, heads, value_dim),
        "f": normal(batch, seq, heads).sigmoid(),
        "W": torch.eye(value_dim) + 0.2 * normal(heads, value_dim, value_dim),
        "initial_state": normal(batch, heads, key_dim, value_dim).tanh(),
    }
    # Rounded to fp32 first, so that fp32 and fp64 runs see equal inputs.
    return {name: t.float().to(dtype).requires_grad_() for name, t in inputs.items()}


class ClippedIdentity(torch.autograd.Function):
    """The identity, whose gradient is clipped to +-limit."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.minimum(torch.full_like(grad, ctx.limit)).maximum(
            torch.full_like(grad, -ctx.limit)
        ), None


def loop(
    inputs: dict[str, Tensor], ids: Tensor | None = None, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Write the recurrence row by row and head by head."""
    q, k, v, f, W, initial = (inputs[name] for name in NAMES)
    (batch, seq, heads, _), qk_heads = v.shape, q.shape[2]
    ys, finals = [], []
    for b in range(batch):
        for h in range(heads):
            g, state = h // (heads // qk_heads), initial[b, h]
            for t in range(seq):
                if ids is not None and t > 0 and ids[b, t] != ids[b, t - 1]:
                    state = torch.zeros_like(state)
                update = torch.tanh(state @ W[h] + torch.outer(k[b, t, g], v[b, t, h]))
                state = f[b, t, h] * state + (1 - f[b, t, h]) * update
                if clip is not None:
                    state = ClippedIdentity.apply(state, clip)
                ys.append(q[b, t, g] @ state)
            finals.append(state)
    y = torch.stack(ys).view(batch, heads, seq, -1).transpose(1, 2)
    return y, torch.stack(finals).view_as(initial)


@few
@given(
    seed=st.integers(0, 999),
    seq=st.integers(1, 21),
    chunk_size=st.integers(1, 30),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    packed=st.booleans(),
    clip=st.sampled_from([None, 1.0, 0.1]),
)
def test_both_forms_equal_the_loop_in_values_and_gradients(
    seed: int,
    seq: int,
    chunk_size: int,
    heads: tuple[int, int],
    packed: bool,
    clip: float | None,
) -> None:
    ids = boundaries(seed, 2, seq) if packed else None
    options: dict[str, Any] = {"document_ids": ids, "state_gradient_clip": clip}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        inputs = make(seed, seq=seq, heads=heads[0], qk_heads=heads[1], dtype=dtype)
        expected = outcome(*loop(inputs, ids, clip), inputs)
        sequential = m2rnn_sequential(**inputs, **options)
        assert_same(outcome(*sequential, inputs), expected, tolerance)
        scan = m2rnn_scan(**inputs, **options, chunk_size=chunk_size)
        assert_same(outcome(*scan, inputs), expected, tolerance)


def test_the_published_head_shape_agrees_too() -> None:
    inputs = make(batch=1, seq=37, key_dim=64, value_dim=16, dtype=torch.float32)
    with torch.no_grad():
        # The published start. Far from it the map is chaotic, and rounding alone grows past 1e-5.
        inputs["W"].copy_(torch.eye(16))
    expected = outcome(*loop(inputs, clip=1.0), inputs)
    assert_same(outcome(*m2rnn_scan(**inputs, chunk_size=16), inputs), expected, 1e-5)


def test_small_states_keep_their_relative_precision() -> None:
    inputs = make(seq=60, dtype=torch.float32)
    with torch.no_grad():
        for name in ("k", "v", "initial_state"):
            inputs[name].mul_(1e-3)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    for actual, expected in zip(m2rnn_scan(**inputs), loop(exact), strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error.item() < 1e-5


@pytest.mark.parametrize("form", [m2rnn_sequential, m2rnn_scan])
def test_clipping_acts_on_the_total_gradient_of_every_state(form: Any) -> None:
    inputs, large = make(seq=30), 100.0
    free = outcome(*form(**inputs, state_gradient_clip=None), inputs, large)
    clipped = outcome(*form(**inputs, state_gradient_clip=1.0), inputs, large)
    assert_same(free, outcome(*loop(inputs), inputs, large), 1e-10)
    assert_same(clipped, outcome(*loop(inputs, clip=1.0), inputs, large), 1e-10)
    changed = difference(clipped, free)
    # What a state reads from is unclipped: q sees the state, not its gradient.
    assert {name for name, error in changed.items() if error == 0} == {"y", "final", "q"}
    assert all(error > 0.1 for error in changed.values() if error)


def test_a_sequence_cut_in_two_has_the_gradients_of_the_whole() -> None:
    inputs = make(seq=17)
    whole = outcome(*m2rnn_scan(**inputs, chunk_size=5), inputs, 10.0)
    cuts = [{n: inputs[n][:, s] for n in "qkvf"} for s in (slice(6), slice(6, 17))]
    state, pieces = inputs["initial_state"], []
    for cut in cuts:
        piece, state = m2rnn_scan(**cut, W=inputs["W"], initial_state=state, chunk_size=5)
        pieces.append(piece)
    assert_same(outcome(torch.cat(pieces, dim=1), state, inputs, 10.0), whole, 1e-10)


@pytest.mark.parametrize("form", [m2rnn_sequential, m2rnn_scan])
def test_a_packed_row_equals_its_documents_one_by_one(form: Any) -> None:
    inputs = make(batch=1, seq=12)
    ids = torch.tensor([[4, 4, 4, 4, 4, 9, 4, 4, 4, 4, 4, 4]])
    options = {} if form is m2rnn_sequential else {"chunk_size": 4}
    packed = outcome(*form(**inputs, document_ids=ids, **options), inputs)
    state: Tensor | None = inputs["initial_state"]
    pieces, start = [], 0
    for length in (5, 1, 6):
        cut = {n: inputs[n][:, start : start + length] for n in "qkvf"}
        piece, last = form(**cut, W=inputs["W"], initial_state=state, **options)
        pieces.append(piece)
        state, start = None, start + length
    assert_same(packed, outcome(torch.cat(pieces, dim=1), last, inputs), 1e-10)


@pytest.mark.parametrize("name", ["q", "k", "v", "f"])
def test_a_token_changes_no_earlier_output(name: str) -> None:
    inputs = make(dtype=torch.float32)
    changed = dict(inputs)
    changed[name] = inputs[name].detach().clone()
    changed[name][:, 11] *= 0.5
    before, after = (m2rnn_scan(**i, chunk_size=8)[0] for i in (inputs, changed))
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11], after[:, 11])


def test_gradients_pass_gradcheck_without_clip() -> None:
    inputs = make(batch=1, seq=5, heads=2, qk_heads=1, key_dim=2, value_dim=2)
    ids = torch.tensor([[0, 0, 1, 1, 1]])

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(NAMES, leaves, strict=True))
        return m2rnn_scan(**named, document_ids=ids, state_gradient_clip=None, chunk_size=2)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("gate", [0.0, 1e-30, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_extreme_gates_and_inputs_give_finite_values_and_gradients(
    gate: float, size: float
) -> None:
    inputs = make(seq=50, dtype=torch.float32)
    with torch.no_grad():
        inputs["f"].fill_(gate)
        inputs["k"].mul_(size)
    actual = outcome(*m2rnn_scan(**inputs), inputs)
    assert all(t.isfinite().all() for t in actual)
    assert_same(actual, outcome(*loop(inputs, clip=1.0), inputs), 1e-5)


@pytest.mark.parametrize("form", [m2rnn_sequential, m2rnn_scan])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_keep_an_fp32_state(form: Any, autocast: bool) -> None:
    inputs = make(seq=40, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, final = form(**inputs)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected_y, expected_final = loop(exact, clip=1.0)
    torch.testing.assert_close(y.double(), expected_y, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(final.double(), expected_final, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(y.float().sum(), list(inputs.values()))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_autocast_does_not_touch_the_arithmetic() -> None:
    inputs = make(key_dim=64, value_dim=16, dtype=torch.float32)
    expected = outcome(*m2rnn_scan(**inputs), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outcome(*m2rnn_scan(**inputs), inputs)
    assert_same(actual, expected, 1e-7)


def test_reads_no_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(dtype=torch.float32)
    ids = boundaries(5, 2, 19)
    expected = outcome(*loop(inputs, ids, 1.0), inputs)
    poisoned_count = 0

    def poisoned(original: Any) -> Any:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal poisoned_count
            poisoned_count += 1
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for chunk_size in (1, 8, 30):
        scan = m2rnn_scan(**inputs, document_ids=ids, chunk_size=chunk_size)
        assert_same(outcome(*scan, inputs), expected, 1e-5)
    assert poisoned_count > 0


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradients_asked_for_are_returned(name: str) -> None:
    inputs = make()
    y, final = m2rnn_scan(**inputs, chunk_size=8)
    expected = dict(zip(("y", "final", *NAMES), outcome(y, final, inputs), strict=True))[name]
    alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
    y, final = m2rnn_scan(**alone, chunk_size=8)
    actual = outcome(y, final, {name: alone[name]})[2]
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert all(t.grad is None for t in alone.values())


@pytest.mark.parametrize("which", [0, 1])
def test_either_result_may_go_unused(which: int) -> None:
    inputs = make()
    leaves = list(inputs.values())
    actual = torch.autograd.grad(m2rnn_scan(**inputs)[which].sum(), leaves, materialize_grads=True)
    expected = torch.autograd.grad(
        loop(inputs, clip=1.0)[which].sum(), leaves, materialize_grads=True
    )
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


class CallCounter(TorchFunctionMode):
    calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_function_modes_see_the_scan_once_not_once_per_token() -> None:
    calls = []
    for seq in (4, 40):
        inputs = make(seq=seq)
        with CallCounter() as counter:
            y, final = m2rnn_scan(**inputs)
            torch.autograd.grad((y.sum(), final.sum()), list(inputs.values()))
        calls.append(counter.calls)
    assert calls[0] == calls[1] > 0


def test_the_gate_is_a_half_at_the_origin_and_stays_between_0_and_1() -> None:
    # softplus(0) = log 2 and exp(A_log) = 1.
    half = forget_gate(torch.zeros(3, 2), torch.zeros(2), torch.zeros(2))
    torch.testing.assert_close(half, torch.full((3, 2), 0.5))
    x_f, A_log, dt_bias = (torch.tensor([v]).bfloat16() for v in (2.0, math.log(16.0), -4.0))
    gate = forget_gate(x_f, A_log, dt_bias)
    step = math.log1p(math.exp(-2.0))
    assert gate.dtype == torch.float32
    assert gate.item() == pytest.approx(math.exp(-math.exp(A_log.item()) * step), rel=1e-5)
    extreme = forget_gate(torch.tensor([-1e4, 1e4]), torch.zeros(2), torch.zeros(2))
    assert extreme.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 19, 2, 4)}, "the shape of k "),
        ({"v": (2, 19, 3, 5)}, "the shape of f "),
        ({"W": (4, 5, 6)}, "the shape of W "),
        ({"document_ids": (2, 18)}, "the shape of document_ids "),
        ({"initial_state": (2, 4, 5, 3)}, "the shape of initial_state "),
        ({"q": (2, 19, 3, 3), "k": (2, 19, 3, 3)}, "the heads cannot be divided"),
    ],
)
@pytest.mark.parametrize("form", [m2rnn_sequential, m2rnn_scan])
def test_shapes_that_do_not_fit_are_refused(
    form: Any, change: dict[str, tuple[int, ...]], message: str
) -> None:
    wrong = {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(RuntimeRefusal, match=message):
        form(**{**make(), **wrong})


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(RuntimeRefusal, match="at least one token"):
        m2rnn_scan(**make(), chunk_size=0)
