"""The contract needs the standard library alone, and starts at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "nemo", "nemo_run", "fiddle", "megatron", "numpy")
PROBE = f"""
import json, sys, time
start = time.process_time()
import megacpp_nemo.contract
seconds = time.process_time() - start
heavy = [name for name in {HEAVY!r} if name in sys.modules]
foreign = sorted({{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names)
print(json.dumps([seconds, heavy, foreign]))
"""


@pytest.fixture(scope="module")
def imports():
    """`[seconds, heavy modules, other modules]` of an import in each of three fresh processes.

    The seconds are of the processor: other tests run at the same time.
    """
    # -S: no site, whose .pth files may import anything before us; -E: no PYTHON* variables.
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROBE}"
    command = [sys.executable, "-S", "-E", "-c", script]
    return [json.loads(subprocess.check_output(command, text=True)) for _ in range(3)]


def test_importing_the_contract_imports_nothing_heavy(imports):
    assert [heavy for _, heavy, _ in imports] == [[]] * 3


def test_importing_the_contract_imports_only_the_standard_library(imports):
    for _, _, foreign in imports:
        assert set(foreign) <= {"__main__", "megacpp_nemo"}


def test_importing_the_contract_takes_less_than_a_tenth_of_a_second(imports):
    assert min(seconds for seconds, _, _ in imports) < 0.1
