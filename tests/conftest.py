"""Order of the tests: those that fork come before those that leave threads behind.

`--megatron-sources DIR` turns on the tests that read real Megatron-LM trees, `DIR/<release>/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest


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
