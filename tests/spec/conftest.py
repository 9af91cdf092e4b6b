"""Trees of Megatron-LM's releases, for the tests that run on more than the installed one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from a release to its tree; without trees the test is skipped."""
    folder = request.config.getoption("--megatron-sources", default=None)
    if folder is None:
        pytest.skip("reads Megatron-LM's sources: --megatron-sources DIR")

    def find(release: str) -> Path:
        found = Path(folder) / release
        if not found.is_dir():
            pytest.skip(f"there is no {release} in {folder}")
        return found.resolve()

    return find


@pytest.fixture
def on_release(tree, tmp_path) -> Callable[..., str]:
    """Return a function that runs a module of the tests on a release and returns its output."""

    def run(release: str, module: str, *arguments: str) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tree(release)), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run
