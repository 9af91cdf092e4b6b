"""Order of the tests: those that fork come before those that leave threads behind.

`--megatron-sources DIR` turns on the tests that read real Megatron-LM trees, `DIR/<release>/`.
"""

from __future__ import annotations

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
