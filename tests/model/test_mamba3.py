"""Mamba-3: both forms against a loop in complex numbers written here, and their promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.mamba3 import Mamba3State, mamba3_sequential
from megacpp_nemo.model.mamba3_chunked import mamba3_chunked
from megacpp_nemo.model.ssd import ssd_sequential
from tests.model import scans
from tests.model.mamba3_loop import (
    STATE,
    TOKENS,
    WIDE,
    complex_pairs,
    loop,
    make,
    packed,
    real_pairs,
    split,
)
from tests.model.scans import boundaries, outcome

few = settings(max_examples=40, deadline=None)
FORMS = [mamba3_sequential, mamba3_chunked]


def call(form: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Return y and the leaving state as one row of numbers, its angle by cosine and sine."""
    arguments, entering = split(inputs)
    y, state = form(**arguments, initial_state=entering, **options)
    return y, packed(state)


def assert_same(
    actual: list[Tensor], expected: list[Tensor], tolerance: float, inputs: Any
) -> None:
    scans.assert_same(actual, expected, tolerance, inputs=tuple(inputs))


LAYOUTS: dict[str, dict[str, Any]] = {
    "odd_length_over_several_chunks": {"seq": 19, "chunk_size": 4},
    "chunk_longer_than_the_row": {"seq": 5, "chunk_size": 64},
    "one_token": {"seq": 1, "chunk_size": 4},
    "chunks_of_one_token": {"seq": 7, "chunk_size": 1},
    "documents": {
        "seq": 19,
        "chunk_size": 4,
        "ids": [[0] * 5 + [1] + [0] * 13, [3] * 8 + [4] * 11],
    },
    "documents_of_one_token": {"seq": 4, "chunk_size": 3, "ids": [[0, 1, 0, 1], [0, 0, 1, 1]]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_both_forms_equal_the_loop_in_both_precisions(layout: str, rank: int) -> None:
    seq, chunk_size = LAYOUTS[layout]["seq"], LAYOUTS[layout]["chunk_size"]
    ids = torch.tensor(LAYOUTS[layout]["ids"]) if "ids" in LAYOUTS[layout] else None
    wide = make(seq=seq, rank=rank)
    expected = outcome(*loop(wide, ids), wide)
    for dtype, tolerance in ((torch.float32, 1e-5), (WIDE, 1e-10)):
        inputs = make(seq=seq, rank=rank, dtype=dtype)
        sequential = call(mamba3_sequential, inputs, document_ids=ids)
        assert_same(outcome(*sequential, inputs), expected, tolerance, inputs)
        chunked = call(mamba3_chunked, inputs, document_ids=ids, chunk_size=chunk_size)
        assert_same(outcome(*chunked, inputs), expected, tolerance, inputs)


@few
@given(
    seed=st.integers(0, 999),
    seq=st.integers(1, 13),
    chunk_size=st.integers(1, 16),
    heads_and_groups=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    rank=st.sampled_from([1, 2, 3]),
    angles=st.sampled_from([1, 2, 4]),
    several_documents=st.booleans(),
)
def test_both_forms_equal_the_loop_in_any_shape(
    seed: int,
    seq: int,
    chunk_size: int,
    heads_and_groups: tuple[int, int],
    rank: int,
    angles: int,
    several_documents: bool,
) -> None:
    heads, groups = heads_and_groups
    ids = boundaries(seed, 2, seq) if several_documents else None
    inputs = make(seed, seq=seq, heads=heads, groups=groups, rank=rank, angles=angles)
    expected = outcome(*loop(inputs, ids), inputs)
    sequential = call(mamba3_sequential, inputs, document_ids=ids)
    assert_same(outcome(*sequential, inputs), expected, 1e-10, inputs)
    chunked = call(mamba3_chunked, inputs, document_ids=ids, chunk_size=chunk_size)
    assert_same(outcome(*chunked, inputs), expected, 1e-10, inputs)


def test_one_step_has_the_closed_form_of_the_equations() -> None:
    # One head, one channel, a state of two that turns by a quarter: k = (0, 1) and q = (0, 3).
    one = torch.ones(1, 1, 1, dtype=WIDE)
    quarter = torch.full((1, 1, 1), math.atanh(0.5), dtype=WIDE)
    wide = {"dtype": WIDE}
    arguments = {
        "x": torch.tensor([[[[5.0]]]], **wide),
        "dt": one,
        "A": -one * math.log(2),
        "trap": one * math.log(3),  # lambda = 3 / 4
        "B": torch.tensor([[[[[1.0, 0.0]]]]], **wide),
        "C": torch.tensor([[[[[3.0, 0.0]]]]], **wide),
        "angles": quarter,
        "B_bias": torch.zeros(1, 1, 2, **wide),
        "C_bias": torch.zeros(1, 1, 2, **wide),
        "D": torch.tensor([0.5], **wide),
    }
    entering = Mamba3State(
        ssm=torch.tensor([[[[0.0, 8.0]]]], **wide),
        key=torch.tensor([[[[0.0, 2.0]]]], **wide),
        value=torch.tensor([[[3.0]]], **wide),
        angle=torch.zeros(1, 1, 1, **wide),
    )
    for form in FORMS:
        y, state = form(**arguments, initial_state=entering)
        # 8 / 2 + (1 / 4) (1 / 2) 3 * 2 + (3 / 4) 5 = 8.5, read by 3, and half of x.
        assert y.item() == pytest.approx(3 * 8.5 + 2.5)
        torch.testing.assert_close(state.ssm.flatten(), torch.tensor([0.0, 8.5], **wide))
        torch.testing.assert_close(state.key.flatten(), torch.tensor([0.0, 1.0], **wide))
        assert state.angle.item() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("form", FORMS)
def test_lambda_of_one_without_rotation_is_mamba_2(form: Any) -> None:
    inputs = make(groups=2)
    with torch.no_grad():
        inputs["trap"].fill_(100.0)
        inputs["angles"].fill_(0.0)
        for name in (*STATE, "B_bias", "C_bias"):
            inputs[name].fill_(0.0)
        inputs["A"].copy_(inputs["A"][:1, :1].clone())
    arguments, _ = split({**inputs, "z": inputs["z"].detach()})
    y, state = form(**{**arguments, "z": None})
    expected, final = ssd_sequential(
        inputs["x"], inputs["dt"], inputs["A"][0, 0], inputs["B"][:, :, 0], inputs["C"][:, :, 0],
        D=inputs["D"],
    )  # fmt: skip
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.ssm, final, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_lambda_of_zero_gives_each_input_to_the_next_token(form: Any) -> None:
    inputs = make(seq=2, batch=1, heads=1, head_dim=1)
    with torch.no_grad():
        inputs["trap"].fill_(-100.0)
        inputs["ssm"].fill_(0.0)
        inputs["value"].fill_(0.0)
        inputs["D"].fill_(0.0)
    y, _ = call(form, inputs)
    assert y[:, 0].abs().max() < 1e-12
    assert y[:, 1].abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2])
