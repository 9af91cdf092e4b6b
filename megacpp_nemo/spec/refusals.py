"""What the name of a spec may not ask for: settings nobody reads, and what is not built.

Every reason is collected, so that one message names all there is to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.shapes import AuthorMambaShape, RecurrentShape, SparseAttentionShape
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.rows_plasticity import SWITCHES
from megacpp_nemo.lowering.seams import SEAMS
from megacpp_nemo.lowering.spec_name import MODEL, SpecName, written
from megacpp_nemo.spec.layers import (
    AUTHOR_MAMBA,
    BUILT,
    CHUNK_SIZE,
    CONV_WIDTH,
    MAMBA_PATH,
    RECOMPUTE,
    RECURRENT,
    SPARSE_ATTENTION,
)


class Reason(NamedTuple):
    """One thing that is refused.

    Args:
        what: What it is, in words.
        given: The part of the name that asks for it.
        off: What turns it off in a recipe.
    """

    what: str
    given: str
    off: str


class Unbuilt(NamedTuple):
    """What the name can carry and only a NeMo run has yet.

    Args:
        asked: Fields that ask for it, wherever they hold something.
        shapes: How the fields that only shape it begin.
        what: What it is, in words.
        off: What turns it off in a recipe.
    """

    asked: tuple[str, ...]
    shapes: str
    what: str
    off: str


_UNBUILT: tuple[Unbuilt, ...] = (
    Unbuilt(
        ("features.ngram_hash",),
        "model.embedding.ngram.",
        "the hashed n-gram memory, which only the NeMo recipe builds: a spec is of the stack, "
        "which gets no tokens",
        "features.ngram_hash=false",
    ),
    Unbuilt(
        ("features.structure",),
        "model.embedding.structure.",
        "the code-structure channels, which only the NeMo recipe builds: Megatron's batches have "
        "none",
        "features.structure=null",
    ),
    Unbuilt(
        ("model.mtp.num_layers",),
        "model.mtp.",
        "multi-token prediction (MTP), which this release builds for no hybrid model, and only "
        "the NeMo recipe does",
        "model.mtp.num_layers=0",
    ),
    Unbuilt(
        ("features.reset_state",),
        "features.reset_state",
        "a zero state at each document of a packed row: Megatron's pretraining hands its layers "
        "no document boundaries",
        "features.reset_state=false",
    ),
    *(
        Unbuilt(
            tuple(f"plasticity.{lever}.{switch}" for switch in switches),
            f"plasticity.{lever}.",
            f"{SEAMS[lever].what}: Megatron's own script runs no NeMo callbacks",
            SEAMS[lever].off,
        )
        for lever, switches in SWITCHES.items()
    ),
)


def refuse_unbuilt(name: SpecName) -> None:
    """Refuse the name of a spec that asks for what no layer would carry out.

    Raises:
        RuntimeRefusal: Naming every such thing and what turns it off.
    """
    reasons = [*_roles(name), *_features(name), *_settings(name)]
    if reasons:
        raise RuntimeRefusal(
            "The spec asks for what is not built here:\n    "
            + "\n    ".join(reason.what for reason in reasons),
            given=", ".join(reason.given for reason in reasons),
            allowed="layers and settings that a layer of the model carries out",
            hint=", ".join(dict.fromkeys(reason.off for reason in reasons)),
        )


def _roles(name: SpecName) -> Iterator[Reason]:
    asked = dict.fromkeys(layer for layer in (*name.layers, *name.mtp) if layer.custom)
    for layer in asked:
        if layer.role in BUILT:
            continue
        yield Reason(
            f"{layer.role.words} of this package",
            f"layers with {layer.letter!r}",
            f"a small {layer.role.value!r}",
        )


def _features(name: SpecName) -> Iterator[Reason]:
    for thing in _UNBUILT:
        asking = [path for path in thing.asked if name.settings.get(path)]
        if asking:
            given = ", ".join(_shown(path, name.settings[path]) for path in asking)
            yield Reason(thing.what, given, thing.off)


def _settings(name: SpecName) -> Iterator[Reason]:
    """Yield settings that nobody reads, and settings that a layer lacks."""
    custom = {layer.role for layer in (*name.layers, *name.mtp) if layer.custom}
    wanted = dict.fromkeys(_wanted(custom))
    for path, value in name.settings.items():
        read = path in wanted or _stacks(path, value) or _path(path, custom)
        if not read and not _explained(path, name):
            yield Reason(
                f"no layer of the model reads {path}", _shown(path, value), "the name without it"
            )
    for path in wanted:
        if path not in name.settings:
            short = path.removeprefix(MODEL)
            yield Reason(
                f"the layers that need {path} are not told it",
                f"no {short}",
                f"{short}=VALUE in the name",
            )


def _wanted(custom: set[Role]) -> Iterator[str]:
    if Role.RECURRENT in custom:
        yield from (f"{RECURRENT}{item.name}" for item in fields(RecurrentShape))
    if Role.SPARSE_ATTENTION in custom:
        names = [item.name for item in fields(SparseAttentionShape) if item.name != "a_ranks"]
        yield from (f"{SPARSE_ATTENTION}{name}" for name in names)
    if Role.AUTHOR_MAMBA in custom:
        yield from (f"{AUTHOR_MAMBA}{item.name}" for item in fields(AuthorMambaShape))
    if Role.MAMBA in custom:
        yield from (CONV_WIDTH, CHUNK_SIZE)


def _explained(path: str, name: SpecName) -> bool:
    """Whether a setting only shapes what is refused already, or asks for nothing."""
    shapes = [
        thing.shapes for thing in _UNBUILT if any(name.settings.get(asked) for asked in thing.asked)
    ]
    return any(path.startswith(prefix) for prefix in shapes) or (
        path in {asked for thing in _UNBUILT for asked in thing.asked}
    )


def _path(path: str, custom: set[Role]) -> bool:
    """Whether a setting demands a path of Mamba layers that stand in the name."""
    return path == MAMBA_PATH and bool({Role.MAMBA, Role.AUTHOR_MAMBA} & custom)


def _stacks(path: str, value: Any) -> bool:
    """Whether a setting is one that the stack carries out, whatever its layers are."""
    return (path, value) in (("precision", Precision.FP8_EXPERTS), (RECOMPUTE, "full"))


def _shown(path: str, value: Any) -> str:
    return f"{path.removeprefix(MODEL)}={written(value) if isinstance(value, tuple) else value}"
