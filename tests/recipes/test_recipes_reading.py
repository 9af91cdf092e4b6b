"""What NeMo-Run is made to read, and that it reads everything else as before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text("ab,=()[]{}'\" _.1", max_size=30)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("nam56r(depth=3,lr=1)", 0),
        ("nam56r(a_ranks=[0,1],depth=3)", 1),
        ("f(a=(1,2),b='x,y',c={1,2})", 3),
        ("[fire(steps=[5,10],target=mlp),stp(weight=1)]", 1),
        ("['a/*','b']", 0),
        ("f(x=it's,depth=3)", 0),
        ("f(a=g(b=1,c=[2,3]))", 2),
        ("30,/data/a", 0),
    ],
)
def test_a_comma_within_an_argument_is_hidden_and_one_between_two_is_not(text, hidden):
    from megacpp_nemo.recipes import reading

    assert reading.hidden(text).count(reading.HIDDEN) == hidden


@given(TEXT)
def test_text_is_shown_as_it_was_hidden(text):
    from megacpp_nemo.recipes import reading

    assert reading.shown(reading.hidden(text)) == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[a(b=[1,2]), c]", ["a(b=[1,2])", "c"]),
        ("[]", []),
        ("fire(steps=[1,2])", ["fire(steps=[1,2])"]),
        ("[a,]", ["a"]),
    ],
)
def test_a_list_has_its_elements(text, parts):
    from megacpp_nemo.recipes import reading

    assert reading.elements(text) == parts


@pytest.mark.parametrize(
    ("factory", "path", "value"),
    [
        ("nam56r(a_ranks=[0,1])", "model.config.dsa_a_ranks", (0, 1)),
        ("nam56r(a_ranks=(0,1), depth=26)", "model.config.num_layers", 26),
        ("nam56r_tiny(log_dir='a,b')", "log.explicit_log_dir", "a,b"),
        ("nam56r_tiny(depth=24,log_dir=it's)", "log.explicit_log_dir", "it's"),
    ],
)
def test_a_recipe_takes_lists_as_arguments(nemo, factory, path, value):
    from megacpp_nemo.recipes.explain import value_at

    assert value_at(nemo.resolved(factory), path) == value


def test_a_data_part_takes_a_list(nemo):
    data = nemo.resolved(
        "nam56r", "data=indexed_files(paths=['30','/data/a','70','/b'],tokenizer_dir=/t)"
    ).data
    assert data.paths == ["30", "/data/a", "70", "/b"]
    assert data.tokenizer_dir == "/t"


def test_installing_twice_changes_nothing():
    from nemo_run.cli import cli_parser

    from megacpp_nemo.recipes import reading

    before = cli_parser.parse_factory, cli_parser.TypeParser.parse
    reading.install()
    assert (cli_parser.parse_factory, cli_parser.TypeParser.parse) == before
