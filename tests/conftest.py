"""Order of the tests: those that fork come before those that leave threads behind.

That is so in every worker of pytest-xdist too, which `--dist loadfile` hands files in their order.

Small C++ sources and one starting checkpoint are shared by every run of a test.

`--megatron-sources DIR` turns on the tests that read real Megatron-LM trees, `DIR/<release>/`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# One core for each worker, and for each process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Workers are started with the size of a terminal that is not theirs.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)
# With another test on the other core, an example now and then takes longer than the rest. Where a
# change is judged it meets the same examples as the last one did; elsewhere they are drawn anew.
settings.register_profile("suite", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from starting with the files that have the most tests."""
    config.option.loadscopereorder = False


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the folder of Megatron-LM trees."""
    parser.addoption(
        "--megatron-sources",
        type=Path,
        metavar="DIR",
        help="folder of Megatron-LM trees, each called after its release (0.16.1, ...)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the data tests last.

    They train tokenizers and make process groups in the test process itself. Both leave threads
    that a forked child (`tests.support.processes`) does not have and would wait for.
    """
    items.sort(key=lambda item: "tests/data/" in item.nodeid)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of a corpus."""
    import megacpp_nemo.recipes  # noqa: F401 - forked runs share the import
    from tests.support.training import write_sources

    return write_sources(tmp_path_factory.mktemp("corpus") / "sources")


@pytest.fixture(scope="session")
def checkpoint(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by one process after two steps."""
    from tests.support.processes import in_process
    from tests.support.training import configure, small_recipe, train

    folder = tmp_path_factory.mktemp("start")

    def run() -> None:
        train(configure(small_recipe(), sources, folder, steps=2))

    in_process(run)
    return folder / "checkpoints" / "step=2"


@pytest.fixture(scope="module", autouse=True)
def _no_threads_of_process_groups(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where the tests of a file leave what makes every later forked run wait for ever."""
    yield
    if "tests/data/" not in request.node.nodeid:
        left = sorted(name for name in _threads() if "gloo" in name)
        assert not left, f"threads of a process group are left in the test process: {left}"


def _threads() -> Iterator[str]:
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            yield task.read_text().strip()
