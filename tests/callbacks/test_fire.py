"""FIRE on models: which matrices it projects, what it says of them, and on several ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megacpp_nemo.callbacks.fire import fire
from megacpp_nemo.callbacks.matrices import matrices_of, parameters_of
from megacpp_nemo.callbacks.optimizers import OptimizerStates
from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.contract.parameters import Selection
from megacpp_nemo.contract.plasticity import FireLever
from tests.callbacks.experts import GATED, adam
from tests.callbacks.memory import peak_bytes
from tests.model.building import build_model, megatron, small_config

PLAIN: dict[str, Any] = {"multi_latent_attention": False, "num_query_groups": 2}
EXACT = FireLever(steps=(1,), tolerance=1e-12)
QUERY_KEY = FireLever(steps=(1,), target="attention_qk", tolerance=1e-12)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with megatron():
        yield


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def projected(matrix: Tensor) -> Tensor:
    """Return sqrt(out / in) times the polar factor of `[out, in]`, in fp64."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return math.sqrt(matrix.size(0) / matrix.size(1)) * (left @ right)


def assert_projected(after: Tensor, before: Tensor, tolerance: float = 1e-6) -> None:
    expected = projected(before)
    assert float((after - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["latent", "plain"])
def test_every_projection_becomes_a_scaled_isometry_and_nothing_else_changes(changes):
    model = build_model(small_config("AEMR", **changes))
    before = copies(model)
    fire(model, EXACT)
    kinds = set()
    for (parameter, weight), (name, old) in zip(parameters_of(model), before.items(), strict=True):
        if not parameter.kind.is_matrix:
            assert torch.equal(weight, old), name
            kinds.add(parameter.kind.value)
            continue
        for part in parameter.parts:
            rows = torch.cat([torch.arange(*span) for span in part.rows])
            assert_projected(weight.detach()[rows], old[rows])
    assert kinds == {
        "embedding", "output head", "norm", "state parameter", "convolution", "router",
        "recurrent state matrix",
    } | ({"bias"} if "bias" in kinds else set())  # fmt: skip


def test_the_parts_of_fused_matrices_are_projected_one_by_one():
    """Cut here by hand, from Megatron's own order of rows."""
    config = small_config("AEMR", **PLAIN, **GATED)
    model = build_model(config)
    before = copies(model)
    fire(model, EXACT)
    after = copies(model)

    def check(name: str, *heights: int) -> None:
        pieces = (weights[name].split(heights) for weights in (after, before))
        for new, old in zip(*pieces, strict=True):
            assert_projected(new, old)

    for expert in range(4):
        check(f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc1.weight", 16, 16)
        check(f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc2.weight", 32)
    check("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", 16, 16)
    # z and x of 32 channels, B and C of 2 groups of 8, 8 heads.
    check("decoder.layers.2.mixer.in_proj.weight", 32, 32, 16, 16, 8)
    # Two query groups: two heads of 8 that ask, one key and one value each.
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    new, old = (weights[name].view(2, 32, 32) for weights in (after, before))
    for begin, end in ((0, 16), (16, 24), (24, 32)):
        own = slice(begin, end)
        assert_projected(new[:, own].reshape(-1, 32), old[:, own].reshape(-1, 32))


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["latent", "plain"])
def test_attention_qk_touches_only_rows_that_make_queries_or_keys(changes):
    model = build_model(small_config("AEMR", **changes))
    before = copies(model)
    fire(model, QUERY_KEY)
    rows = {
        name: (weight != before[name]).flatten(1).any(1).nonzero()[:, 0].tolist()
        for name, weight in model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    attention = "decoder.layers.0.self_attention"
    if changes:
        chosen = [*range(24), *range(32, 56)]
        assert rows == {f"{attention}.linear_qkv.weight": chosen}
        return
    assert rows == {
        f"{attention}.linear_q_down_proj.weight": list(range(16)),
        f"{attention}.linear_q_up_proj.weight": list(range(4 * 16)),
        # Of 24 rows the last 8 are the rotary key, of each head's 8 + 12 the first 8 its key.
        f"{attention}.linear_kv_down_proj.weight": list(range(16, 24)),
        f"{attention}.linear_kv_up_proj.weight": [
            20 * head + row for head in range(4) for row in range(8)
        ],
    }


def test_it_reports_what_it_measured():
    model = build_model(small_config("AEMR"))
    before = {matrix.name: matrix.read() for matrix in matrices_of([model], Selection())}
    action = fire(model, FireLever(steps=(1,)), step=7, cause="data")
    assert (action.lever, action.step, action.cause) == ("fire", 7, "data")
    assert action.matrices.keys() == before.keys()
    assert action.seconds > 0
    assert action.bytes == sum(4 * matrix.numel() for matrix in before.values())
    for matrix in matrices_of([model], Selection()):
        values, old = action.matrices[matrix.name], before[matrix.name]
        scale = math.sqrt(old.size(0) / old.size(1))
        singular = torch.linalg.svdvals(old.double())
        assert values["dfi_before"] == pytest.approx(
            float(((singular / scale) ** 2 - 1).square().mean()), rel=1e-5
        )
        after = torch.linalg.svdvals(matrix.read().double())
        assert values["dfi_after"] == pytest.approx(
            float(((after / scale) ** 2 - 1).square().mean()), rel=1e-3, abs=1e-10
        )
        assert values["dfi_after"] <= 1.01e-6
        assert values["sfe"] == pytest.approx(float((singular - scale).square().sum()), rel=2e-2)
        assert values["reached"] == 1
        assert 1 <= values["iterations"] <= 40
        # ||W||_F^2 = min(d) * d_out / d_in.
        assert float(matrix.read().square().sum()) == pytest.approx(
            min(old.shape) * scale**2, rel=2e-3
        )
    assert action.totals["matrices"] == len(before)
    assert action.totals["reached"] == 1
    assert action.totals["sfe"] == pytest.approx(
        sum(values["sfe"] for values in action.matrices.values()) / len(before)
    )


def test_in_bf16_it_reports_the_weights_as_they_were_rounded():
    model = build_model(small_config("M", params_dtype=torch.bfloat16, bf16=True))
    action = fire(model, FireLever(steps=(1,)))
    for matrix in matrices_of([model], Selection()):
        assert matrix.weight.dtype == torch.bfloat16
        written, values = matrix.read().double(), action.matrices[matrix.name]
        scale = math.sqrt(matrix.shape[0] / matrix.shape[1])
        rounded = ((torch.linalg.svdvals(written) / scale) ** 2 - 1).square().mean()
        assert values["reached"] == 1
        assert values["dfi_after"] == pytest.approx(float(rounded), rel=1e-3)
        assert 5e-7 < values["dfi_after"] < 1e-4


def test_doing_it_twice_changes_nothing_the_second_time():
    model = build_model(small_config("AEMR"))
    fire(model, FireLever(steps=(1,)))
    before = copies(model)
    optimizer = adam(model)
    states = OptimizerStates([optimizer])
    moments = {n: [m.clone() for m in states.owned(p).moments] for n, p in model.named_parameters()}
    action = fire(model, FireLever(steps=(1,), tolerance=1.1e-6), states)
    assert action.bytes == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        for new, old in zip(states.owned(parameter).moments, moments[name], strict=True):
            assert torch.equal(new, old)


@pytest.mark.parametrize("lever", [EXACT, QUERY_KEY], ids=["all", "attention_qk"])
def test_the_moments_of_what_it_touched_and_only_those_become_zero(lever):
    model = build_model(small_config("AEMR", **PLAIN))
    optimizer = adam(model)
    before, states = copies(model), OptimizerStates([optimizer])
    moments = {n: [m.clone() for m in states.owned(p).moments] for n, p in model.named_parameters()}
    fire(model, lever, [optimizer])
    rows = {}
    for matrix in matrices_of([model], lever.selection):
        rows[matrix.weight] = rows.get(matrix.weight, 0) + matrix.mask()
    touched = 0
    for name, parameter in model.named_parameters():
        where = torch.zeros_like(parameter, dtype=torch.bool)
        if parameter in rows:
            where |= rows[parameter].bool()
            touched += int(where.sum())
        assert torch.equal(parameter[~where], before[name][~where])
        for new, old in zip(states.owned(parameter).moments, moments[name], strict=True):
            assert len(moments[name]) == 2
            assert not new.view(parameter.shape)[where].any()
            assert torch.equal(new.view(parameter.shape)[~where], old.view(where.shape)[~where])
        assert optimizer.optimizer.state[parameter]["step"] == 1
    assert touched > 0


def test_all_zeros_are_left_with_their_moments():
    """As the outgoing weights of an MLP whose units were all recycled."""
    model = build_model(small_config("E"))
    name = "decoder.layers.0.mlp.experts.local_experts.2.linear_fc2.weight"
    model.get_parameter(name).data.zero_()
    optimizer = adam(model)
    action = fire(model, EXACT, [optimizer])
    assert not model.get_parameter(name).any()
    assert optimizer.optimizer.state[model.get_parameter(name)]["exp_avg"].all()
    (values,) = (v for n, v in action.matrices.items() if ".experts.2.linear_fc2" in n)
    assert (values["reached"], values["iterations"], values["dfi_after"]) == (0, 0, 1)
    assert action.totals["reached"] < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_written(value):
    model = build_model(small_config("AEMR"))
    model.get_parameter("decoder.layers.3.mixer.in_proj.weight").data[2, 3] = value
    before = copies(model)
    with pytest.raises(RuntimeRefusal, match=r"decoder\.layers\.3\.mixer\.in_proj\.weight\[q\]"):
        fire(model, EXACT)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_one_that_is_not_selected_does_not_matter():
    model = build_model(small_config("AEMR"))
    model.get_parameter("decoder.layers.3.mixer.in_proj.weight").data[2, 3] = math.nan
    assert fire(model, QUERY_KEY).matrices


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"target": "attention_qk", "layers": (2,)}, "Nothing in this model is selected"),
        ({"families": ("A",)}, "Nothing in this model is selected"),
        ({"layers": (2, 3)}, "A chosen layer is not on this model"),
    ],
    ids=["no_queries_there", "no_such_family", "no_such_layer"],
)
def test_a_selection_that_fits_nothing_is_refused(chosen, words):
    model = build_model(small_config("EM"))
    with pytest.raises(RecipeError, match=words):
        fire(model, FireLever(steps=(1,), **chosen))


def test_frozen_matrices_are_left():
    model = build_model(small_config("EM"))
    frozen = model.get_parameter("decoder.layers.1.mixer.out_proj.weight")
    frozen.requires_grad_(False)
    before = frozen.clone()
    assert "decoder.layers.1.mixer.out_proj.weight" not in fire(model, EXACT).matrices
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_at_most_twice_the_largest_matrix(dtype):
    """In fp32. All matrices are 384 x 384, the shape with the largest Gram matrix."""
    config = small_config(
        "E",
        hidden_size=384,
        moe_ffn_hidden_size=384,
        moe_shared_expert_intermediate_size=384,
        num_moe_experts=2,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
    model = build_model(config)
    largest = max(math.prod(matrix.shape) for matrix in matrices_of([model], Selection()))
    assert largest == 384**2
    peak = peak_bytes(lambda: fire(model, FireLever(steps=(1,), max_iterations=2)))
    assert peak <= 2.01 * 4 * largest
