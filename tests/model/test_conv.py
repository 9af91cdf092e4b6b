"""Causal convolution against a loop over tokens and taps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.arguments import bind_shapes, document_index
from megacpp_nemo.model.conv import causal_conv1d

few = settings(max_examples=40, deadline=None)


def loop(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    batch, seq, _ = x.shape
    width = weight.shape[1]
    rows = []
    for b in range(batch):
        tokens = []
        for t in range(seq):
            total = torch.zeros_like(x[b, t]) if bias is None else bias.clone()
            for back in range(min(width, t + 1)):
                if ids is not None and back and ids[b, t - back] != ids[b, t - back + 1]:
                    break
                total = total + weight[:, width - 1 - back] * x[b, t - back]
            tokens.append(total)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@few
@given(
    seed=st.integers(0, 999),
    seq=st.integers(1, 12),
    width=st.integers(1, 5),
    with_bias=st.booleans(),
    packed=st.booleans(),
)
def test_equals_the_loop_in_values_and_gradients(
    seed: int, seq: int, width: int, with_bias: bool, packed: bool
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(2, seq, 3), torch.randn(3, width)
    bias = torch.randn(3) if with_bias else None
    # Ids that come back (0, 1, 0) are new documents each time.
    ids = torch.randint(0, 2, (2, seq)) if packed else None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
        arguments = leaves if with_bias else [*leaves, None]
        expected = loop(*arguments, ids)
        actual = causal_conv1d(*arguments, document_ids=ids)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        upstream = torch.randn_like(expected)
        for left, right in zip(
            torch.autograd.grad(actual, leaves, upstream),
            torch.autograd.grad(expected, leaves, upstream),
            strict=True,
        ):
            torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def test_a_packed_row_equals_its_documents_one_by_one() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 9, 4), torch.randn(4, 4), torch.randn(4)
    ids = torch.tensor([[7, 7, 3, 7, 7, 7, 7, 7, 1]])
    packed = causal_conv1d(x, weight, bias, document_ids=ids)
    parts = [causal_conv1d(part, weight, bias) for part in x.split([2, 1, 5, 1], dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def test_another_document_cannot_leak_even_a_nan() -> None:
    x = torch.ones(1, 4, 2)
    x[:, :2] = float("nan")
    y = causal_conv1d(x, torch.ones(2, 4), document_ids=torch.tensor([[0, 0, 1, 1]]))
    assert y[0, 2:].tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_a_token_changes_no_earlier_output() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 3), torch.randn(3, 4)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = causal_conv1d(x, weight), causal_conv1d(changed, weight)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        t.bfloat16() for t in (torch.randn(2, 7, 3), torch.randn(3, 4), torch.ones(3))
    )
    y = causal_conv1d(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, causal_conv1d(x.float(), weight.float(), bias.float()).bfloat16())


def test_documents_are_numbered_by_appearance() -> None:
    ids = torch.tensor([[5, 5, 2, 2, 5], [0, 0, 0, 0, 0]])
    assert document_index(ids).tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]]
    assert document_index(torch.tensor([[3]])).tolist() == [[0]]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "ids", "culprit"),
    [
        ((2, 5, 3), (4, 4), None, None, "weight"),
        ((2, 5), (3, 4), None, None, "x"),
        ((2, 0, 3), (3, 4), None, None, "x"),
        ((2, 5, 3), (3, 4), (4,), None, "bias"),
        ((2, 5, 3), (3, 4), None, (2, 6), "document_ids"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    ids: tuple[int, ...] | None,
    culprit: str,
) -> None:
    with pytest.raises(RuntimeRefusal, match=f"the shape of {culprit} ") as caught:
        causal_conv1d(
            torch.zeros(x),
            torch.zeros(weight),
            None if bias is None else torch.zeros(bias),
            document_ids=None if ids is None else torch.zeros(ids, dtype=torch.int64),
        )
    assert caught.value.given
    assert caught.value.allowed
    assert caught.value.hint


def test_bound_sizes_are_returned_by_name() -> None:
    sizes = bind_shapes(x=(torch.zeros(2, 3), "rows columns"), absent=(None, "columns"))
    assert sizes == {"rows": 2, "columns": 3}
