"""The entry point: registered, and unable to fail."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from tests.support.processes import in_process

BREAK = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "megacpp_nemo.recipes":
            raise {error}
sys.meta_path.insert(0, Broken())
import megacpp_nemo.plugin as plugin
print(type(plugin.IMPORT_ERROR).__name__)
"""


def test_the_package_names_its_entry_point():
    points = metadata.entry_points(group="nemo_run.cli")
    assert [point.value for point in points if point.name == "megacpp"] == ["megacpp_nemo.plugin"]


@pytest.mark.parametrize(
    "error",
    ["ImportError('no module of that kind')", "SystemExit(3)", "RuntimeError('two\\nlines')"],
)
def test_a_failing_import_of_the_recipes_is_reported_and_not_raised(error):
    done = subprocess.run(
        [sys.executable, "-c", BREAK.format(error=error)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.strip() == error.partition("(")[0]
    assert "megacpp_nemo: the recipes could not be loaded" in done.stderr
    for part in ("given:", "allowed:", "try:"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def load_again() -> str:
    import importlib

    import megacpp_nemo.recipes  # noqa: F401 - imported once by the parent already

    plugin = importlib.import_module("megacpp_nemo.plugin")
    return repr(plugin.IMPORT_ERROR)


def test_a_working_import_reports_nothing(nemo, capfd):
    assert in_process(load_again) == "None"
    assert "could not be loaded" not in capfd.readouterr().err
