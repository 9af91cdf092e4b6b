"""Every leaf field refuses what is not of its type or out of its range, and says so."""

from __future__ import annotations

import dataclasses
import math

import pytest
from refusals import refusal, settings

from megacpp_nemo.contract import (
    HybridRecipe,
    LayerPattern,
    MegaCppError,
    PatternError,
    Precision,
    RecipeError,
    field_paths,
    recipe,
    shapes,
    training,
    with_paths,
)
from megacpp_nemo.contract.checks import Checked
from megacpp_nemo.contract.parameters import TARGETS

NAN, INF = math.nan, math.inf
LEAVES = field_paths()
OPTIONAL = {
    "parallelism.virtual_pipeline_model_parallel_size",
    "parallelism.expert_tensor_parallel_size",
    "features.structure",
    "files.tokenizer_dir",
    "files.run_dir",
}
WORDS = {"features.structure", "files.tokenizer_dir", "files.run_dir"}
# Tuples of text, not of whole numbers.
TEXTS = {
    "files.data_path",
    *(f"plasticity.{name}.families" for name in ("fire", "dash", "shrink")),
    *(f"plasticity.{name}.boundaries" for name in ("fire", "dash")),
}
ZERO_IS_FINE = {
    "model.experts.shared_expert_size",
    "model.mtp.num_layers",
    "schedule.warmup_steps",
    "schedule.seed",
    "schedule.weight_decay",
    "schedule.min_lr",
    "schedule.adam_beta1",
    "schedule.adam_beta2",
    "model.experts.aux_loss_coeff",
    "model.sparse_attention.indexer_loss_coeff",
    "model.mtp.loss_scaling_factor",
    "plasticity.dash.floor",
    "plasticity.shrink.interval",
    "plasticity.shrink.threshold",
    "plasticity.shrink.floor",
    "plasticity.redo.report_interval",
    "plasticity.redo.threshold",
    "plasticity.redo.decay",
    "plasticity.stp.weight",
    "plasticity.stp.start_step",
}
CHOICES = {
    "model.experts.activation": ("gelu", "squared_relu", "swiglu"),
    "features.mamba": ("native", "author"),
    "features.structure": ("core", "all", "category+ast_depth"),
    "features.kernels": ("required", "available"),
    "corpus": ("indexed", "sources"),
    **{f"plasticity.{name}.target": tuple(TARGETS) for name in ("fire", "dash", "shrink")},
}
WRONG = {
    int: ["4", 1.0, 4.5, NAN, INF, True, False, [4], (), {}, object(), -1, -(10**400)],
    float: ["1e-3", NAN, INF, -INF, True, False, [0.1], 1j, object(), -1e-9, -1, 10**400],
    bool: [0, 1, 1.0, "True", "yes", "", [], (), object()],
    str: [3, 1.5, True, b"gelu", ["gelu"], object(), ""],
    tuple: [3, "12", {1, 2}, [1.5], ["2"], (True,), (None,), ((2,),), [-1], [NAN]],
}


def kind(path: str) -> type:
    if path in OPTIONAL:
        return str if path in WORDS else int
    return type(LEAVES[path])


def wrong_values(path: str) -> list[object]:
    if path in TEXTS:
        return [3, "a", {"a"}, [1.5], [b"a"], ("",), (" ",), (None,), (("a",),), None]
    values = list(WRONG[kind(path)])
    if path not in OPTIONAL:
        values.append(None)
    if path not in ZERO_IS_FINE and kind(path) in (int, float):
        values.append(0)
    if path in CHOICES:
        values += ["gelus", "nativ", "GELU", "none"]
    return values


PLAIN = [path for path in LEAVES if path not in ("pattern", "precision", "model.mtp.pattern")]


@pytest.mark.parametrize("path", PLAIN)
def test_a_wrong_value_is_refused_by_class_field_and_value(path):
    base = recipe("nam56r", mode="author_dp")
    owner: object = base
    for name in path.split(".")[:-1]:
        owner = getattr(owner, name)
    name = path.rpartition(".")[2]
    for value in wrong_values(path):
        error = refusal(RecipeError, with_paths, base, {path: value})
        assert error.what == f"{type(owner).__name__}.{name} cannot be {value!r}"
        assert error.given == f"{name}={value!r}"
        assert list(settings(error)) == [name]
        assert with_paths(base, {path: settings(error)[name]}), error


@pytest.mark.parametrize("path", PLAIN)
def test_the_default_and_its_json_form_are_accepted(path):
    base = HybridRecipe()
    value = LEAVES[path]
    for same in (value, list(value) if isinstance(value, tuple) else value):
        assert with_paths(base, {path: same}) == base