def test_only_differences_of_angles_are_seen(form: Any, rank: int) -> None:
    inputs = make(rank=rank, angles=4)
    y, _ = call(form, inputs)
    arguments, entering = split(inputs)
    # Turn the whole past by one angle, and the angle with it.
    shift = torch.tensor(0.7, dtype=WIDE)

    def turned(t: Tensor) -> Tensor:
        return real_pairs(complex_pairs(t, rank) * torch.exp(1j * shift), rank)

    shifted = Mamba3State(
        ssm=turned(entering.ssm),
        key=turned(entering.key),
        value=entering.value,
        angle=entering.angle + shift,
    )
    again, _ = form(**arguments, initial_state=shifted)
    torch.testing.assert_close(again, y, atol=1e-10, rtol=1e-10)
    # But by how much each token turns is.
    other, _ = form(**{**arguments, "angles": inputs["angles"] + 0.5}, initial_state=entering)
    assert (other - y).abs().max() > 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_packed_row_equals_its_documents_one_by_one(form: Any, rank: int) -> None:
    inputs = make(batch=1, seq=12, rank=rank)
    ids = torch.tensor([[4, 4, 4, 4, 4, 9, 4, 4, 4, 4, 4, 4]])
    options = {} if form is mamba3_sequential else {"chunk_size": 4}
    y, final = call(form, inputs, document_ids=ids, **options)
    arguments, entering = split(inputs)
    pieces, start = [], 0
    state: Mamba3State | None = entering
    for length in (5, 1, 6):
        cut = {n: t[:, start : start + length] for n, t in arguments.items() if n in TOKENS}
        piece, last = form(**{**arguments, **cut}, initial_state=state, **options)
        pieces.append(piece)
        state, start = None, start + length
    torch.testing.assert_close(y, torch.cat(pieces, dim=1))
    torch.testing.assert_close(final, packed(last))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2])
