"""`megacpp doctor` in environments with one thing wrong, and in this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.environment import ROOT, Environment

LEPTON = "pip install 'leptonai<0.28,>=0.26.6'"
MODELOPT = "pip install 'nvidia-modelopt==0.37.0'"
CORE = "pip install 'megatron-core==0.16.1'"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_all_is_well_where_all_is_there(environment):
    result = environment.doctor()
    assert result.code == 0, result.said
    assert result.data["ok"]
    assert result.data["faults"] == result.data["fixes"] == []
    states = result.states
    assert states["plugin.entry_point"] == states["plugin.pretrain"] == states["lane.gloo"] == "ok"
    assert result.finding("plugin.entry_point")["found"] == "loads: 2 recipes"
    assert result.finding("adapters.tensorstore")["found"] == "in force"
    # What is only missing is told, with its cost, and is no fault.
    for key in ("lane.cuda", "lane.transformer_engine", "lane.mamba_ssm", "lane.compiler"):
        assert (states[key], bool(result.finding(key)["says"])) == ("limited", True)


def test_leptonai_too_new_is_named_and_its_pin_repairs_it(environment):
    environment.distribution("leptonai", "0.47.0")
    environment.without("leptonai/api/v1.py")
    result = environment.doctor()
    assert result.code == 1
    assert result.finding("package.leptonai")["found"] == "0.47.0, where <0.28,>=0.26.6 is needed"
    plugin = result.finding("plugin.entry_point")
    assert "No module named 'leptonai.api.v1'" in plugin["found"]
    assert "no `nemo` command starts" in plugin["says"]
    assert plugin["fix"] == LEPTON
    assert result.data["fixes"] == [LEPTON]
    assert environment.doctor("--quick").data["fixes"] == [LEPTON]


def test_a_missing_modelopt_is_named_though_nemo_hides_it(environment):
    environment.without("nvidia-modelopt", "modelopt")
    result = environment.doctor()
    assert result.code == 1
    assert result.data["faults"] == ["package.nvidia-modelopt", "plugin.pretrain"]
    assert "has no `pretrain`" in result.finding("package.nvidia-modelopt")["says"]
    assert "modelopt" in result.finding("plugin.pretrain")["found"]
    assert result.data["fixes"] == [MODELOPT]


def test_a_broken_entry_module_is_named_with_its_error_and_place(environment):
    environment.module("megacpp_nemo/recipes/__init__.py", "\n\nraise RuntimeError('no such luck')")
    result = environment.doctor()
    assert (result.code, result.data["faults"]) == (1, ["plugin.entry_point"])
    plugin = result.finding("plugin.entry_point")
    assert plugin["found"].startswith("RuntimeError: no such luck, at ")
    assert plugin["found"].endswith("recipes/__init__.py:3")
    assert "No matching factory found" in plugin["says"]
    assert plugin["fix"] == "python -c 'import megacpp_nemo.recipes'"


def test_an_entry_module_that_cannot_be_imported_at_all_is_named(environment):
    environment.without("megacpp_nemo/plugin.py")
    plugin = environment.doctor().finding("plugin.entry_point")
    assert plugin["state"] == "broken"
    assert "No module named 'megacpp_nemo.plugin'" in plugin["found"]


def test_an_entry_point_that_is_not_registered_is_named(environment):
    environment.metadata("megacpp-nemo", "entry_points.txt").unlink()
    for words in ((), ("--quick",)):
        plugin = environment.doctor(*words).finding("plugin.entry_point")
        assert (plugin["state"], plugin["found"]) == ("broken", "not registered")
        assert plugin["fix"] == "pip install -e '.[triton]'"


def test_missing_triton_is_named(environment):
    environment.without("triton")
    result = environment.doctor()
    assert result.code == 1
    assert result.data["faults"] == ["package.triton", "plugin.entry_point", "lane.triton"]
    assert "on a CPU too" in result.finding("package.triton")["says"]
    assert result.data["fixes"] == ["pip install 'triton'"]


def test_triton_of_a_cuda_build_of_torch_goes_by_another_name(environment):
    environment.metadata("triton", "METADATA").unlink()
    environment.distribution("pytorch-triton", "3.7.0")
    assert environment.doctor("--quick").finding("package.triton")["found"] == "3.7.0"


def test_a_folder_that_is_no_tree_does_not_spoil_the_verdict_on_training(environment, tmp_path):
    words = ("--quick", "--megatron", str(tmp_path))
    assert environment.doctor(*words).data["faults"] == ["megatron_lm.tree"]
    said = environment.doctor(*words, form="text").said
    assert "no Megatron-LM tree" in said
    assert "Training cannot work" not in said


def test_a_wrong_megatron_core_is_named(environment):
    environment.distribution("megatron-core", "0.15.3")
    environment.module("megatron/core/__init__.py", '__version__ = "0.15.3"')
    result = environment.doctor()
    assert (result.code, result.data["faults"]) == (1, ["package.megatron-core"])
    found = result.finding("package.megatron-core")
    assert found["found"] == "0.15.3, where ==0.16.1 is needed"
    assert found["fix"] == CORE


def test_a_tree_that_shadows_the_installed_megatron_core_is_named(environment, tmp_path):
    tree = tmp_path / "tree" / "megatron" / "core"
    tree.mkdir(parents=True)
    (tree / "__init__.py").write_text('__version__ = "0.19.0"')
    result = environment.doctor(path=str(tmp_path / "tree"))
    assert (result.code, result.data["faults"]) == (1, ["plugin.megatron_core"])
    found = result.finding("plugin.megatron_core")
    assert found["found"] == f"0.19.0 from {tree}, where 0.16.1 is installed"
    assert found["fix"] == "unset PYTHONPATH"


def test_torchrun_off_the_path_is_named_with_what_it_costs(environment):
    (environment.bin / "torchrun").unlink()
    result = environment.doctor("--quick")
    found = result.finding("machine.torchrun")
    # A run of one process trains without it.
    assert (result.code, found["state"], found["found"]) == (0, "limited", "not on PATH")
    assert "a run of one process does not need it" in found["says"]
    assert found["fix"].startswith(("export PATH=", "pip install torch"))


def test_the_torchrun_of_another_python_is_named(environment):
    other = environment.program("python9", "#!/bin/sh\necho /another/prefix\n")
    environment.program("torchrun", f"#!{other}\n")
    found = environment.doctor("--quick").finding("machine.torchrun")
    assert found["state"] == "limited"
    assert f"it runs {other}, not this Python" in found["says"]


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        ("import os; os._exit(3)", "ended Python with status 3"),
        ("import os; os.abort()", "ended Python with SIGABRT"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("1 +", "SyntaxError"),
    ],
)
def test_an_import_that_crashes_or_hangs_is_named_and_the_doctor_goes_on(environment, torch, words):
    environment.module("torch/__init__.py", torch)
    result = environment.doctor("--timeout", "1" if "sleep" in torch else "60")
    assert result.code == 1
    assert words in result.finding("lane.torch")["found"]
    assert "plugin.entry_point" in result.states


def test_two_processes_that_do_not_meet_are_named(environment):
    environment.module(
        "torch/distributed.py",
        "def init_process_group(*a, **k): raise RuntimeError('no address for this host')",
    )
    result = environment.doctor()
    assert result.data["faults"] == ["lane.gloo"]
    assert "no address for this host" in result.finding("lane.gloo")["found"]
    assert "/etc/hosts" in result.finding("lane.gloo")["fix"]


def test_a_kernel_that_is_installed_and_broken_costs_what_its_absence_does(environment):
    environment.module("mamba_ssm/__init__.py", "raise ImportError('undefined symbol: _ZN3c10')")
    result = environment.doctor()
    found = result.finding("lane.mamba_ssm")
    assert (result.code, found["state"]) == (0, "limited")
    assert "undefined symbol" in found["found"]
    assert "mamba-ssm" in found["fix"]


def test_where_nothing_is_installed_everything_is_named(environment):
    for path in list(environment.site.iterdir()):
        if path.name not in ("megacpp_nemo", "packaging"):
            environment.without(path.name)
    result = environment.doctor()
    assert result.code == 1
    assert result.finding("package.megacpp-nemo")["fix"] == "pip install -e '.[triton]'"
    assert result.finding("lane.torch")["fix"] == "pip install 'torch'"
    environment.without("packaging")
    environment.distribution("megacpp-nemo", "0.1.0")
    assert environment.doctor("--quick").data["fixes"][0] == "pip install 'packaging'"


def test_nothing_is_imported_in_a_hurry(environment):
    for name in ("torch", "nemo_run", "triton"):
        environment.module(f"{name}/__init__.py", "raise SystemExit('imported')")
    result = environment.doctor("--quick")
    assert (result.code, result.data["quick"]) == (0, True)
    assert result.states["lane.gloo"] == result.states["plugin.entry_point"] == "unchecked"


def test_a_damaged_installation_is_a_fault_and_not_a_crash(environment):
    environment.metadata("numpy", "METADATA").write_text("")
    found = environment.doctor("--quick").finding("package.numpy")
    assert (found["state"], found["fix"]) == ("broken", "pip install 'numpy<2'")


def test_a_megatron_lm_tree_is_named_with_its_release(environment, tmp_path):
    tree = tmp_path / "tree"
    for part in ("megatron/training/arguments.py", "megatron/core/package_info.py"):
        (tree / part).parent.mkdir(parents=True, exist_ok=True)
        (tree / part).write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    found = environment.doctor("--quick", "--megatron", str(tree)).finding("megatron_lm.tree")
    assert (found["state"], found["found"]) == (
        "ok",
        f"{tree}: Megatron-Core 0.16.1, known as 0.16.1",
    )
    (tree / "megatron/core/package_info.py").write_text("MAJOR = 1\nMINOR = 9\nPATCH = 0\n")
    found = environment.doctor("--quick", "--megatron", str(tree)).finding("megatron_lm.tree")
    assert (found["state"], found["fix"]) == ("limited", f"megacpp releases add {tree}")


def test_a_folder_that_was_named_and_is_no_tree_is_a_fault(environment, tmp_path):
    result = environment.doctor("--quick", "--megatron", str(tmp_path / "nowhere"))
    assert (result.code, result.data["faults"]) == (1, ["megatron_lm.tree"])


def test_the_report_is_read_by_people_too(environment):
    environment.without("triton")
    said = environment.doctor("--quick", form="text").said
    assert "Training cannot work here: one thing is broken." in said
    assert re.search(
        r"^BROKEN +triton +not installed +Megatron's Mamba modules", said, re.MULTILINE
    )
    assert said.index("Repair, in this order\n  pip install 'triton'") < said.index("To have more")


@pytest.mark.parametrize(
    "words", [("now",), ("--json", "--format", "text"), ("--timeout", "soon"), ("--mgatron", "x")]
)
def test_words_that_mean_nothing_are_refused(megacpp, words):
    result = megacpp("doctor", *words)
    assert (result.code, result.out) == (2, "")


def test_the_keys_and_states_of_the_json_are_these(environment):
    data = environment.doctor("--json").data
    assert set(data) == {"schema", "ok", "quick", "seconds", "faults", "fixes", "findings"}
    for finding in data["findings"]:
        assert set(finding) == {"key", "name", "state", "found", "says", "fix"}
        assert finding["state"] in ("ok", "limited", "broken", "unchecked")


def test_this_environment_trains():
    """The only examination of the real packages, in half a minute."""
    programs = str(Path(sys.executable).parent)
    own = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "megacpp_nemo.cli", "doctor", "--json", "--timeout", "500"],
        env=own,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    data = json.loads(done.stdout)
    states = {finding["key"]: finding["state"] for finding in data["findings"]}
    imports = {key: states[key] for key in states if key.startswith(("plugin.", "adapters."))}
    assert len(imports) >= 8, done.stdout
    assert set(imports.values()) == {"ok"}, done.stdout
    assert states["lane.gloo"] == "ok"
    assert (done.returncode, data["faults"]) == (0, []), done.stdout
