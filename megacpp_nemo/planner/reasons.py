"""What came of a layout, and layouts that are out for the same reason in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megacpp_nemo.planner.gpus import GIB
from megacpp_nemo.planner.layouts import Allowed, Refused
from megacpp_nemo.planner.prediction import StepTime
from megacpp_nemo.planner.sizes import Sizes

Values = dict[str, tuple[int, ...]]


class Candidate(NamedTuple):
    """A layout that fits.

    Args:
        layout: Its parallel sizes and micro-batch.
        recompute: The least recomputation with which it fits.
        memory_bytes: Of a rank of its fullest stage.
        stage: 0-based, the fullest stage.
        time: The predicted step.
    """

    layout: Allowed
    recompute: str
    memory_bytes: int
    stage: int
    time: StepTime


class TooLarge(NamedTuple):
    """A layout that fits with no recomputation that was tried.

    Args:
        layout: Its parallel sizes and micro-batch.
        missing_bytes: What its fullest rank lacks.
    """

    layout: Allowed
    missing_bytes: int


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Layouts that are out for the same reason.

    Args:
        what: The reason; the contract's words where it is the contract's.
        count: How many layouts and micro-batches.
        values: Their values of the parallel sizes of which other layouts have none.
        given: An example.
        hint: What to try.
    """

    what: str
    count: int
    values: Values = field(default_factory=dict)
    given: str = ""
    hint: str = ""


def grouped(
    fitting: Sequence[Sizes],
    too_large: Sequence[TooLarge],
    refused: Sequence[Refused],
    room_bytes: int,
) -> tuple[Reason, ...]:
    """Return why layouts are out, those with the same reason together, most of them first.

    Args:
        fitting: Sizes of the layouts that fit.
        too_large: Those that do not, the least lack first.
        refused: Those that the contract refuses.
        room_bytes: Bytes that a rank may hold.
    """
    groups: dict[str, list[Refused]] = {}
    for found in refused:
        groups.setdefault(found.error.what, []).append(found)
    allowed = _values([*fitting, *(found.layout.sizes for found in too_large)])
    reasons = [_of_contract(what, own, allowed) for what, own in groups.items()]
    if too_large:
        reasons.append(_of_memory(too_large, _values(fitting), room_bytes))
    return tuple(sorted(reasons, key=lambda reason: -reason.count))


def _of_memory(too_large: Sequence[TooLarge], fitting: Values, room_bytes: int) -> Reason:
    least, most = too_large[0], too_large[-1]
    layout = least.layout
    return Reason(
        what=f"More memory than {room_bytes / GIB:.1f} GiB: {_gib(least)} to {_gib(most)} GiB are "
        "missing",
        count=len(too_large),
        values=_apart([found.layout.sizes for found in too_large], fitting),
        given=f"{layout.sizes}, {layout.micro_batch_size} rows: {_gib(least)} GiB missing",
        hint="more GPUs, or those with more memory",
    )


def _of_contract(what: str, own: Sequence[Refused], allowed: Values) -> Reason:
    error = own[0].error
    return Reason(
        what=what,
        count=len(own),
        values=_apart([refused.sizes for refused in own], allowed),
        given=str(error.given or ""),
        hint=str(error.hint or ""),
    )


def _values(every: Sequence[Sizes]) -> Values:
    """Return the values of each size that occur."""
    return {name: tuple(sorted({getattr(s, name) for s in every})) for name in Sizes._fields}


def _apart(every: Sequence[Sizes], others: Values) -> Values:
    """Return the values of the sizes of which the others have none."""
    own = _values(every)
    return {name: found for name, found in own.items() if not set(found) & set(others[name])}


def _gib(found: TooLarge) -> str:
    return f"{found.missing_bytes / GIB:.1f}"
