"""What a file's syntax tree says of types: its includes, its definitions, and what they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Definition:
    """An outermost named type: class, struct, union, enum, typedef or alias, outside of functions.

    Args:
        name: Without its namespaces and template arguments.
        uses: Names of types and scopes in it, sorted, without those that it declares itself.
    """

    name: str
    uses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What the dependency graph needs to know of one file.

    Args:
        includes: Included paths as written, without quotes or brackets, in their order.
        definitions: In their order; one name can have several, as specializations have.
        uses: Names of types used outside of its definitions, sorted.
    """

    includes: tuple[str, ...]
    definitions: tuple[Definition, ...]
    uses: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return lists and texts that JSON can hold."""
        return {
            "includes": list(self.includes),
            "definitions": [[item.name, list(item.uses)] for item in self.definitions],
            "uses": list(self.uses),
        }

    @classmethod
    def from_json(cls, parts: Mapping[str, Any]) -> FileFacts:
        """Return the facts that `to_json` gave."""
        return cls(
            includes=tuple(parts["includes"]),
            definitions=tuple(
                Definition(name=name, uses=tuple(uses)) for name, uses in parts["definitions"]
            ),
            uses=tuple(parts["uses"]),
        )
