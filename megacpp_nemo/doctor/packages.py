"""Installed packages against the package's own requirements. Nothing is imported.

The requirements and their bounds are those of the installed metadata, so a pin is written down
once, in `pyproject.toml`.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from megacpp_nemo.doctor.findings import Finding, State

OWN = "megacpp-nemo"
# What goes wrong with another release, or without it.
REASONS = {
    "leptonai": "nemo-run imports leptonai.api.v1, which later releases no longer have: no "
    "`nemo` command starts",
    "nvidia-modelopt": "without it nemo.collections.llm imports, and has no `pretrain`",
    "megatron-core": "the adapters between NeMo and Megatron-Core fit this release alone",
    "nemo-toolkit": "`nemo llm` ends with this release",
    "nemo-run": "it runs the `nemo` command, and loads this plugin",
    "triton": "Megatron's Mamba modules import it, on a CPU too: without it no recipe is found",
    "numpy": "packages below are built against its first major version",
    "pyarrow": "later releases need numpy 2",
    "torch": "everything that trains is built on it",
    "ml-dtypes": "onnx, which NeMo imports, asks for types that older ones lack",
    "tensorboard": "a run writes its curves with it",
}
# Needed, but left to an extra, because CUDA builds of torch bring their own.
NEEDED_EXTRA = "triton"
# Some builds of torch bring triton under another name.
OTHER_NAMES = {"triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-xpu")}
IMPORT_NAMES = {"triton": "triton"}


def package_findings() -> list[Finding]:
    """Return what the metadata of installed packages says."""
    try:
        required = metadata.requires(OWN)
        python = metadata.metadata(OWN).json.get("requires_python", "")
    except metadata.PackageNotFoundError:
        return [_not_installed()]
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except Exception as error:
        return [_no_packaging(error)]
    needed = [Requirement(text) for text in required or ()]
    return [
        _python(SpecifierSet(str(python))),
        *(_package(requirement) for requirement in _unconditional(needed)),
    ]


def pip(requirement: object) -> str:
    """Return the command that installs a requirement."""
    return f"pip install '{requirement}'"


def requirement_of(distribution: str) -> str:
    """Return a requirement of ours with its bounds, as pip takes it; the bare name if none is."""
    try:
        from packaging.requirements import Requirement

        for text in metadata.requires(OWN) or ():
            requirement = Requirement(text)
            if _normal(requirement.name) == _normal(distribution):
                requirement.marker = None
                return str(requirement)
    except Exception:
        return distribution
    return distribution


def version_of(*names: str) -> str | None:
    """Return the version of the first of these distributions that is installed, or None.

    A damaged installation, whose metadata names no version, is `unknown`.
    """
    found: list[str] = []
    for name in names:
        try:
            found.append(metadata.version(name) or "unknown")
        except Exception:
            continue
    whole = [version for version in found if version != "unknown"]
    return next(iter(whole or found), None)


def installed(module: str) -> bool:
    """Return whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _unconditional(requirements: list[Any]) -> Iterator[Any]:
    """Yield the requirements that hold here, each once."""
    seen = set()
    for requirement in requirements:
        extras = ("", NEEDED_EXTRA)
        marker = requirement.marker
        name = _normal(requirement.name)
        if name not in seen and (
            marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
        ):
            seen.add(name)
            requirement.marker = None
            yield requirement


def _package(requirement: Any) -> Finding:
    name = _normal(requirement.name)
    version = version_of(*OTHER_NAMES.get(name, (name,)))
    if version is None and name in IMPORT_NAMES and installed(IMPORT_NAMES[name]):
        version = "of unknown version"
    reason = REASONS.get(name, "a run or its data needs it")
    if version is None:
        state, found, says = State.BROKEN, "not installed", reason
    elif requirement.specifier and not _fits(requirement.specifier, version):
        state, found = State.BROKEN, f"{version}, where {requirement.specifier} is needed"
        says = reason
    else:
        state, found, says = State.OK, version, ""
    fix = "" if state is State.OK else pip(requirement)
    return Finding(
        key=f"package.{name}", name=requirement.name, state=state, found=found, says=says, fix=fix
    )


def _fits(specifier: Any, version: str) -> bool:
    try:
        return bool(specifier.contains(version, prereleases=True))
    except Exception:
        return False


def _python(specifier: Any) -> Finding:
    version = platform.python_version()
    fits = _fits(specifier, version)
    return Finding(
        key="machine.python",
        name="Python",
        state=State.OK if fits else State.BROKEN,
        found=version if fits else f"{version}, where {specifier} is needed",
        says="" if fits else "the packages below have no release that fits both",
        fix="" if fits else "python3.11 -m venv .venv",
    )


def _not_installed() -> Finding:
    return Finding(
        key=f"package.{OWN}",
        name=OWN,
        state=State.BROKEN,
        found="not installed",
        says="it is imported from its sources: NeMo-Run finds a plugin by its installation, and "
        "the releases that it needs stand in its metadata",
        fix="pip install -e '.[triton]'",
    )


def _no_packaging(error: Exception) -> Finding:
    return Finding(
        key="package.packaging",
        name="packaging",
        state=State.BROKEN,
        found=f"{type(error).__name__}: {error}",
        says="most packages need it; without it versions cannot be compared",
        fix=pip("packaging"),
    )


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
