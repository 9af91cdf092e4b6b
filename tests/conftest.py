"""Order of the tests: those that fork come before those that leave threads behind."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the data tests last.

    They train tokenizers and make process groups in the test process itself. Both leave threads
    that a forked child (`tests.support.processes`) does not have and would wait for.
    """
    items.sort(key=lambda item: "tests/data/" in item.nodeid)
