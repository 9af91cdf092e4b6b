"""Values are read as their fields hold them, and written so that they read the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.cli.given import read_changes, read_recipe, read_value, written
from megacpp_nemo.contract import RECIPE_NAMES, field_paths, recipe, with_paths
from megacpp_nemo.contract.checks import Kind
from megacpp_nemo.contract.recipe import kind_of

TEXT = st.text(st.characters(exclude_characters="\x00"), min_size=1) | st.sampled_from(
    ["null", "NONE", '"', '"a"', "a,b", "[1]", "true", "3", "=", "a:b=c"]
)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("depth=26", 26),
        ("lr=3e-4", 3e-4),
        ("lr=1", 1),
        ("sequence_parallel=FALSE", False),
        ("overlap_grad_reduce=True", True),
        ("a_ranks=1,2,3", (1, 2, 3)),
        ("a_ranks=[1, 2]", (1, 2)),
        ("a_ranks=", ()),
        ("data_path=/a", ("/a",)),
        ("data_path=30,/a,70,/b", ("30", "/a", "70", "/b")),
        ('data_path=["/a,b"]', ("/a,b",)),
        ('data_path="/a,b"', ("/a,b",)),
        ('data_path=30,"/a,\\"b",70,/c', ("30", '/a,"b', "70", "/c")),
        ('data_path=/a"b,c"', ('/a"b', 'c"')),
        ('data_path="/a,b', '"/a,b'),
        ('data_path="/a"b,c', '"/a"b,c'),
        ("fire.steps=100,200", (100, 200)),
        ("dash.steps=[100]", (100,)),
        ("fire.boundaries=data,context", ("data", "context")),
        ("shrink.families=E", ("E",)),
        ("stp.weight=0.02", 0.02),
        ("stp.measure=true", True),
        ("tokenizer_dir=null", None),
        ("tokenizer_dir=None", None),
        ('tokenizer_dir="null"', "null"),
        ("virtual_pipeline_model_parallel_size=2", 2),
        ("structure=core", "core"),
        ("name=none", "none"),
        ("name=3", "3"),
        ("run_dir=a=b", "a=b"),
        ("depth=x", "x"),
        ("depth=1.5", "1.5"),
        ("sequence_parallel=1", "1"),
    ],
)
def test_a_value_is_read_as_its_field_holds_it(word, value):
    changes, mode = read_changes([word])
    assert list(changes.values()) == [value]
    assert type(next(iter(changes.values()))) is type(value)
    assert mode is None


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_field_of_every_recipe_is_read_back(name):
    fields = field_paths(recipe(name, mode="author_dp"))
    words = [f"{path}={written(value)}" for path, value in fields.items()]
    changes, _ = read_changes(words)
    assert with_paths(recipe("nam52_tiny"), changes) == recipe(name, mode="author_dp")


@given(TEXT)
def test_text_is_read_back(text):
    for optional in (False, True):
        assert read_value(written(text), Kind(str, optional=optional)) == text


@given(st.lists(TEXT).map(tuple))
def test_a_tuple_of_text_is_read_back(texts):
    assert read_value(written(texts), kind_of("files.data_path")) == texts


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_back(number):
    assert read_value(written(number), Kind(float)) == number


def test_a_recipe_carries_changes_behind_colons():
    found = read_recipe("nam56r:mode=author_dp:run_dir=a:b:depth=24", ["a_ranks=1"])
    changes = {"depth": 24, "files.run_dir": "a:b", "a_ranks": (1,)}
    assert found == recipe("nam56r", mode="author_dp", changes=changes)
