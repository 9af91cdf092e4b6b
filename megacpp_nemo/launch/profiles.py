"""Profiles: hardware, and how a recipe is laid over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacpp_nemo.contract.checks import kinds_of
from megacpp_nemo.contract.errors import MegaCppError, nearest
from megacpp_nemo.contract.parallelism import Parallelism, ParallelismMode
from megacpp_nemo.contract.training import Batch, Precision
from megacpp_nemo.launch.document import (
    GROUP,
    NUMBER,
    SWITCH,
    TEXT,
    TEXTS,
    VARIABLES,
    Document,
    Key,
    read,
)
from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.planner.gpus import GPUS

HARDWARE = {"nodes": "num_nodes", "devices_per_node": "devices_per_node"}
_FORMS: dict[Any, str] = {int: NUMBER, bool: SWITCH, str: TEXT}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Hardware and a layout of a recipe over it.

    Args:
        name: The file's, without its ending.
        about: What it is for, in a sentence.
        nodes: Machines.
        devices_per_node: Processes on each, one per GPU.
        gpu: The GPUs' name as the planner knows it; None for CPU cores.
        mode: Parallelism mode; None leaves the recipe's default.
        changes: Fields of the recipe by path: layout, batch, precision.
        launch: What it decides about the launch, its environment included.
        path: The file.
    """

    name: str
    about: str
    nodes: int
    devices_per_node: int
    gpu: str | None
    mode: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    launch: LaunchOptions = field(default_factory=LaunchOptions)
    path: Path

    @property
    def devices(self) -> int:
        """All processes."""
        return self.nodes * self.devices_per_node

    @property
    def hardware(self) -> str:
        """The hardware in words: `2 nodes x 8 H200`."""
        what = self.gpu.upper() if self.gpu else "CPU"
        machines = f"{self.nodes} nodes" if self.nodes > 1 else "1 node"
        return f"{machines} x {self.devices_per_node} {what}"


def _fields_of(owner: type, but: tuple[str, ...] = ()) -> dict[str, Key]:
    kinds = kinds_of(owner)
    return {name: Key(_FORMS[kind.type]) for name, kind in kinds.items() if name not in but}


KEYS = {
    "about": Key(TEXT, needed=True),
    "hardware": Key(
        GROUP,
        needed=True,
        keys={
            "nodes": Key(NUMBER, needed=True),
            "devices_per_node": Key(NUMBER, needed=True),
            "gpu": Key(TEXT),
        },
    ),
    "mode": Key(TEXT),
    "parallelism": Key(GROUP, keys=_fields_of(Parallelism, tuple(HARDWARE.values()))),
    "batch": Key(GROUP, keys=_fields_of(Batch)),
    "precision": Key(TEXT),
    "launch": Key(
        GROUP,
        keys={
            "cuda_graphs": Key(TEXTS),
            "blackwell": Key(SWITCH),
            "cache_dir": Key(TEXT),
            "data_workers": Key(NUMBER),
            "environment": Key(VARIABLES),
        },
    ),
}


def read_profile(path: Path) -> Profile:
    """Return the profile in a file.

    Raises:
        LaunchError: If it is none; the message has file, line and key.
    """
    document = read(path, KEYS)
    values = document.values
    hardware = values["hardware"]
    _check(document, hardware)
    return Profile(
        name=path.stem,
        about=values["about"],
        nodes=hardware["nodes"],
        devices_per_node=hardware["devices_per_node"],
        gpu=hardware.get("gpu"),
        mode=values.get("mode"),
        changes=_changes(document),
        launch=_launch(document),
        path=path,
    )


def _check(document: Document, hardware: Mapping[str, Any]) -> None:
    """Refuse values that no machine has, at their line."""
    for name in HARDWARE:
        if hardware[name] < 1:
            raise document.error(
                f"hardware.{name}",
                f"hardware.{name} cannot be {hardware[name]}",
                given=f"hardware.{name}: {hardware[name]}",
                allowed="a whole number, 1 or more",
                hint=f"{name}: 1",
            )
    gpu = hardware.get("gpu")
    if gpu is not None and gpu not in GPUS:
        raise document.error(
            "hardware.gpu",
            f"No GPU is known as {gpu!r}",
            given=f"hardware.gpu: {gpu}",
            allowed=", ".join(GPUS) + ", or null for CPU cores",
            hint=f"gpu: {nearest(gpu, GPUS) or 'h200'}",
        )


def _changes(document: Document) -> dict[str, Any]:
    """Return the recipe's fields that a file sets, by path; others stay the recipe's."""
    values = document.values
    changes: dict[str, Any] = {
        f"parallelism.{field}": values["hardware"][name] for name, field in HARDWARE.items()
    }
    for group in ("parallelism", "batch"):
        changes |= {f"{group}.{name}": value for name, value in values.get(group, {}).items()}
    for key, reader in (("precision", Precision), ("mode", ParallelismMode)):
        if key in values:
            try:
                reader.from_name(values[key])
            except MegaCppError as error:
                raise _at(document, key, error) from None
    if "precision" in values:
        changes["precision"] = values["precision"]
    return changes


def _launch(document: Document) -> LaunchOptions:
    launch = dict(document.values.get("launch", {}))
    if "cuda_graphs" in launch:
        launch["cuda_graphs"] = tuple(launch["cuda_graphs"])
    for name in [item.name for item in dataclasses.fields(LaunchOptions) if item.name in launch]:
        try:
            LaunchOptions(**{name: launch[name]})
        except MegaCppError as error:
            raise _at(document, f"launch.{name}", error) from None
    return LaunchOptions(**launch)


def _at(document: Document, key: str, error: MegaCppError) -> LaunchError:
    """Return an error of the contract as one of the file, at a key's line."""
    given = f"{key}: {error.given}"
    return document.error(
        key, error.what, given=given, allowed=str(error.allowed), hint=str(error.hint)
    )
