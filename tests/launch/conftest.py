"""A folder that looks like a Megatron-LM source tree, and NeMo-Run's experiments kept in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

ENTRY = """\
import json, os, pathlib, sys
rank = os.environ.get("RANK", "0")
told = {"argv": sys.argv[1:], "environment": dict(os.environ)}
pathlib.Path(os.environ["TOLD"], f"{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture
def megatron(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a tree of a version; its entry scripts tell what they got."""

    def make(version: str = "0.16.1") -> Path:
        root = tmp_path / f"Megatron LM's {version}"
        (root / "megatron" / "core").mkdir(parents=True)
        (root / "megatron" / "training").mkdir()
        parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
        lines = "\n".join(f"{name} = {number}" for name, number in parts)
        (root / "megatron" / "core" / "package_info.py").write_text(f"{lines}\n")
        (root / "megatron" / "training" / "arguments.py").write_text("")
        for name in ("pretrain_mamba.py", "pretrain_hybrid.py"):
            (root / name).write_text(ENTRY)
        return root

    return make


@pytest.fixture(autouse=True)
def _experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its dotted name it cannot be found: `nemo_run.run` is a function too.
    module = importlib.import_module("nemo_run.run.experiment")
    monkeypatch.setattr(module, "get_nemorun_home", lambda: str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
