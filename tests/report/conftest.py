"""Recipes on a release, as pages and pictures are made from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megacpp_nemo.cli.given import read_recipe
from megacpp_nemo.report.subject import Subject, subject


@pytest.fixture(scope="session")
def on() -> Callable[..., Subject]:
    """Return `on(release, *words, gpu="h200") -> Subject`."""

    def read(release: str, *words: str, gpu: str = "h200") -> Subject:
        return subject(" ".join(words), read_recipe(words[0], words[1:]), release, gpu)

    return read
