"""Programs and folders of this machine: torchrun, nemo, a C compiler, a Megatron-LM tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.doctor.findings import Finding, State
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE, RELEASE_NAMES, load_release
from megacpp_nemo.lowering.tree import tree_version

REPOSITORY = "https://github.com/NVIDIA/Megatron-LM"
# Where a checkout usually lies: beside the work, at home, and in NVIDIA's containers.
USUAL_PLACES = (".", "Megatron-LM", "../Megatron-LM", "~/Megatron-LM", "/opt/megatron-lm")
COSTS = {
    "torchrun": "no run of several processes: launchers, `run.executor=...` and `megacpp launch` "
    "start torchrun by its name; a run of one process does not need it",
    "nemo": "`nemo llm pretrain` is not found by its name; from Python, `run.run(recipe)` works",
}


def program_findings() -> list[Finding]:
    """Return whether the programs that start a run are on PATH, and are this Python's."""
    return [_program(name) for name in COSTS]


def compiler_finding() -> Finding:
    """Return whether there is a C compiler; whether it works is found by compiling."""
    from megacpp_nemo.model.m2rnn_build import COMPILERS

    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    return compiler(found is not None, found or f"none of {', '.join(COMPILERS)} on PATH")


def compiler(works: bool, found: str) -> Finding:
    """Return the finding of a C compiler that works or not."""
    return Finding(
        key="lane.compiler",
        name="compiled M2RNN scan (C compiler)",
        state=State.OK if works else State.LIMITED,
        found=found,
        says="" if works else "R layers run in plain torch on a CPU, several times slower",
        fix="" if works else "apt-get install gcc libc6-dev",
    )


def tree_finding(given: str | None) -> Finding:
    """Return which Megatron-LM tree is there, and its release.

    Args:
        given: Folder that must be one; the usual places are looked at if not given.
    """
    if given is not None:
        try:
            return _tree(Path(given).expanduser(), tree_version(Path(given).expanduser()))
        except (LoweringError, OSError, ValueError) as error:
            return _tree_wrong(given, error)
    for place in _places():
        try:
            return _tree(place, tree_version(place))
        except (LoweringError, OSError, ValueError):
            continue
    return Finding(
        key="megatron_lm.tree",
        name="Megatron-LM tree",
        state=State.LIMITED,
        found="none in the usual places",
        says="a lowered command line needs a checkout to run in; lowering itself does not, nor "
        "does `nemo llm pretrain`",
        fix=f"git clone --branch core_v{DEFAULT_RELEASE} {REPOSITORY}",
    )


def _places() -> Iterator[Path]:
    for text in (*USUAL_PLACES, *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path):
        try:
            path = Path(text).expanduser()
            if text and path.is_dir():
                yield path.resolve()
        except (OSError, RuntimeError, ValueError):
            continue


def _tree(path: Path, version: str) -> Finding:
    known = [n for n in RELEASE_NAMES if load_release(n).package_version == version]
    release = f"Megatron-Core {version}, " + (f"known as {known[0]}" if known else "not known here")
    return Finding(
        key="megatron_lm.tree",
        name="Megatron-LM tree",
        state=State.OK if known else State.LIMITED,
        found=f"{path}: {release}",
        says="" if known else "no recipe can be lowered to it before its flags are read",
        fix="" if known else f"megacpp releases add {path}",
    )


def _tree_wrong(given: str, error: Exception) -> Finding:
    why = str(getattr(error, "given", None) or error)
    return Finding(
        key="megatron_lm.tree",
        name="Megatron-LM tree",
        state=State.BROKEN,
        found=why,
        says=f"{given} is not the root of a Megatron-LM checkout",
        fix=f"git clone {REPOSITORY} {given}",
    )


def _program(name: str) -> Finding:
    path = shutil.which(name)
    beside = Path(sys.executable).with_name(name)
    if path is None:
        state, found = State.LIMITED, "not on PATH"
        fix = f'export PATH="{beside.parent}:$PATH"' if beside.exists() else "pip install torch"
        if name == "nemo" and not beside.exists():
            fix = "pip install nemo-run"
        return _found(name, state, found, COSTS[name], fix)
    other = _other_python(Path(path))
    if other is None:
        return _found(name, State.OK, path)
    says = f"it runs {other}, not this Python ({sys.executable})"
    fix = f'export PATH="{beside.parent}:$PATH"'
    if not beside.exists():
        fix = f"{sys.executable} -m torch.distributed.run ... in its place"
        fix = fix if name == "torchrun" else f"{sys.executable} -m nemo_run ... in its place"
    return _found(name, State.LIMITED, path, says, fix)


def _found(name: str, state: State, found: str, says: str = "", fix: str = "") -> Finding:
    return Finding(
        key=f"machine.{name}", name=f"{name} on PATH", state=state, found=found, says=says, fix=fix
    )


def _other_python(script: Path) -> str | None:
    """Return the Python of a script's first line if its packages are not ours, or None."""
    try:
        with script.open("rb") as file:
            first = file.readline(500).decode("utf-8", "replace").strip()
    except OSError:
        return None
    if not first.startswith("#!") or "python" not in first or "/env " in first:
        return None
    interpreter = first[2:].split()[0]
    return None if _prefix(interpreter) == sys.prefix else interpreter


def _prefix(interpreter: str) -> str:
    """Return the environment that an interpreter belongs to; ours if it cannot be told."""
    if Path(interpreter).parent == Path(sys.executable).parent:
        return sys.prefix
    try:
        return subprocess.run(
            [interpreter, "-I", "-c", "import sys; print(sys.prefix)"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return sys.prefix
