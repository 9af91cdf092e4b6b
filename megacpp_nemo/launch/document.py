"""YAML files with a schema: what is wrong names the file, the line and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megacpp_nemo.contract.errors import nearest
from megacpp_nemo.launch.errors import LaunchError

TEXT, NUMBER, SWITCH, TEXTS, VARIABLES, GROUP = (
    "text",
    "a whole number",
    "true or false",
    "a list of texts",
    "texts by name",
    "keys with values",
)
_TAG = "tag:yaml.org,2002:"
_TYPES = {NUMBER: "int", SWITCH: "bool"}
_EXAMPLES = {TEXT: "text", NUMBER: "8", SWITCH: "true", TEXTS: "[one, two]", VARIABLES: "{A: '1'}"}


class Key(NamedTuple):
    """What a key of a file takes.

    Args:
        form: One of the forms above; text is taken as it is written, numbers too.
        needed: Whether the file must have it.
        keys: Its own keys, if it is a group.
    """

    form: str
    needed: bool = False
    keys: Mapping[str, Key] = {}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file that was read.

    Args:
        path: The file.
        values: What it says, by key; groups are dictionaries of their own.
        lines: Line of each key by its dotted path, counted from 1.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def error(self, key: str, what: str, *, given: str, allowed: str, hint: str) -> LaunchError:
        """Return the error of a key: where it stands comes first in what was given."""
        place = f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)
        return LaunchError(what, given=f"{place}: {given}", allowed=allowed, hint=hint)


def read(path: Path, keys: Mapping[str, Key]) -> Document:
    """Return what a file says. A key whose value is `null` is left out.

    Raises:
        LaunchError: If it cannot be read, is no YAML, has a key twice or one that is unknown, or a
            value of another form.
    """
    document = Document(path=path, values={})
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise LaunchError(
            "A file of a launch cannot be read",
            given=f"{path}: {(error.strerror or str(error)).lower()}",
            allowed="a YAML file that can be read",
            hint="another path, or a name",
        ) from None
    except UnicodeDecodeError:
        raise _not_yaml(path, 1, "it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise _not_yaml(path, mark.line + 1 if mark else 1, problem) from None
    if not isinstance(root, yaml.MappingNode):
        raise document.error(
            "",
            "A file of a launch has keys with values",
            given="no keys",
            allowed=", ".join(keys),
            hint=f"{next(iter(keys))}: ...",
        )
    document.values.update(_group(document, root, keys, ""))
    return document


def _not_yaml(path: Path, line: int, problem: str) -> LaunchError:
    return LaunchError(
        "A file of a launch is not YAML",
        given=f"{path}:{line}: {problem}",
        allowed="keys with values, one a line",
        hint=f"line {line} as 'key: value'",
    )


def _group(
    document: Document, node: yaml.MappingNode, keys: Mapping[str, Key], prefix: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in _entries(document, node, prefix):
        path = f"{prefix}{name}"
        if name not in keys:
            raise _unknown(document, path, name, keys)
        if not _is_null(value):
            values[name] = _value(document, path, value, keys[name])
    for name, key in keys.items():
        if key.needed and name not in values:
            raise document.error(
                prefix.rstrip("."),
                f"{prefix}{name} is missing",
                given=f"{prefix}{name} not set",
                allowed=key.form,
                hint=f"{name}: {_EXAMPLES.get(key.form, '...')}",
            )
    return values


def _entries(
    document: Document, node: yaml.MappingNode, prefix: str
) -> list[tuple[str, yaml.Node]]:
    """Return the keys of a mapping and their nodes, after noting where each stands."""
    found: list[tuple[str, yaml.Node]] = []
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        path, line = f"{prefix}{name}", key.start_mark.line + 1
        if path in document.lines:
            first = document.lines[path]
            document.lines[path] = line
            raise document.error(
                path,
                f"The key {path} stands twice",
                given=f"{path}, which stands on line {first} too",
                allowed="each key once",
                hint=f"line {line} left out",
            )
        document.lines[path] = line
        found.append((name, value))
    return found


def _unknown(document: Document, path: str, name: str, keys: Mapping[str, Key]) -> LaunchError:
    close = nearest(name, keys)
    return document.error(
        path,
        f"There is no key {path}",
        given=path,
        allowed=", ".join(keys) or "no keys here",
        hint=f"{close}: ..." if close else f"line {document.lines[path]} left out",
    )


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"


def _value(document: Document, path: str, node: yaml.Node, key: Key) -> Any:
    if key.form == GROUP and isinstance(node, yaml.MappingNode):
        return _group(document, node, key.keys, f"{path}.")
    if key.form == VARIABLES and isinstance(node, yaml.MappingNode):
        entries = _entries(document, node, f"{path}.")
        return {
            name: _value(document, f"{path}.{name}", entry, Key(TEXT)) for name, entry in entries
        }
    if key.form == TEXTS and isinstance(node, yaml.SequenceNode):
        return [_value(document, path, item, Key(TEXT)) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and not _is_null(node):
        if key.form == TEXT:
            return node.value
        if node.tag == f"{_TAG}{_TYPES.get(key.form)}":
            return yaml.SafeLoader("").construct_object(node)
    raise document.error(
        path,
        f"{path} takes {key.form}",
        given=f"{path}: {_shown(node)}",
        allowed=key.form,
        hint=f"{path.rpartition('.')[2]}: {_EXAMPLES.get(key.form, '')}".rstrip(),
    )


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.style in ("'", '"') else node.value or "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys with values"
