"""Rules of levers against the model and the run they are for.

- `acted_layers`: the layers that a lever acts on
- `check_plasticity`: no lever names what the model lacks, selects nothing, or comes too late

A lever that is off is not checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from megacpp_nemo.contract.errors import RecipeError
from megacpp_nemo.contract.parameters import Parameter, ParameterKind, Part
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.contract.plasticity import Plasticity, RedoLever, StpLever
from megacpp_nemo.contract.training import Features

ATTENTION = (BlockFamily.ATTENTION, BlockFamily.SPARSE_ATTENTION)
# Fields that are whole numbers of steps, after which something first happens.
INTERVALS = ("interval", "report_interval")


def acted_layers(
    plasticity: Plasticity, name: str, layers: LayerPattern, features: Features
) -> tuple[int, ...]:
    """Return the 1-based numbers of the layers that a lever acts on; empty if it selects none.

    Args:
        plasticity: The levers.
        name: One of `LEVERS`, on or off.
        layers: Families by depth.
        features: What the layers are made of.
    """
    lever = getattr(plasticity, name)
    if isinstance(lever, StpLever):
        chosen = set(lever.layers or (len(layers),))
        return tuple(number for number in range(1, len(layers) + 1) if number in chosen)
    if isinstance(lever, RedoLever):
        own = _numbers(layers, (BlockFamily.EXPERTS,))
        return tuple(number for number in own if not lever.layers or number in lever.layers)
    samples = (_sample(number, family, features) for number, family in enumerate(layers, start=1))
    return tuple(
        sample.layer for sample in samples if sample.layer and not lever.selection.refusal(sample)
    )


def check_plasticity(
    plasticity: Plasticity,
    layers: LayerPattern,
    features: Features,
    *,
    context_parallel_size: int,
    train_steps: int,
) -> None:
    """Check that every lever that is on finds what it acts on, and acts before the run ends.

    Args:
        plasticity: The levers.
        layers: Families by depth.
        features: What the layers are made of.
        context_parallel_size: Ranks that share a row.
        train_steps: Optimizer steps of the run.

    Raises:
        RecipeError: If one does not, or the spans of STP would not fit on a rank.
    """
    for name in plasticity.on:
        _check_layers(plasticity, name, layers)
        _check_families(plasticity, name, layers)
        _check_selection(plasticity, name, layers, features)
        _check_steps(plasticity, name, train_steps)
    if plasticity.stp.on and context_parallel_size > 1:
        raise RecipeError(
            "STP compares positions all over a row, and context parallelism cuts rows apart",
            given=f"context_parallel_size={context_parallel_size} with plasticity.stp on",
            allowed="context_parallel_size=1, or STP off",
            hint="context_parallel_size=1",
        )


def _sample(number: int, family: BlockFamily, features: Features) -> Parameter:
    """Return a projection as a layer has one, for a selection to judge."""
    routed = family is BlockFamily.EXPERTS and features.experts
    return Parameter(
        name="",
        shape=(),
        kind=ParameterKind.PROJECTION,
        layer=number,
        family=family,
        expert=0 if routed else None,
        parts=(Part(name="", rows=(), query_key=family in ATTENTION),),
    )


def _numbers(layers: LayerPattern, families: Iterable[BlockFamily]) -> tuple[int, ...]:
    return tuple(number for number, family in enumerate(layers, start=1) if family in families)


def _check_layers(plasticity: Plasticity, name: str, layers: LayerPattern) -> None:
    lever, allowed = getattr(plasticity, name), range(1, len(layers) + 1)
    inside = [number for number in lever.layers if number in allowed]
    if len(inside) < len(lever.layers):
        _refuse(
            f"plasticity.{name} acts on layers that the model does not have",
            f"plasticity.{name}.layers={list(lever.layers)} of {len(layers)} layers",
            f"layers 1 to {len(layers)}",
            {f"{name}.layers": inside or [len(layers)]},
        )


def _check_families(plasticity: Plasticity, name: str, layers: LayerPattern) -> None:
    families = getattr(getattr(plasticity, name), "families", ())
    present = [each for each in families if BlockFamily.from_name(each) in layers.layers]
    if len(present) < len(families):
        _refuse(
            f"plasticity.{name} acts on families that the pattern does not have",
            f"plasticity.{name}.families={list(families)} with layers {layers}",
            ", ".join(family.letter for family in layers.counts()),
            {f"{name}.families": present or [layers.layers[0].letter]},
        )


def _check_selection(
    plasticity: Plasticity, name: str, layers: LayerPattern, features: Features
) -> None:
    lever = getattr(plasticity, name)
    found = acted_layers(plasticity, name, layers, features)
    if isinstance(lever, RedoLever):
        own = _numbers(layers, (BlockFamily.EXPERTS,))
        if not own:
            _refuse(
                "ReDo recycles units of expert layers, and the model has none",
                f"plasticity.redo on with layers {layers}",
                "a pattern that contains E, or ReDo off",
                {"redo.report_interval": 0, "redo.steps": []},
            )
        if set(lever.layers) - set(own):
            _refuse(
                "ReDo recycles units of expert layers only",
                f"plasticity.redo.layers={list(lever.layers)}",
                f"of layers {', '.join(map(str, own))}",
                {"redo.layers": list(found)},
            )
    elif not found:
        words = f"target={lever.target!r}, families={list(lever.families)}"
        experts = "" if features.experts else ", features.experts=False"
        _refuse(
            f"plasticity.{name} selects nothing in this model",
            f"{words}, layers={list(lever.layers)} with layers {layers}{experts}",
            "a target, families and layers that some layer has together",
            {f"{name}.target": "all", f"{name}.families": [], f"{name}.layers": []},
        )


def _check_steps(plasticity: Plasticity, name: str, train_steps: int) -> None:
    lever = getattr(plasticity, name)
    steps = getattr(lever, "steps", ())
    if any(step > train_steps for step in steps):
        inside = [step for step in steps if step <= train_steps]
        _refuse_late(name, "steps", list(steps), inside or [train_steps], train_steps)
    for field in INTERVALS:
        if getattr(lever, field, 0) > train_steps:
            _refuse_late(name, field, getattr(lever, field), train_steps, train_steps)
    if isinstance(lever, StpLever) and lever.weight > 0 and lever.start_step >= train_steps:
        _refuse_late(name, "start_step", lever.start_step, train_steps // 10, train_steps)


def _refuse_late(name: str, field: str, given: object, instead: object, train_steps: int) -> None:
    least = f"below {train_steps}" if field == "start_step" else f"up to {train_steps}"
    _refuse(
        f"plasticity.{name}.{field} comes after the run's last step, and would never happen",
        f"plasticity.{name}.{field}={given}, train_steps={train_steps}",
        f"steps {least}, the run's train_steps",
        {f"{name}.{field}": instead},
    )


def _refuse(what: str, given: str, allowed: str, instead: dict[str, object]) -> NoReturn:
    hint = ", ".join(f"plasticity.{path}={value!r}" for path, value in instead.items())
    raise RecipeError(what, given=given, allowed=allowed, hint=hint)
