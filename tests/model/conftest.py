"""One process with Megatron's groups of size 1, and machines that are not this one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

KERNELS = ("mamba_ssm", "causal_conv1d")


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Megatron ready in this process, for the tests of one module."""
    from tests.model.building import megatron

    with megatron():
        yield


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes this machine look like another."""
    import torch

    from megacpp_nemo.host import compat

    find_spec = importlib.util.find_spec

    def pretend(*, kernels: tuple[str, ...] = KERNELS, cuda: bool = True, engine: bool = True):
        def find(name: str, package: str | None = None) -> Any:
            if name in KERNELS:
                return object() if name in kernels else None
            return find_spec(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(compat, "transformer_engine_available", lambda: engine)

    return pretend
