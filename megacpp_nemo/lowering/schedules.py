"""The schedules of levers in a NeMo recipe's callbacks, read as one.

A recipe makes one `PlasticitySchedule`; more may stand in the trainer's list, wherever a user has
put them. The correspondence table knows them under one path, `SCHEDULE`, whatever their places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.plasticity import Plasticity
from megacpp_nemo.lowering.leaves import Leaves, name_of
from megacpp_nemo.lowering.rows_plasticity import DEFAULTS, NAMES, SCHEDULE

SCHEDULE_CLASS = "megacpp_nemo.callbacks.schedule.PlasticitySchedule"
# The classes below a schedule, by what follows its path.
SCHEDULE_NODES = {
    "plasticity": name_of(Plasticity),
    **{f"plasticity.{name}": name_of(type(getattr(DEFAULTS, name))) for name in NAMES},
}
_ENTRY = re.compile(r"(trainer\.callbacks(?:\[\d+\])?)(?:\.(.+))?")


def entry_of(path: str) -> tuple[str, str] | None:
    """Return the callback that a path lies in, and what follows it; None for other paths."""
    found = _ENTRY.fullmatch(path)
    return (found[1], found[2] or "") if found else None


def with_one_schedule(leaves: Leaves) -> Leaves:
    """Return the leaves with what every schedule sets under `SCHEDULE`.

    A lever that stands there as an object is taken apart as if it were a configuration. What is
    set to its default stays in its place: it says nothing.

    Raises:
        LoweringError: If two schedules set the same lever.
    """
    entries = [path for path, node in leaves.nodes.items() if name_of(node) == SCHEDULE_CLASS]
    values, nodes, places = dict(leaves.values), dict(leaves.nodes), dict(leaves.places)
    for entry in entries:
        for path in [path for path in nodes if f"{path}.".startswith(f"{entry}.")]:
            nodes[SCHEDULE + path.removeprefix(entry)] = nodes[path]
        own = [path for path in values if path.startswith(f"{entry}.")]
        for path in [path for path in own if not leaves.is_default(path)]:
            for ending, value in _apart(path.removeprefix(entry), values.pop(path), nodes):
                _refuse_twice(SCHEDULE + ending, entry, places)
                values[SCHEDULE + ending] = value
                places[SCHEDULE + ending] = entry + ending
    return replace(leaves, values=values, nodes=nodes, places=places)


def _apart(ending: str, value: Any, nodes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a value, an object of levers being a node of what differs in it."""
    if name_of(type(value)) != SCHEDULE_NODES.get(ending.lstrip(".")):
        yield ending, value
        return
    kind, plain = type(value), type(value)()
    nodes[SCHEDULE + ending] = kind
    for item in fields(kind):
        own = getattr(value, item.name)
        if own != getattr(plain, item.name):
            yield from _apart(f"{ending}.{item.name}", own, nodes)


def _refuse_twice(path: str, entry: str, places: dict[str, str]) -> None:
    """Refuse a lever that another schedule sets, too: which of them held could not be told."""
    lever, _, _ = path.rpartition(".")
    name = lever.rpartition(".")[2]
    others = [place for known, place in places.items() if known.startswith(f"{lever}.")]
    twice = [place for place in others if not place.startswith(f"{entry}.")]
    if name in NAMES and twice:
        here = f"{entry}.plasticity.{name}"
        raise LoweringError(
            f"The lever {name} ({NAMES[name]}) is set in two schedules",
            given=f"{', '.join(twice)}, and {here}",
            allowed="each lever in one PlasticitySchedule",
            hint=f"without {here}",
        )
