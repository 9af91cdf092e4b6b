"""The two commands of the README install once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files the Makefile reads, with an environment that looks installed."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stamps = (".venv/bin/python", ".venv/.installed", ".venv/.installed-dev")
    now = max(path.stat().st_mtime for path in tmp_path.rglob("*"))
    for place, name in enumerate(stamps):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now + 10 + place, now + 10 + place))
    return tmp_path


def commands(project: Path, target: str) -> str:
    done = subprocess.run(
        ["make", "-n", target], cwd=project, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("target", ["train", "test"])
def test_a_second_call_does_not_install_again(project: Path, target: str) -> None:
    assert "pip install" not in commands(project, target)


@pytest.mark.parametrize("name", ["pyproject.toml", "configs/constraints-cpu.txt"])
def test_changed_requirements_are_installed(project: Path, name: str) -> None:
    later = (project / ".venv/.installed-dev").stat().st_mtime + 100
    os.utime(project / name, (later, later))
    assert "pip install" in commands(project, "train")


def test_an_interrupted_install_is_done_again(project: Path) -> None:
    (project / ".venv/.installed").unlink()
    assert "pip install" in commands(project, "train")


def test_the_constraints_pin_torch_and_every_exact_requirement() -> None:
    pinned = (ROOT / "configs/constraints-cpu.txt").read_text().splitlines()
    assert "torch==2.13.0" in pinned
    for name in ("nemo-toolkit==2.7.3", "megatron-core==0.16.1", "nemo-run==0.11.1"):
        assert name in pinned
    assert not [line for line in pinned if "://" in line or "@ " in line]