def test_no_gradient_crosses_a_document(form: Any, rank: int) -> None:
    inputs = make(seq=12, rank=rank)
    ids = torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)
    y, _ = call(form, inputs, document_ids=ids)
    names = (*TOKENS, *STATE)
    found = torch.autograd.grad(y[:, 5:].square().sum(), [inputs[n] for n in names])
    # Running sums of angles and decays are differences in fp64, and leave its rounding.
    for name, grad in zip(names, found, strict=True):
        earlier = grad[:, :5] if name in TOKENS else grad
        assert earlier.abs().max() <= 1e-12 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_row_cut_anywhere_hands_its_state_over(form: Any, rank: int) -> None:
    inputs = make(seq=17, rank=rank, dtype=torch.float32)
    arguments, entering = split(inputs)
    whole, final = form(**arguments, initial_state=entering)
    for cuts in ((6,), (1, 2, 16), tuple(range(1, 17))):
        state, pieces = entering, []
        for begin, end in zip((0, *cuts), (*cuts, 17), strict=True):
            cut = {n: t[:, begin:end] for n, t in arguments.items() if n in TOKENS}
            piece, state = form(**{**arguments, **cut}, initial_state=state)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed(state), packed(final), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_state_of_one_form_goes_on_in_the_other(form: Any) -> None:
    inputs = make(seq=11, rank=2)
    arguments, entering = split(inputs)
    whole, _ = form(**arguments, initial_state=entering)
    first, second = FORMS if form is FORMS[1] else FORMS[::-1]
    cuts = [{n: arguments[n][:, s] for n in TOKENS} for s in (slice(4), slice(4, 11))]
    left, state = first(**{**arguments, **cuts[0]}, initial_state=entering)
    right, _ = second(**{**arguments, **cuts[1]}, initial_state=state)
    torch.testing.assert_close(torch.cat((left, right), dim=1), whole)


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form: Any) -> None:
    inputs = make(rank=2)
    y, _ = call(form, inputs)
    for name in TOKENS:
        changed = inputs[name].detach().clone()
        changed[:, 9:] = changed[:, 9:] * 1.5
        later, _ = call(form, {**inputs, name: changed})
        torch.testing.assert_close(later[:, :9], y[:, :9], atol=1e-12, rtol=1e-12)
        assert (later[:, 9:] - y[:, 9:]).abs().max() > 1e-6, name


