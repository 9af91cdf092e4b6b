"""One process with Megatron's groups of size 1."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Megatron ready in this process, for the tests of one module."""
    from tests.model.building import megatron

    with megatron():
        yield
