"""What the README shows is what happens, and the Python of every page runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megacpp_nemo.contract.families import FAMILIES
from tests.support.processes import in_process

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(PYTHON.findall(page.read_text(encoding="utf-8")))
]


def test_there_are_python_blocks_to_run() -> None:
    assert len(BLOCKS) > 8


@pytest.mark.parametrize("block", BLOCKS)
def test_a_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_run.config

    import megacpp_nemo.recipes  # noqa: F401 - the forked run shares the import

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nemo_run.config, "_NEMORUN_HOME", str(tmp_path))
    in_process(exec, compile(block, "the page", "exec"), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_in_the_table(family: str) -> None:
    assert f"| `{family}` |" in README


def test_the_tour_names_files_that_exist() -> None:
    tour = README.partition("## A guided tour")[2].partition("\n## ")[0]
    folders = [
        ROOT / name for name in ("megacpp_nemo/contract", "megacpp_nemo/lowering", "recipes")
    ]
    rooms = ("callbacks", "data", "host", "launch", "model", "planner")
    folders += [ROOT / "megacpp_nemo" / name for name in rooms]
    known = {path.name for folder in folders for path in folder.glob("*.py")}
    named = re.findall(r"`(\w+\.py)`", tour)
    assert len(named) > 20
    assert [name for name in named if name not in known] == []
