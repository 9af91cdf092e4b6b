"""Small C++ sources and one starting checkpoint, shared by every run of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import in_process
from tests.support.training import configure, small_recipe, train, write_sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import megacpp_nemo.recipes  # noqa: F401 - forked runs share the import

    return write_sources(tmp_path_factory.mktemp("corpus") / "sources")


@pytest.fixture(scope="session")
def checkpoint(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by one process after two steps."""
    folder = tmp_path_factory.mktemp("start")

    def run() -> None:
        train(configure(small_recipe(), sources, folder, steps=2))

    in_process(run)
    return folder / "checkpoints" / "step=2"
