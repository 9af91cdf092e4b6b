"""Errors a user can act on.

Every message has four parts: what is wrong, what was given, what is allowed, what to try.
Where a hint is `field=value`, following it removes the error.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class MegaCppError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: What is wrong, as a sentence without a final full stop.
        given: The offending value, shown as it was received.
        allowed: The values or the rule that would have been accepted.
        hint: What to try next.
    """

    def __init__(
        self,
        what: str,
        *,
        given: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.given, self.allowed, self.hint = what, given, allowed, hint
        lines = [what]
        if given is not None:
            lines.append(f"  given:   {_shown(given)}")
        if allowed is not None:
            lines.append(f"  allowed: {_shown(allowed)}")
        if hint is not None:
            lines.append(f"  try:     {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling of exceptions,
        # and launchers carry errors between processes.
        parts: dict[str, Any] = {"given": self.given, "allowed": self.allowed, "hint": self.hint}
        return functools.partial(type(self), self.what, **parts), ()


class PatternError(MegaCppError):
    """A layer pattern that cannot be read, or does not fit its depth."""


class RecipeError(MegaCppError):
    """A recipe whose settings contradict each other, or a name that no recipe has."""


class LoweringError(MegaCppError):
    """A recipe that has no faithful form on the chosen Megatron release."""


class RuntimeRefusal(MegaCppError):  # noqa: N818 - a refusal is what it is
    """A run that would be silently wrong, or that this machine cannot do."""


class DataError(MegaCppError):
    """Input data that is missing, unusable or damaged."""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the entry of `known` closest in spelling to `name`, or None if none is close."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def lookup(
    known: Mapping[str, Entry],
    name: object,
    *,
    what: str,
    field: str | None = None,
    error: type[MegaCppError] = RecipeError,
) -> Entry:
    """Return the entry of `known` called `name`, an enum member or text in any case.

    Args:
        known: Entries by lower-case name.
        name: What the user wrote.
        what: First line of the error.
        field: Field that the hint sets; without it the hint is the closest name alone.
        error: Class of the error.

    Raises:
        MegaCppError: Of class `error`, if there is no such entry.
    """
    key = str(getattr(name, "value", name)).lower()
    if key in known:
        return known[key]
    suggestion = repr(nearest(key, known) or next(iter(known)))
    raise error(
        what,
        given=repr(name),
        allowed=", ".join(known),
        hint=f"{field}={suggestion}" if field else suggestion,
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