@pytest.mark.parametrize(
    ("owner", "field", "wrong", "right", "allowed"),
    [
        (shapes.ExpertsShape, "topk", 0, 1, "a whole number, 1 or more"),
        (shapes.ExpertsShape, "shared_expert_size", -1, 0, "a whole number, 0 or more"),
        (shapes.ExpertsShape, "aux_loss_coeff", -1e-4, 0, "a finite number, 0 or more"),
        (shapes.MultiTokenPredictionShape, "num_layers", -1, 0, "a whole number, 0 or more"),
        (shapes.RecurrentShape, "state_gradient_clip", 0, 0.5, "a finite number above 0"),
        (shapes.ModelShape, "norm_epsilon", 0.0, 1e-6, "a finite number above 0"),
        (shapes.ModelShape, "rotary_base", 500_000.0, 10_000, "a whole number, 1 or more"),
        (training.OptimizerSchedule, "adam_beta1", 1.0, 0.0, "a number from 0 to below 1"),
        (training.OptimizerSchedule, "adam_beta2", 1, 0.999, "a number from 0 to below 1"),
        (training.OptimizerSchedule, "adam_eps", 0, 1e-15, "a finite number above 0"),
        (training.OptimizerSchedule, "weight_decay", -0.1, 0, "a finite number, 0 or more"),
        (training.OptimizerSchedule, "clip_grad", 0, 0.1, "a finite number above 0"),
        (training.OptimizerSchedule, "lr", 0, 1, "a finite number above 0"),
        (training.OptimizerSchedule, "seed", 2**31, 0, "a whole number from 0 to 2**31 - 1"),
        (
            training.Parallelism,
            "virtual_pipeline_model_parallel_size",
            1,
            None,
            "a whole number, 2 or more, or None",
        ),
        (
            training.Parallelism,
            "expert_tensor_parallel_size",
            0,
            None,
            "a whole number, 1 or more, or None",
        ),
        (training.Parallelism, "sequence_parallel", 1, False, "True or False"),
        (training.Features, "mamba", "mamba2", "author", "'native', 'author'"),
        (
            training.Features,
            "structure",
            "some",
            None,
            "'core', 'all', or channels joined by '+' (category, dependency_level, ast_depth, "
            "sibling_index, node_type), or None",
        ),
        (training.Features, "kernels", "none", "available", "'required', 'available'"),
        (training.Files, "run_dir", "", None, "text that is not blank, or None"),
        (HybridRecipe, "name", "  ", "mine", "text that is not blank"),
        (HybridRecipe, "corpus", "files", "sources", "'indexed', 'sources'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_ranges(owner, field, wrong, right, allowed):
    error = refusal(RecipeError, owner, **{field: wrong})
    assert error.what == f"{owner.__name__}.{field} cannot be {wrong!r}"
    assert error.allowed == allowed
    assert getattr(owner(**{field: right}), field) == right


def test_the_message_in_full():
    assert str(refusal(RecipeError, shapes.ExpertsShape, topk="4")).splitlines() == [
        "ExpertsShape.topk cannot be '4'",
        "  given:   topk='4'",
        "  allowed: a whole number, 1 or more",
        "  try:     topk=4",
    ]


@pytest.mark.parametrize("orders", [(), (1, 2), (2, 2), [3, 2, 3], (0,), "23", 2, None])
def test_n_gram_orders_are_distinct_and_two_or_more(orders):
    error = refusal(RecipeError, shapes.NgramHashShape, orders=orders)
    assert error.what.startswith("NgramHashShape.orders cannot be")
    assert "distinct" in str(error.allowed)
    assert shapes.NgramHashShape(orders=[5, 2]).orders == (5, 2)


@pytest.mark.parametrize(
    ("ranks", "ordered"), [((2, 1), (1, 2)), ((1, 1), (1,)), ([3, 1, 3, 2], (1, 2, 3))]
)
def test_dsa_ranks_are_distinct_and_ascending(ranks, ordered):
    error = refusal(RecipeError, shapes.SparseAttentionShape, a_ranks=ranks)
    assert settings(error) == {"a_ranks": ordered}
    assert shapes.SparseAttentionShape(a_ranks=list(ordered)).a_ranks == ordered


def test_lists_become_tuples_and_whole_numbers_floats_so_that_equal_recipes_are_equal():
    one = recipe("nam56r", changes={"a_ranks": [1, 2], "orders": [2], "lr": 1, "clip_grad": 2})
    assert one == recipe("nam56r", changes={"a_ranks": (1, 2), "orders": (2,), "lr": 1.0,
                                            "clip_grad": 2.0})  # fmt: skip
    assert hash(one)
    assert isinstance(one.schedule.lr, float)
    assert isinstance(one.model.sparse_attention.a_ranks, tuple)


@pytest.mark.parametrize(
    ("given", "suggested"),
    [("nativ", "native"), ("AUTHOR", "author"), ("auther", "author"), ("quux", "native")],
)
def test_a_close_choice_is_suggested_or_else_the_default(given, suggested):
    assert settings(refusal(RecipeError, training.Features, mamba=given)) == {"mamba": suggested}


PARTS = [
    "model", "parallelism", "batch", "schedule", "cadence", "files", "features", "plasticity"
]  # fmt: skip
INNER = [field.name for field in dataclasses.fields(shapes.ModelShape)
         if dataclasses.is_dataclass(getattr(shapes.ModelShape(), field.name))]  # fmt: skip
NOT_A_PART = ["x", 3, None, {}, [], shapes.ModelShape]


@pytest.mark.parametrize("value", NOT_A_PART)
@pytest.mark.parametrize(
    ("owner", "part"),
    [(HybridRecipe, part) for part in PARTS]
    + [(shapes.ModelShape, part) for part in INNER]
    + [(shapes.EmbeddingShape, "ngram"), (shapes.EmbeddingShape, "structure")],
)
def test_a_part_of_the_wrong_type_is_refused(owner, part, value):
    error = refusal(RecipeError, owner, **{part: value})
    expected = type(getattr(owner(), part)).__name__
    assert error.what == f"{owner.__name__}.{part} cannot be {value!r}"
    assert error.allowed == f"a {expected}"
    assert error.hint == f"{part}={expected}()"


def test_one_part_is_not_taken_for_another():
    refusal(RecipeError, HybridRecipe, batch=training.Cadence())
    refusal(RecipeError, shapes.ModelShape, mamba=shapes.AuthorMambaShape())


@pytest.mark.parametrize("pattern", [3, None, ["A"], b"AE", shapes.ModelShape(), ""])
def test_a_pattern_that_is_none_is_refused(pattern):
    refusal(PatternError, HybridRecipe, pattern=pattern)


@pytest.mark.parametrize("pattern", [3, None, ["A"], b"AE", "", "AX", "AE|AE", "AR", "D"])
def test_a_pattern_that_no_prediction_depth_has_is_refused(pattern):
    refusal(PatternError, shapes.MultiTokenPredictionShape, pattern=pattern)
    assert shapes.MultiTokenPredictionShape(pattern="aemg").pattern == LayerPattern.parse("AEMG")


@pytest.mark.parametrize("precision", [7, None, "fp4", "", ["bf16"], True, 16.0])
def test_a_precision_that_is_none_is_refused(precision):
    error = refusal(RecipeError, HybridRecipe, precision=precision)
    assert error.what == "Unknown precision"
    assert error.given == repr(precision)
    assert HybridRecipe(**settings(error))


def test_patterns_and_precisions_are_read_from_text():
    written = HybridRecipe(pattern="ae me|aem r", depth=8, precision="FP8", parallelism=
                           training.Parallelism(pipeline_model_parallel_size=2),
                           model=shapes.ModelShape(
                               sparse_attention=shapes.SparseAttentionShape(a_ranks=[1])),
                           )  # fmt: skip
    assert written.pattern == LayerPattern.parse("AEME|AEMR")
    assert written.precision is Precision.FP8_EXPERTS


def test_every_dataclass_of_a_recipe_is_checked():
    """A part added to the contract without a check would be found here."""

    def parts(owner):
        yield owner
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if dataclasses.is_dataclass(value) and not isinstance(value, LayerPattern):
                yield from parts(value)

    found = list(parts(HybridRecipe()))
    assert len(found) == 26
    assert all(isinstance(part, Checked) for part in found)


def test_checks_hold_for_parts_changed_by_dataclasses_replace():
    with pytest.raises(MegaCppError):
        dataclasses.replace(HybridRecipe(), depth=0)


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("depth", 1000),
        ("model.experts.num_experts", 65_536),
        ("model.embedding.ngram.table_size", 2**31),
        ("model.embedding.ngram.heads_per_order", 256),
    ],
)
def test_what_is_laid_out_one_by_one_has_an_end(path, most):
    """A slip of the finger must not take all memory, or all day."""
    base = recipe("nam56r_tiny")
    assert field_paths(with_paths(base, {path: most}))[path] == most
    error = refusal(RecipeError, with_paths, base, {path: most + 1})
    assert f"1 to {most:,}" in error.allowed
