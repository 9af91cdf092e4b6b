"""The set leaves of a NeMo-Run configuration, read by its shape alone.

A node of a `nemo_run.Partial` has `__fn_or_cls__` and `__arguments__`; nothing here imports
NeMo-Run or fiddle.
"""

from __future__ import annotations

import inspect
import numbers
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ABSENT = object()


@dataclass(frozen=True)
class Leaves:
    """A configuration taken apart.

    Args:
        values: Every set leaf by its path, spelled as on NeMo's command line
            (`trainer.callbacks[0].refresh_rate`); lists are tuples, and paths are text.
        nodes: The class or function of every node by its path; the configuration's own is at ``.
        places: Where a leaf stands that is known under another path than its own.
    """

    values: dict[str, Any]
    nodes: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)

    def place(self, path: str) -> str:
        """Return the path of a leaf as it is spelled on NeMo's command line."""
        return self.places.get(path, path)

    def default(self, path: str) -> Any:
        """Return what the owner of a leaf takes when it is not set; ABSENT if it does not say."""
        parent, _, name = path.rpartition(".")
        if parent not in self.nodes:
            return ABSENT
        try:
            parameters = inspect.signature(self.nodes[parent]).parameters
        except (TypeError, ValueError):
            return ABSENT
        default = parameters[name].default if name in parameters else ABSENT
        return ABSENT if default is inspect.Parameter.empty else plain(default)

    def effective(self, path: str) -> Any:
        """Return what a leaf holds, set or not; ABSENT if that cannot be told."""
        return self.values[path] if path in self.values else self.default(path)

    def is_default(self, path: str) -> bool:
        """Whether a set leaf holds no more than its owner would take without it."""
        value, default = self.values[path], self.default(path)
        return is_plain(value) and type(value) is type(default) and bool(value == default)


def is_node(thing: Any) -> bool:
    """Whether something is a configuration of a class or function."""
    held = getattr(thing, "__dict__", {})
    return "__fn_or_cls__" in held and isinstance(getattr(thing, "__arguments__", None), Mapping)


def read_leaves(configuration: Any) -> Leaves:
    """Return the leaves and nodes of a configuration."""
    nodes: dict[str, Any] = {}
    return Leaves(dict(_walk(configuration, "", nodes)), nodes)


def _walk(thing: Any, path: str, nodes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every set leaf below a thing; note each node's class or function by path."""
    if is_node(thing):
        nodes[path] = thing.__fn_or_cls__
        for name, value in thing.__arguments__.items():
            yield from _walk(value, f"{path}.{name}".lstrip("."), nodes)
    elif isinstance(thing, (list, tuple)) and any(map(_holds_node, thing)):
        for index, value in enumerate(thing):
            yield from _walk(value, f"{path}[{index}]", nodes)
    elif isinstance(thing, dict) and any(map(_holds_node, thing.values())):
        for key, value in thing.items():
            yield from _walk(value, f"{path}[{key!r}]", nodes)
    else:
        yield path, plain(thing)


def _holds_node(thing: Any) -> bool:
    if isinstance(thing, dict):
        return any(map(_holds_node, thing.values()))
    if isinstance(thing, (list, tuple)):
        return any(map(_holds_node, thing))
    return is_node(thing)


def plain(value: Any) -> Any:
    """Return a value with lists as tuples and paths as text."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, text, truths and nothing alone."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def name_of(thing: Any) -> str:
    """Return the dotted name of a class or function."""
    name = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return f"{getattr(thing, '__module__', '') or ''}.{name}".lstrip(".")


def shown(value: Any) -> str:
    """Return a value as an error shows it, on one line of moderate length."""
    text = " ".join(repr(value).split())
    if isinstance(value, numbers.Number) and not is_plain(value):
        text = f"{type(value).__name__}({text})"  # numpy's, say, which is shown as a plain one
    return text if len(text) < 60 else f"{text[:57]}..."
