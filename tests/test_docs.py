"""The documentation shows what the code prints, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megacpp_nemo.cli.usage import COMMANDS
from megacpp_nemo.contract.pattern import BlockFamily
from tests.support.shown import shown_commands

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs"
SHOWN = shown_commands("megacpp")


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    # Strict: a link to nowhere, or a page outside the navigation, is an error.
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_shows_what_the_code_prints(pages):
    assert {"table.md", "matrix.md", "lowering.md", "commands.md"} <= {path.name for path in pages}
    stale = [path.name for path, text in pages.items() if path.read_text("utf-8") != text]
    assert not stale, "make docs renews them"


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_a_shown_command_is_one_that_is_taken(words):
    module = {command.name: command.module for command in COMMANDS}[words[0]]
    given = import_module(f"megacpp_nemo.cli.{module}").parser(words[0]).read(words[1:])
    assert given.words or given.rest or words[0] in ("doctor", "runs", "lift", "releases")


def test_every_command_is_shown_in_use():
    shown = {words[0] for words in SHOWN}
    for path in (ROOT / "README.md", *FOLDER.rglob("*.md")):
        if path.name != "commands.md":
            shown |= set(re.findall(r"^\$ megacpp (\w+)", path.read_text("utf-8"), re.MULTILINE))
    assert {command.name for command in COMMANDS} <= shown


@pytest.mark.parametrize("family", BlockFamily, ids=lambda family: family.letter)
def test_every_family_is_explained(family):
    assert f"| `{family.letter}` |" in (FOLDER / "concepts.md").read_text("utf-8")


def test_the_site_has_every_page_and_needs_nothing_from_elsewhere(site, pages):
    for path in (*FOLDER.rglob("*.md"), *pages):
        if path.is_relative_to(FOLDER):
            assert (site / path.relative_to(FOLDER)).with_suffix(".html").is_file()
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        fetched = re.findall(
            r"<(?:link|script|img)\b[^>]*?(?:href|src)=\"?(https?:[^\s\">]+)", text
        )
        assert not fetched, path.name


def test_the_reference_has_the_docstrings(site):
    page = (site / "reference" / "contract.html").read_text("utf-8")
    assert "megacpp_nemo.contract.recipe.HybridRecipe" in page
    assert "Structured intent for one hybrid language model" in page
    assert "megacpp_nemo.recipes.factories" in (site / "reference" / "recipes.html").read_text(
        "utf-8"
    )
