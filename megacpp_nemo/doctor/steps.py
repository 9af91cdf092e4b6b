"""Steps of the probe as findings: what went well, what failed, what was never reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megacpp_nemo.doctor.findings import Finding, State
from megacpp_nemo.doctor.packages import pip, requirement_of

# Distributions by the module that is missed.
DISTRIBUTIONS = {
    "leptonai": "leptonai",
    "modelopt": "nvidia-modelopt",
    "megatron": "megatron-core",
    "nemo": "nemo-toolkit",
    "nemo_run": "nemo-run",
    "transformer_engine": "transformer-engine[pytorch]",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "yaml": "PyYAML",
    "ml_dtypes": "ml-dtypes",
}
NAMES = {
    "plugin.entry_point": "entry point `megacpp` of NeMo-Run",
    "plugin.pretrain": "nemo.collections.llm.api.pretrain",
    "plugin.megatron_core": "megatron.core",
    "adapters.in_force": "adapters",
    "lane.torch": "torch",
    "lane.gloo": "gloo, two processes",
    "lane.cuda": "CUDA",
    "lane.triton": "triton",
}
Entry = Mapping[str, Any]
Steps = Mapping[str, Entry]


def simple(
    steps: Steps,
    name: str,
    key: str,
    found: Callable[[Entry], str],
    says: str,
    module: str,
) -> Finding:
    """Return the finding of a step that must go well."""
    step = steps.get(name)
    if step is None:
        return unreached(key)
    if step["ok"]:
        return finding_of(key, State.OK, found(step))
    return broken(key, step, says, module)


def broken(key: str, step: Entry, says: str, module: str = "nemo_run") -> Finding:
    """Return the finding of a step that failed; what it missed tells what to install."""
    missing = step.get("missing", "").partition(".")[0]
    if missing and missing != "megacpp_nemo":
        fix = pip(requirement_of(DISTRIBUTIONS.get(missing, missing)))
    else:
        fix = look(module)
    where = f", at {step['where'][-1]}" if step.get("where") and not missing else ""
    return finding_of(key, State.BROKEN, step["error"] + where, says, fix)


def look(module: str) -> str:
    """Return the command that shows a failing import whole."""
    return f"python -c 'import {module}'"


def finding_of(key: str, state: State, found: str, says: str = "", fix: str = "") -> Finding:
    """Return a finding under its usual name."""
    return Finding(key=key, name=NAMES[key], state=state, found=found, says=says, fix=fix)


def unreached(key: str) -> Finding:
    """Return the finding of a step that the probe did not live to take."""
    return unchecked(key, NAMES[key], "not reached: an import before it ended the process")


def unchecked(key: str, name: str, found: str, says: str = "") -> Finding:
    """Return the finding of what was not looked at."""
    return Finding(key=key, name=name, state=State.UNCHECKED, found=found, says=says)
