"""What the contract's tests share: catching a refusal, and doing what its hint says."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from megacpp_nemo.contract import HybridRecipe, MegaCppError, with_paths
from megacpp_nemo.contract.recipe import resolve_field

Refusal = TypeVar("Refusal", bound=MegaCppError)


def refusal(error: type[Refusal], act: Callable[..., object], *args: Any, **kwargs: Any) -> Refusal:
    """Return the error that `act` raises, once it is seen to have its four parts."""
    with pytest.raises(error) as caught:
        act(*args, **kwargs)
    return with_four_parts(caught.value)


def with_four_parts(error: Refusal) -> Refusal:
    assert error.what
    assert not error.what.endswith(".")
    assert None not in (error.given, error.allowed, error.hint)
    lines = str(error).splitlines()
    assert [line[:11] for line in lines[1:]] == ["  given:   ", "  allowed: ", "  try:     "]
    assert all(line[11:].strip() for line in lines[1:])
    return error


def settings(error: MegaCppError) -> dict[str, Any]:
    """Return the `field=value` settings that a hint begins with; none if it is only prose."""
    clause = str(error.hint).partition(", or ")[0]
    clause = re.sub(r"[\w.]+(?==)", lambda path: path[0].replace(".", "__"), clause)
    try:
        call = ast.parse(f"dict({clause})", mode="eval").body
    except SyntaxError:
        return {}
    assert isinstance(call, ast.Call)
    return {str(k.arg).replace("__", "."): ast.literal_eval(k.value) for k in call.keywords}


def follow_hints(
    base: HybridRecipe, changes: dict[str, Any], *, steps: int = 12
) -> tuple[HybridRecipe, list[MegaCppError]]:
    """Change `base`, do what each refusal says, and return the recipe that came of it.

    `changes` holds full paths, so that a hint which names a field by its last word can be told
    from the path that was changed.
    """
    refusals: list[MegaCppError] = []
    changes = dict(changes)
    for _ in range(steps):
        try:
            return with_paths(base, changes), refusals
        except MegaCppError as error:
            refusals.append(with_four_parts(error))
        advice = settings(refusals[-1])
        assert advice, f"no setting to follow in:\n{refusals[-1]}"
        for name, value in advice.items():
            same = [path for path in changes if path.rpartition(".")[2] == name]
            changes[same[0] if len(same) == 1 else resolve_field(name)] = value
    raise AssertionError("hints lead nowhere:\n" + "\n".join(map(str, refusals)))
