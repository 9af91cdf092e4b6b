"""The values of one flag, from text to what a release's parser would set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megacpp_nemo.lowering.releases import Flag

SWITCHES = ("store_true", "store_false", "store_const", "count", "boolean_optional")


class Wrong(NamedTuple):
    """One thing that is wrong with an argument vector.

    Args:
        where: Flag or text.
        what: What is wrong with it, to follow `where`.
        hint: What to try.
        allowed: What would have been accepted, if there is more to say than the flags.
    """

    where: str
    what: str
    hint: str
    allowed: str = ""


def converted(flag: Flag, spelling: str, texts: tuple[str, ...], joined: bool) -> Any:
    """Return the value that `flag`, spelled so, has with these values as text.

    Raises:
        ValueError: With a `Wrong` as its argument.
    """
    if flag.action in SWITCHES:
        if joined:
            raise ValueError(
                Wrong(spelling, "takes no value", hint=f"{spelling} alone", allowed="a bare flag")
            )
        return _switched(flag, spelling)
    if not _fits(flag.nargs, len(texts)):
        needed, count = _arity(flag.nargs), len(texts) or "none"
        hint = f"{spelling} {_example(flag)}; a value that begins with '-' is joined by '='"
        raise ValueError(
            Wrong(spelling, f"needs {needed} and has {count}", hint, f"{spelling}: {needed}")
        )
    if flag.nargs == "?" and not texts:
        return flag.const
    values = tuple(_one(flag, spelling, text) for text in texts)
    return values[0] if flag.nargs in (None, "?") else values


def spelled(flag: str, *values: str) -> list[str]:
    """Return a flag with its values as words that argparse takes for just that.

    A value that begins with a dash is joined by `=`, which takes one value.

    Raises:
        ValueError: With that value as its argument, if it is one of several.
    """
    dashed = [value for value in values if value.startswith("-")]
    if dashed and len(values) > 1:
        raise ValueError(dashed[0])
    return [f"{flag}={values[0]}"] if dashed else [flag, *values]


def _switched(flag: Flag, spelling: str) -> Any:
    if flag.action == "store_const":
        return flag.const
    if flag.action == "boolean_optional":
        return not spelling.startswith("--no-")
    return 1 if flag.action == "count" else flag.action == "store_true"


def _one(flag: Flag, spelling: str, text: str) -> Any:
    name, read = _READERS.get(flag.type or "str", ("text", str))
    try:
        value = read(text)
    except ValueError:
        article = f"{spelling}: {name}"
        raise ValueError(
            Wrong(spelling, f"is {text!r}, not {name}", f"{spelling} {_example(flag)}", article)
        ) from None
    if flag.choices is not None and value not in flag.choices:
        listed = ", ".join(map(str, flag.choices))
        raise ValueError(
            Wrong(
                spelling,
                f"is {text!r}, which is not one of its choices",
                f"{spelling} {flag.choices[0]}",
                f"{spelling}: {listed}",
            )
        )
    return value


def _fits(nargs: int | str | None, count: int) -> bool:
    if nargs is None:
        return count == 1
    if isinstance(nargs, int):
        return count == nargs
    return {"?": count <= 1, "*": True, "+": count >= 1}[nargs]


def _arity(nargs: int | str | None) -> str:
    if isinstance(nargs, int):
        return f"exactly {nargs} values"
    return {None: "exactly one value", "?": "at most one value", "+": "one value or more"}.get(
        nargs, "any number of values"
    )


def _example(flag: Flag) -> str:
    """Return a value that the flag takes, or the place of one."""
    if flag.choices:
        return str(flag.choices[0])
    if isinstance(flag.default, (int, float)) and not isinstance(flag.default, bool):
        return str(flag.default)
    place = {"int": "N", "float": "X"}.get(flag.type or "", "VALUE")
    return " ".join([place] * (flag.nargs if isinstance(flag.nargs, int) else 1))


def _frequency(text: str) -> Any:
    # A list expression (`[1]*3+[0]`) is kept as text: reading a command line runs nothing.
    return text if "[" in text else int(text)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("()").split(","))


_FREQUENCY = ("a whole number or a list expression", _frequency)
# Any other name is a function of the release that takes text it alone understands.
_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "int": ("a whole number", int),
    "float": ("a number", float),
    # As argparse does: `bool("false")` is True, since the text is not empty.
    "bool": ("text", bool),
    "moe_freq_type": _FREQUENCY,
    "la_freq_type": _FREQUENCY,
    "no_rope_freq_type": _FREQUENCY,
    "tuple_type": ("whole numbers separated by commas", _integers),
}
KNOWN_TYPES = (None, "str", "enum_type_handler", *_READERS)
