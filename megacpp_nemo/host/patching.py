"""Reversible replacement of attributes in modules of others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_MISSING = object()


@dataclass
class Patches:
    """Attributes replaced so far, so that they can be put back."""

    _undo: list[tuple[Any, str, Any]] = field(default_factory=list)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, remembering what was there (or that nothing was)."""
        self._undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put every attribute back, the last replaced first."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def __bool__(self) -> bool:
        return bool(self._undo)
