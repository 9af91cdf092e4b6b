"""The name of a spec and its parts are inverses; what is no name is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract import LayerPattern, LoweringError, Precision, field_paths
from megacpp_nemo.contract.checks import Kind
from megacpp_nemo.contract.recipe import kind_of
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.row import Row
from megacpp_nemo.lowering.spec_name import NamedLayer, SpecName
from megacpp_nemo.lowering.table import ROWS

PROFILE = settings.get_profile("lowering")
CARRIED: list[Row] = [row for row in ROWS if row.spec is not None]
named_layers = st.lists(
    st.builds(NamedLayer, st.sampled_from(Role), st.booleans()), min_size=1, max_size=60
).map(tuple)


# What a name has to keep apart from its own commas, signs and pluses.
texts = st.text(min_size=1) | st.sampled_from(("E", "a,b", "a+b", "a=b", "%2C", "null ", "é"))


def values(path: str) -> st.SearchStrategy[object]:
    return of_kind(kind_of(path))


def of_kind(kind: Kind) -> st.SearchStrategy[object]:
    if kind.item:
        return st.lists(of_kind(kind.item), max_size=4).map(tuple)
    if kind.optional:
        return st.none() | of_kind(Kind(kind.type)).filter(lambda value: value != "null")
    return {
        LayerPattern: st.text("AEMG", min_size=1).map(LayerPattern.parse),
        Precision: st.sampled_from(Precision),
        bool: st.booleans(),
        int: st.integers(0, 10**12),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: texts,
    }[kind.type]


carried = st.fixed_dictionaries(
    {}, optional={row.field: values(row.field) for row in CARRIED}
)  # fmt: skip


@settings(PROFILE, max_examples=200)
@given(named_layers, st.just(()) | named_layers, carried)
def test_a_name_reads_back_as_what_it_was_written_from(layers, mtp, told):
    name = SpecName(layers=layers, mtp=mtp, settings=told)
    text = str(name)
    assert SpecName.parse(text) == name
    assert str(SpecName.parse(text)) == text
    assert not set(text) & set(" \t\n'\"$*?[]|;&<>()\\`")  # a shell leaves it as it is


def test_every_setting_that_a_spec_carries_can_be_written():
    assert {row.field for row in CARRIED} <= set(field_paths())
    assert all(row.field for row in CARRIED)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a new key=value"),
        ("LemR", "is not a new key=value"),
        ("recurrent.num_heads=4", "does not say which layers"),
        ("layers=", "are not all of"),
        ("layers=LxR", "are not all of"),
        ("layers=L,layers=L", "is not a new key=value"),
        ("layers=L,", "is not a new key=value"),
        ("layers=L,=3", "is not a new key=value"),
        ("layers=L,mtp=", "are not all of"),
        ("layers=L,recurrent.heads=4", "'recurrent.num_heads' is"),
        ("layers=L,recurrent.num_heads=four", "cannot be read"),
        ("layers=L,recurrent.num_heads=", "cannot be read"),
        ("layers=L,features.ngram_hash=yes", "cannot be read"),
        ("layers=L,embedding.ngram.orders=2;3", "cannot be read"),
        ("layers=L,precision=fp4", "cannot be read"),
        ("layers=L,plasticity.fire.steps=1++2", "cannot be read"),
        ("layers=L,plasticity.fire.families=%2", "cannot be read"),
        ("layers=L,plasticity.fire.families=%FF", "cannot be read"),
        ("layers=L,plasticity.stp.measure=1", "cannot be read"),
    ],
)
def test_what_is_no_name_is_refused_with_the_reason(text, why):
    with pytest.raises(LoweringError) as caught:
        SpecName.parse(text)
    assert why in caught.value.what
    assert None not in (caught.value.given, caught.value.allowed, caught.value.hint)


@settings(PROFILE, max_examples=300)
@given(st.text("layers=,LemR.mtp1+ é\n|%2C", max_size=40))
def test_any_text_is_a_name_or_refused(text):
    try:
        name = SpecName.parse(text)
    except LoweringError:
        return
    assert SpecName.parse(str(name)) == name
