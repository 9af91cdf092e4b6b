"""The imports that training needs, tried in a process of their own.

    python probe.py OUT

appends a JSON line to OUT as each step begins and ends, so that a step that crashes the process,
or hangs, is known by its name. The order is that of a run: torch first, then what stands on it.
Run as a script by `imports`; nothing else imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

GROUP = "nemo_run.cli"
GLOO_SECONDS = 60
LAST_FRAMES = 3
# Head width of the small recipes, for which the C code is compiled.
WIDTH = 16


def torch() -> dict[str, Any]:
    """Import torch."""
    module = importlib.import_module("torch")
    return {"version": str(module.__version__)}


def gloo() -> dict[str, Any]:
    """Add up a number over two processes. Forks, and so comes before CUDA is touched."""
    importlib.import_module("torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_forked(rank, Path(folder)) for rank in range(2)]
        said = [_outcome(pid, Path(folder, f"said{rank}")) for rank, pid in enumerate(ranks)]
    if wrong := [text for text in said if text != "2.0"]:
        raise RuntimeError(wrong[0] or "a process ended without a word")
    return {"processes": 2}


def _forked(rank: int, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        text = str(_sum(rank, folder))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    Path(folder, f"said{rank}").write_text(text, encoding="utf-8")
    os._exit(0)


def _sum(rank: int, folder: Path) -> float:
    from datetime import timedelta

    import torch as library
    import torch.distributed as groups

    groups.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=GLOO_SECONDS),
    )
    one = library.ones(1)
    groups.all_reduce(one)
    return float(one)


def _outcome(pid: int, said: Path) -> str:
    os.waitpid(pid, 0)
    return said.read_text(encoding="utf-8") if said.exists() else ""


def cuda() -> dict[str, Any]:
    """Count CUDA devices."""
    library = importlib.import_module("torch")
    built = library.version.cuda
    if not library.cuda.is_available():
        return {"built": built, "devices": []}
    count = library.cuda.device_count()
    return {"built": built, "devices": [library.cuda.get_device_name(i) for i in range(count)]}


def _optional(name: str, module: str) -> Callable[[], dict[str, Any]]:
    """Return a step that imports a package where it is installed."""

    def step() -> dict[str, Any]:
        if importlib.util.find_spec(name) is None:
            return {"installed": False}
        found = importlib.import_module(module)
        version = getattr(sys.modules[name], "__version__", None) or getattr(
            found, "__version__", ""
        )
        return {"installed": True, "version": str(version)}

    return step


def compiler() -> dict[str, Any]:
    """Compile the C code of M2RNN's scan, or read it from the cache."""
    from megacpp_nemo.model import m2rnn_build

    built = m2rnn_build.library(WIDTH)
    if isinstance(built, m2rnn_build.BuildError):
        return {"works": False, "why": str(built)}
    return {"works": True, "path": built._name}


def megatron() -> dict[str, Any]:
    """Import Megatron-Core."""
    module = importlib.import_module("megatron.core")
    return {"version": str(module.__version__), "path": str(Path(module.__file__ or "").parent)}


def entry_points() -> dict[str, Any]:
    """Load the plugins as NeMo-Run does: all of them, in order, each failure kept."""
    importlib.import_module("nemo_run.cli.api")
    points: list[dict[str, str]] = []
    for point in metadata.entry_points().select(group=GROUP):
        error = ""
        try:
            point.load()
        except Exception as raised:
            error = _told(raised)
        points.append({"name": point.name, "value": point.value, "error": error})
    return {"points": points}


def plugin() -> dict[str, Any]:
    """Say why the recipes could not be loaded, which the plugin keeps to itself, and count them."""
    module = importlib.import_module("megacpp_nemo.plugin")
    if (error := module.IMPORT_ERROR) is not None:
        raise error
    contract = importlib.import_module("megacpp_nemo.contract")
    factories = importlib.import_module("megacpp_nemo.recipes").FACTORIES
    return {"recipes": [name for name in contract.RECIPE_NAMES if name in factories]}


def pretrain() -> dict[str, Any]:
    """Import `pretrain`, whose absence NeMo hides."""
    module = importlib.import_module("nemo.collections.llm.api")
    return {"path": str(module.pretrain.__module__)}


def adapters() -> dict[str, Any]:
    """List the adapters, and which are in force."""
    from megacpp_nemo.host import compat

    force = compat.install()
    listed = [{"name": a.name, "reason": a.reason} for a in compat.ADAPTERS]
    return {"adapters": listed, "in_force": list(force)}


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch,
    "gloo": gloo,
    "cuda": cuda,
    "triton": _optional("triton", "triton"),
    "transformer_engine": _optional("transformer_engine", "transformer_engine.pytorch"),
    "mamba_ssm": _optional("mamba_ssm", "mamba_ssm"),
    "causal_conv1d": _optional("causal_conv1d", "causal_conv1d"),
    "compiler": compiler,
    "megatron": megatron,
    "entry_points": entry_points,
    "plugin": plugin,
    "pretrain": pretrain,
    "adapters": adapters,
}


def main(out: str) -> None:
    """Take every step, whatever became of those before it."""
    with open(out, "a", encoding="utf-8") as file:

        def tell(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        for name, step in STEPS.items():
            tell({"step": name, "begun": True})
            start = time.monotonic()
            try:
                entry = {"ok": True, **step()}
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                entry = {"ok": False, "error": _told(error), "missing": _missing(error)}
                entry["where"] = _where(error)
            tell({"step": name, "seconds": round(time.monotonic() - start, 2), **entry})


def _told(error: BaseException) -> str:
    """Return an error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _missing(error: BaseException) -> str:
    """Return the module whose absence is behind an error; empty if it is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ModuleNotFoundError) and seen.name:
            return seen.name
        seen = seen.__cause__
    return ""


def _where(error: BaseException) -> list[str]:
    """Return the last places that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    return [place for place in places if "importlib" not in place][-LAST_FRAMES:]


if __name__ == "__main__":
    # The folder of this script is no place to import from.
    if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]
    main(sys.argv[1])
    # A library's threads must not keep a finished probe alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
