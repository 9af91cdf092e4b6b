"""Two lowerings side by side: flags, layers, seams and how they are launched.

The two are of one recipe on two releases, or of two recipes on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megacpp_nemo.lowering.lower import Lowering
from megacpp_nemo.lowering.policy import LaunchPolicy


@dataclass(frozen=True, kw_only=True)
class Change:
    """One flag that differs.

    Args:
        flag: The flag.
        before: Its values on the one side; None if it is not there.
        after: Its values on the other.
    """

    flag: str
    before: str | None
    after: str | None


@dataclass(frozen=True, kw_only=True)
class PolicyChange:
    """One thing of the launch that differs; None where one side does not say it."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """One layer whose symbol, role or owner differs; None where one side has no such layer."""

    number: int
    before: str | None
    after: str | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two lowerings side by side.

    Args:
        flags: Flags that differ, by name.
        layers: Layers that differ.
        policy: What differs of the launch: the entry script, its sizes, variables by their names.
        seams_gone: Ids of seams only the first has.
        seams_new: Ids of seams only the second has.
    """

    flags: tuple[Change, ...]
    layers: tuple[LayerChange, ...]
    policy: tuple[PolicyChange, ...]
    seams_gone: tuple[str, ...]
    seams_new: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as JSON's types."""
        return {
            "flags": [asdict(change) for change in self.flags],
            "layers": [asdict(change) for change in self.layers],
            "policy": [asdict(change) for change in self.policy],
            "seams_gone": list(self.seams_gone),
            "seams_new": list(self.seams_new),
        }


def difference(one: Lowering, other: Lowering) -> Difference:
    """Return how two lowerings differ, on one release or on two."""
    before, after = _flags(one), _flags(other)
    seams = [[seam.id for seam in lowering.seams] for lowering in (one, other)]
    return Difference(
        flags=tuple(
            Change(flag=flag, before=before.get(flag), after=after.get(flag))
            for flag in sorted(before.keys() | after.keys())
            if before.get(flag) != after.get(flag)
        ),
        layers=tuple(_layer_changes(one, other)),
        policy=tuple(_policy_changes(one, other)),
        seams_gone=tuple(name for name in seams[0] if name not in seams[1]),
        seams_new=tuple(name for name in seams[1] if name not in seams[0]),
    )


def _flags(lowering: Lowering) -> dict[str, str]:
    """Return the command line as flag and the text of its values."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in lowering.argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = [value] if equals else []
        else:
            found[flag].append(word)
    return {flag: " ".join(values) for flag, values in found.items()}


def _layer_changes(one: Lowering, other: Lowering) -> Iterator[LayerChange]:
    for index in range(max(len(one.layers), len(other.layers))):
        sides = [_told(lowering, index) for lowering in (one, other)]
        if sides[0] != sides[1]:
            yield LayerChange(number=index + 1, before=sides[0], after=sides[1])


def _policy_changes(one: Lowering, other: Lowering) -> Iterator[PolicyChange]:
    before, after = (_launch(lowering.policy) for lowering in (one, other))
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield PolicyChange(name=name, before=before.get(name), after=after.get(name))


def _launch(policy: LaunchPolicy) -> dict[str, str]:
    """Return what a launch policy says by name, flags aside."""
    return {
        "entry_script": policy.entry_script,
        "num_nodes": str(policy.num_nodes),
        "devices_per_node": str(policy.devices_per_node),
        **policy.environment,
    }


def _told(lowering: Lowering, index: int) -> str | None:
    if index >= len(lowering.layers):
        return None
    layer = lowering.layers[index]
    return f"{layer.symbol} {layer.role.words}, {layer.owner}"
