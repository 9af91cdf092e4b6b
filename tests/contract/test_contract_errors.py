from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest

import megacpp_nemo.contract as contract
from megacpp_nemo.contract import MegaCppError, RecipeError, recipe
from megacpp_nemo.contract.errors import lookup, nearest

ERRORS = [
    contract.MegaCppError,
    contract.PatternError,
    contract.RecipeError,
    contract.LoweringError,
    contract.RuntimeRefusal,
    contract.DataError,
]
FOLDER = Path(contract.__file__).parent


def parts(error: MegaCppError) -> tuple[object, ...]:
    return type(error), error.what, error.given, error.allowed, error.hint, str(error), error.args


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(error, protocol):
    sent = error("Too wide", given=(1, 2), allowed=["a", "b"], hint="width=1")
    received = pickle.loads(pickle.dumps(sent, protocol))
    assert parts(received) == parts(sent)


def test_an_error_survives_copying_and_pickling_without_its_optional_parts():
    sent = MegaCppError("Too wide")
    assert str(sent) == "Too wide"
    assert parts(copy.copy(sent)) == parts(copy.deepcopy(sent)) == parts(sent)
    assert parts(pickle.loads(pickle.dumps(sent))) == parts(sent)


def test_a_raised_refusal_survives_pickling():
    with pytest.raises(RecipeError) as caught:
        recipe("nam57")
    assert parts(pickle.loads(pickle.dumps(caught.value))) == parts(caught.value)


def test_the_message_shows_the_four_parts_in_order():
    error = RecipeError("Too wide", given=3, allowed="1 or 2", hint="width=2")
    assert str(error).splitlines() == [
        "Too wide",
        "  given:   3",
        "  allowed: 1 or 2",
        "  try:     width=2",
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_every_error_of_the_contract_is_written_with_four_parts(path):
    """A refusal that no other test reaches still has all four."""
    names = {error.__name__ for error in ERRORS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
            given = {keyword.arg for keyword in node.keywords}
            assert given == {"given", "allowed", "hint"}, f"{path.name}:{node.lineno}"


def test_nearest_takes_anything_and_ignores_case():
    known = ("nemo_native", "author_dp")
    assert nearest("NEMO-native", known) == "nemo_native"
    assert nearest("quux", known) is None
    assert nearest(None, known) is None


def test_lookup_takes_any_case_and_suggests_what_is_close():
    known = {"one": 1, "three": 3}
    assert lookup(known, "THREE", what="Unknown number") == 3
    with pytest.raises(contract.DataError) as caught:
        lookup(known, "thre", what="Unknown number", field="n", error=contract.DataError)
    assert caught.value.given == "'thre'"
    assert caught.value.allowed == "one, three"
    assert caught.value.hint == "n='three'"
