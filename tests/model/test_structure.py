"""The structure embedding against a plain formula, and what its channels may hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS, structure_channels
from megacpp_nemo.model.structure import StructureEmbedding
from tests.model.building import assert_near, groups, random_tokens, shaken, small_config

pytestmark = pytest.mark.usefixtures("one_process")
BATCH, SEQ, WIDTH = 2, 12, 6
CHOICES = {
    "core": ("category", "dependency_level"),
    "all": ("category", "dependency_level", "ast_depth", "sibling_index", "node_type"),
    "node_type+category": ("category", "node_type"),
    "ast_depth": ("ast_depth",),
}


def embedding_of(choice: str) -> StructureEmbedding:
    config = small_config("M", structure=choice)
    return StructureEmbedding(config, structure_channels(choice), WIDTH, groups().tp)


def channels(seed: int = 0, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Return ids of every channel `[batch, seq]`, absent ones among them."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, size + 1, (BATCH, SEQ), generator=draw).to(dtype)
        for name, size in STRUCTURE_CHANNELS.items()
    }


TOKENS = random_tokens(BATCH, SEQ)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_embedding_is_its_plain_formula(choice):
    embedding = shaken(embedding_of(choice))
    ids = channels()
    found = embedding(embedding.rows(ids, TOKENS))
    table, scale = embedding.table.weight.double(), embedding.scale.double()
    expected = torch.zeros(SEQ, BATCH, 32, dtype=torch.float64)
    for b in range(BATCH):
        for t in range(SEQ):
            total, first = torch.zeros(WIDTH, dtype=torch.float64), 0
            for number, name in enumerate(CHOICES[choice]):
                total += scale[number] * table[first + ids[name][b, t]]
                first += STRUCTURE_CHANNELS[name] + 1
            expected[t, b] = embedding.up_proj.weight.double() @ total
    assert_near(found, expected, 1e-6)
    assert embedding.table.weight.shape == (first, WIDTH)


def test_it_starts_with_a_mean_over_channels_and_adds_nothing():
    embedding = embedding_of("all")
    assert embedding.scale.tolist() == pytest.approx([0.2] * 5)
    assert not embedding.up_proj.weight.any()
    table = embedding.table.weight
    assert table.square().sum(1).mean().item() == pytest.approx(1, abs=0.2)
    assert not embedding(embedding.rows(channels(), TOKENS)).any()


@pytest.mark.parametrize("name", STRUCTURE_CHANNELS)
def test_absent_has_a_row_of_its_own_and_ids_out_of_range_fall_on_the_last_value(name):
    size = STRUCTURE_CHANNELS[name]
    ids = torch.tensor([[0, size - 1, size, size + 1, 10 * size, -1, -(2**40), 1]])
    rows = embedding_of(name).rows({name: ids}, ids)
    absent, last = size, size - 1
    assert rows.tolist() == [[[n] for n in (0, last, absent, last, last, absent, absent, 1)]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint16])
def test_ids_of_any_whole_type_are_read(dtype):
    embedding = embedding_of("all")
    expected = embedding.rows(channels(), TOKENS)
    assert torch.equal(embedding.rows(channels(dtype=dtype), TOKENS), expected)


def test_without_channels_all_are_absent():
    embedding = embedding_of("all")
    absent = {name: torch.full_like(TOKENS, size) for name, size in STRUCTURE_CHANNELS.items()}
    assert torch.equal(embedding.rows(None, TOKENS), embedding.rows(absent, TOKENS))


def test_channels_that_the_model_has_not_are_not_read():
    embedding = embedding_of("core")
    ids = channels()
    core = {name: ids[name] for name in CHOICES["core"]}
    assert torch.equal(
        embedding.rows({**ids, "node_type": None}, TOKENS), embedding.rows(core, TOKENS)
    )


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (None, "lacks the structure channel dependency_level"),
    "shorter": (TOKENS[:, :-1], r"dependency_level is not aligned.*\[2, 11\].*tokens \[2, 12\]"),
    "transposed": (TOKENS.T, r"dependency_level is not aligned.*\[12, 2\]"),
    "flat": (TOKENS[0], r"dependency_level is not aligned.*\[12\]"),
    "float": (TOKENS.float(), "dependency_level does not hold ids.*float32"),
    "bool": (TOKENS > 3, "dependency_level does not hold ids.*bool"),
    "list": (TOKENS.tolist(), "dependency_level does not hold ids.*list"),
    "elsewhere": (TOKENS.to("meta"), "dependency_level is not aligned.*on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_channel_is_refused_by_name(case):
    value, message = WRONG[case]
    ids = {**channels(), "dependency_level": value}
    if value is None:
        del ids["dependency_level"]
    with pytest.raises(RuntimeRefusal, match=f"(?s){message}") as caught:
        embedding_of("core").rows(ids, TOKENS)
    assert all((caught.value.given, caught.value.allowed, caught.value.hint))


@pytest.mark.parametrize("choice", ["some", "core+category", "category+category", "", "core,all"])
def test_an_unknown_choice_is_refused(choice):
    with pytest.raises(RecipeError, match="structure"):
        small_config("M", structure=choice)
