"""The documentation shows what the code prints, and its Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_every_page_shows_what_the_code_prints(pages):
    assert {"table.md", "matrix.md", "lowering.md"} <= {path.name for path in pages}
    stale = [path.name for path, text in pages.items() if path.read_text("utf-8") != text]
    assert not stale, "make docs renews them"


def test_the_python_of_the_pages_runs():
    blocks = [b for path in FOLDER.glob("*.md") for b in PYTHON.findall(path.read_text("utf-8"))]
    assert blocks
    for block in blocks:
        exec(block, {})
