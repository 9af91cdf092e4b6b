"""Runs the probe, and says what its outcome means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megacpp_nemo.doctor.findings import Finding
from megacpp_nemo.doctor.lanes import lane_findings, quick_lanes
from megacpp_nemo.doctor.plugin import plugin_findings, quick_plugin
from megacpp_nemo.doctor.steps import NAMES, Steps, unchecked

PROBE = Path(__file__).with_name("probe.py")
TIMEOUT_S = 300.0
# What nothing but an import can tell.
SLOW = ("plugin.pretrain", "adapters.in_force", "lane.gloo", "lane.cuda")


def import_findings(steps: Steps) -> list[Finding]:
    """Return the findings of what the probe said."""
    return [*plugin_findings(steps), *lane_findings(steps)]


def quick_findings() -> list[Finding]:
    """Return what can be said of the same things without importing any of them."""
    slow = [unchecked(key, NAMES[key], "not tried") for key in SLOW]
    return [quick_plugin(), *slow, *quick_lanes()]


def probe(timeout_s: float = TIMEOUT_S) -> dict[str, dict[str, Any]]:
    """Return what each step of the probe said, by its name.

    A step that was not reached is absent. One that ended the process, or did not end in time,
    has `ok` false and says so in `error`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "steps"), Path(folder, "log")
        with log.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, *_flags(), str(PROBE), str(out)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            ended = _waited(process, timeout_s)
        return _steps(out, log, ended)


def _flags() -> list[str]:
    """Return what this Python was told of where to look for packages, for another one."""
    told = {"isolated": "-I", "no_site": "-S", "no_user_site": "-s", "ignore_environment": "-E"}
    return [flag for name, flag in told.items() if getattr(sys.flags, name)]


def _waited(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Return how a process ended, in words; empty if all is well."""
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"it did not end within {timeout_s:g} s"
    finally:
        # Also what it forked.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"it ended Python with {signal.Signals(-code).name}"
    return f"it ended Python with status {code}" if code else ""


def _steps(out: Path, log: Path, ended: str) -> dict[str, dict[str, Any]]:
    steps: dict[str, dict[str, Any]] = {}
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut short
            continue
        steps[entry.pop("step")] = entry
    if ended and not steps:
        steps["torch"] = {"begun": True}
    for entry in steps.values():
        if "ok" not in entry:
            last = log.read_bytes().decode("utf-8", "replace").strip().splitlines()[-1:]
            words = [ended or "it ended Python without a word", *last]
            entry.update(ok=False, error=": ".join(words), missing="", where=[])
    return steps
