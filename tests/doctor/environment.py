"""Environments to examine: folders of stub packages, alone on a Python's path of imports.

A stub imports what the real package imports where that matters, so that a fault shows as it does
in the real one: nemo-run needs `leptonai.api.v1`, NeMo's `api` needs `modelopt` and hides it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import packaging
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = {
    "torch/__init__.py": """
__version__ = "2.13.0"
class version: cuda = None
class cuda:
    @staticmethod
    def is_available(): return False
class ones:
    def __init__(self, size): self.value = 1.0
    def __float__(self): return self.value
""",
    "torch/distributed.py": """
def init_process_group(*args, **kwargs): pass
def all_reduce(tensor): tensor.value *= 2
""",
    "triton/__init__.py": '__version__ = "3.7.1"',
    "megatron/core/__init__.py": '__version__ = "0.16.1"',
    "leptonai/__init__.py": "",
    "leptonai/api/__init__.py": "",
    "leptonai/api/v1.py": "",
    "modelopt/__init__.py": "",
    "nemo_run/__init__.py": "import leptonai.api.v1",
    "nemo_run/cli/__init__.py": "",
    "nemo_run/cli/api.py": "",
    "nemo/collections/llm/__init__.py": """
try:
    from nemo.collections.llm.api import pretrain
except ImportError:
    pass
""",
    "nemo/collections/llm/api.py": "import modelopt\ndef pretrain(): pass",
    "megacpp_nemo/recipes/__init__.py": """
import nemo_run, triton, megatron.core, nemo.collections.llm
FACTORIES = {"nam56r": None, "nam56r_tiny": None, "nam56r_tiny_model": None}
""",
    "megacpp_nemo/launch/__init__.py": "",
    "megacpp_nemo/launch/factories.py": "import nemo_run.cli.api",
    "megacpp_nemo/host/compat.py": """
class Adapter: name, reason = "tensorstore", "a strategy is gone"
ADAPTERS = (Adapter,)
def install(): return ("tensorstore",)
""",
}


class Examined(NamedTuple):
    """What `megacpp doctor` said of an environment."""

    code: int
    said: str

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.said)

    @property
    def states(self) -> dict[str, str]:
        return {finding["key"]: finding["state"] for finding in self.data["findings"]}

    def finding(self, key: str) -> dict[str, Any]:
        return next(finding for finding in self.data["findings"] if finding["key"] == key)


class Environment:
    """A folder of packages with their metadata, and a folder of programs.

    Everything that training needs is there, and fits, until a test changes it.
    """

    def __init__(self, folder: Path) -> None:
        self.site, self.bin, self.home = folder / "site", folder / "bin", folder / "home"
        for made in (self.site, self.bin, self.home):
            made.mkdir(parents=True)
        self._own_package()
        for name, text in MODULES.items():
            self.module(name, text)
        (self.site / "packaging").symlink_to(Path(packaging.__file__).parent)
        for text in [*PROJECT["dependencies"], "triton"]:
            requirement = Requirement(text)
            self.distribution(requirement.name, fitting(requirement))
        for program in ("torchrun", "nemo"):
            self.program(program)

    def _own_package(self) -> None:
        """Link this package, but for what imports the real NeMo."""
        for inner in ("", "host"):
            made = self.site / "megacpp_nemo" / inner
            made.mkdir(exist_ok=True)
            for path in (ROOT / "megacpp_nemo" / inner).iterdir():
                if path.name not in ("host", "launch", "compat.py", "__pycache__"):
                    (made / path.name).symlink_to(path)
        required = [f"Requires-Dist: {text}" for text in PROJECT["dependencies"]]
        required.append('Requires-Dist: triton; extra == "triton"')
        python = f"Requires-Python: {PROJECT['requires-python']}"
        self.distribution("megacpp-nemo", "0.1.0", python, *required)
        points = "[nemo_run.cli]\nmegacpp = megacpp_nemo.plugin\n"
        self.metadata("megacpp-nemo", "entry_points.txt").write_text(points)

    def module(self, name: str, text: str) -> None:
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def distribution(self, name: str, version: str, *lines: str) -> None:
        path = self.metadata(name, "METADATA")
        path.parent.mkdir(exist_ok=True)
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
        path.write_text("\n".join(head) + "\n\n")

    def metadata(self, name: str, file: str) -> Path:
        return self.site / f"{name.replace('-', '_')}.dist-info" / file

    def without(self, *names: str) -> None:
        """Take away files and folders of the packages, and distributions by their names."""
        for name in names:
            dist = self.metadata(name, "").parent / f"{name.replace('-', '_')}.dist-info"
            for path in (self.site / name, dist):
                if path.is_symlink() or path.is_file():
                    path.unlink()
                elif path.is_dir():
                    for inner in sorted(path.rglob("*"), reverse=True):
                        inner.rmdir() if inner.is_dir() else inner.unlink()
                    path.rmdir()

    def program(self, name: str, text: str = "#!/bin/sh\n") -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def doctor(self, *words: str, form: str = "json", path: str = "") -> Examined:
        """Examine the environment by the command, in a Python that sees nothing else."""
        own = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "PYTHONPATH": f"{path}{os.pathsep * bool(path)}{self.site}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, "-S", "-m", "megacpp_nemo.cli", "doctor", "--format", form]
        done = subprocess.run(
            [*command, *words], env=own, cwd=self.home, capture_output=True, text=True, timeout=120
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Examined(done.returncode, done.stdout)


def fitting(requirement: Requirement) -> str:
    """Return a version that a requirement takes."""
    named = [one.version for one in requirement.specifier]
    return next(v for v in (*named, "1.0", "0.1") if requirement.specifier.contains(v))