def test_long_rows_keep_the_precision_of_their_angles() -> None:
    inputs = make(batch=1, seq=4000, heads=1, rank=1, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"].fill_(0.7)
        inputs["angles"].fill_(3.0)  # 2600 turns in all
    wide = {name: t.detach().double() for name, t in inputs.items()}
    y, _ = call(mamba3_chunked, inputs, chunk_size=64)
    expected, _ = call(mamba3_chunked, wide, chunk_size=64)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rank", [1, 2])
def test_fast_decays_stay_finite(rank: int) -> None:
    inputs = make(seq=32, rank=rank, dtype=torch.float32)
    with torch.no_grad():
        inputs["A"].fill_(-50.0)
        inputs["dt"].fill_(1.0)
    ids = boundaries(3, 2, 32)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = outcome(*call(mamba3_sequential, wide, document_ids=ids), wide)
    chunked = call(mamba3_chunked, inputs, document_ids=ids)
    assert_same(outcome(*chunked, inputs), expected, 1e-5, inputs)


def test_gradients_pass_gradcheck() -> None:
    inputs = make(batch=1, seq=3, heads=1, head_dim=1, state=4, angles=1, rank=2)
    ids = torch.tensor([[0, 0, 1]])

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(inputs, leaves, strict=True))
        return call(mamba3_chunked, given, document_ids=ids, chunk_size=2)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_inputs_keep_an_fp32_state(form: Any, autocast: bool) -> None:
    inputs = make(seq=24, rank=2, dtype=torch.bfloat16)
    arguments, entering = split(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, state = form(**arguments, initial_state=entering)
    assert y.dtype == torch.bfloat16
    assert (state.ssm.dtype, state.key.dtype, state.value.dtype) == (torch.float32,) * 3
    assert state.angle.dtype == WIDE
    exact, from_exact = split({name: t.detach().double() for name, t in inputs.items()})
    expected, final = form(**exact, initial_state=from_exact)
    assert (y - expected).abs().max() <= 1e-2 * expected.abs().max()
    torch.testing.assert_close(packed(state), packed(final), atol=1e-4, rtol=1e-4)


def test_reads_no_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(rank=2, dtype=torch.float32)
    ids = boundaries(5, 2, 19)
    expected = outcome(*call(mamba3_sequential, inputs, document_ids=ids), inputs)

    def poisoned(original: Any) -> Any:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            made = original(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for form in FORMS:
        found = call(form, inputs, document_ids=ids)
        assert_same(outcome(*found, inputs), expected, 1e-5, inputs)


def test_skip_gate_and_state_are_optional() -> None:
    inputs = make()
    arguments, _ = split(inputs)
    plain = {name: t for name, t in arguments.items() if name not in ("D", "z")}
    nothing = {name: torch.zeros_like(inputs[name]) for name in STATE}
    open_gate = torch.full_like(inputs["z"], 40.0)  # SiLU(40) = 40
    for form in FORMS:
        y, _ = form(**plain)
        D = torch.zeros_like(inputs["D"])
        expected, _ = call(form, {**inputs, **nothing, "D": D, "z": open_gate})
        torch.testing.assert_close(40 * y, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (2, 19, 3)}, "the shape of dt "),
        ({"A": (4,)}, "the shape of A "),
        ({"trap": (2, 18, 4)}, "the shape of trap "),
        ({"C": (2, 19, 1, 1, 6)}, "the shape of C "),
        ({"C_bias": (4, 2, 8)}, "the shape of C_bias "),
        ({"ssm": (2, 4, 8, 3)}, "the shape of ssm "),
        ({"key": (2, 4, 2, 8)}, "the shape of key "),
        ({"angle": (2, 4, 3)}, "the shape of angle "),
        ({"B": (2, 19, 1, 3, 8), "C": (2, 19, 1, 3, 8)}, "the heads cannot be divided"),
        ({"angles": (2, 19, 5), "angle": (2, 4, 5)}, "turns pairs of entries"),
        ({"mimo_x": (4, 1, 3)}, "need scales of each"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_refused(
    form: Any, change: dict[str, tuple[int, ...]], message: str
) -> None:
    wrong = {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(RuntimeRefusal, match=message):
        call(form, {**make(), **wrong})


@pytest.mark.parametrize("missing", ["mimo_x", "mimo_z", "mimo_o"])
def test_several_ranks_without_all_their_scales_are_refused(missing: str) -> None:
    inputs = {name: t for name, t in make(rank=2).items() if name != missing}
    for form in FORMS:
        with pytest.raises(RuntimeRefusal, match=f"(?s)need scales of each.*{missing} missing"):
            call(form, inputs)


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(RuntimeRefusal, match="at least one token"):
        call(mamba3_chunked, make(), chunk_size=0)
