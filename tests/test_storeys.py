"""The storeys of the house: imports go downwards only.

Ground (contract, planner, lowering) needs the standard library and itself; the middle (model,
spec, callbacks, data, syntax, host) does not import the roof (recipes, launch, report, doctor,
runs, cli).
Every import counts, also one inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megacpp_nemo"
GROUND = ("contract", "planner", "lowering")
MIDDLE = ("model", "spec", "callbacks", "data", "syntax", "host")
ROOF = ("recipes", "launch", "report", "cli", "doctor", "runs")


def files() -> Iterator[tuple[str, Path]]:
    """Yield every module of the package as (dotted name, file); `recipes/` is installed as one."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        yield ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)), path


def imported(module: str, source: str) -> set[str]:
    """Return the dotted names that `source`, the text of `module`, imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from megacpp_nemo import model` imports a storey by its last word.
            names |= {f"{base}.{alias.name}" if base == PACKAGE else base for alias in node.names}
    return names


def at_once(source: str) -> str:
    """Return what of `source` runs when it is imported: not functions, nor what types need."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typed or isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def storey(name: str) -> str:
    """Return the folder of the package that a dotted name lies in; empty outside of it."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else ""


def upward_imports(module: str, source: str) -> set[str]:
    """Return what `module` imports that its storey may not."""
    names = imported(module, source)
    if storey(module) in GROUND:
        own = {PACKAGE, f"{PACKAGE}.__version__"}
        return {
            name
            for name in names - own
            if name.partition(".")[0] not in sys.stdlib_module_names and storey(name) not in GROUND
        }
    if storey(module) in MIDDLE:
        return {name for name in names if storey(name) in ROOF}
    return set()


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in files()])
def test_a_module_imports_only_its_own_storey_and_those_below(module, path):
    assert upward_imports(module, path.read_text()) == set()


def test_every_room_is_in_a_storey():
    rooms = {storey(module) for module, path in files() if path.parent != ROOT / PACKAGE}
    assert rooms <= {*GROUND, *MIDDLE, *ROOF}
    assert rooms >= {"contract", "lowering", "model", "spec", "recipes", "launch", "cli"}


def test_the_command_line_needs_no_more_than_the_ground_storey():
    """`megacpp` starts at once and runs without torch and NeMo.

    `generate` and `launch` run a model, `data` reads and writes corpora, and they import what that
    needs only then: when they start, they are as the others are.
    """
    for module, path in files():
        if storey(module) == "cli":
            source = path.read_text()
            later = module.endswith((".generate", ".launch", ".data_build", ".data_inspect"))
            later |= module.endswith((".data_verify", ".data_summary"))
            names = imported(module, at_once(source) if later else source)
            above = {name for name in names if storey(name) in (*MIDDLE, "recipes", "launch")}
            outside = {name for name in names if name.partition(".")[0] in ("torch", "nemo")}
            assert not above | outside, module


@pytest.mark.parametrize(
    ("module", "source", "refused"),
    [
        ("megacpp_nemo.contract.x", "import torch", "torch"),
        ("megacpp_nemo.contract.x", "def f():\n    import numpy.linalg", "numpy.linalg"),
        ("megacpp_nemo.planner.x", "from megacpp_nemo import model", "megacpp_nemo.model"),
        ("megacpp_nemo.lowering.x", "from ..host import compat", "megacpp_nemo.host"),
        ("megacpp_nemo.lowering.x", "from .. import data", "megacpp_nemo.data"),
        ("megacpp_nemo.model.x", "from megacpp_nemo.cli import main", "megacpp_nemo.cli"),
        ("megacpp_nemo.data.x", "import megacpp_nemo.launch.slurm", "megacpp_nemo.launch.slurm"),
        ("megacpp_nemo.host.x", "from megacpp_nemo import recipes", "megacpp_nemo.recipes"),
        ("megacpp_nemo.spec.x", "from ..recipes import build", "megacpp_nemo.recipes"),
    ],
)
def test_an_upward_import_is_seen(module, source, refused):
    assert upward_imports(module, source) == {refused}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megacpp_nemo.contract.x", "import os.path\nfrom __future__ import annotations"),
        ("megacpp_nemo.planner.x", "from megacpp_nemo.contract import recipe"),
        (
            "megacpp_nemo.lowering.x",
            "from . import table\nfrom ..contract.errors import RecipeError",
        ),
        ("megacpp_nemo.lowering.x", "from megacpp_nemo import __version__"),
        ("megacpp_nemo.model.x", "import torch\nfrom megacpp_nemo.host import compat"),
        ("megacpp_nemo.recipes.x", "import nemo_run\nfrom megacpp_nemo import cli, model"),
    ],
)
def test_a_downward_import_is_allowed(module, source):
    assert upward_imports(module, source) == set()
