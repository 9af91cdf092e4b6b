"""All checks, the quick ones first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from megacpp_nemo.doctor.findings import Finding, Report, State
from megacpp_nemo.doctor.imports import TIMEOUT_S, import_findings, probe, quick_findings
from megacpp_nemo.doctor.machine import program_findings, tree_finding
from megacpp_nemo.doctor.packages import package_findings


def examine(
    *, quick: bool = False, megatron: str | None = None, timeout_s: float = TIMEOUT_S
) -> Report:
    """Return what works on this machine and what does not.

    Args:
        quick: Read versions and paths only; import nothing.
        megatron: Megatron-LM tree that must be there; the usual places if not given.
        timeout_s: Most seconds that the imports may take, all together.
    """
    start = time.monotonic()
    findings = [
        *_guarded("package.check", package_findings),
        *_guarded("machine.check", program_findings),
        *_guarded("megatron_lm.check", lambda: [tree_finding(megatron)]),
    ]
    slow = quick_findings if quick else lambda: import_findings(probe(timeout_s))
    findings += _guarded("plugin.check", slow)
    return Report(findings=tuple(findings), quick=quick, seconds=time.monotonic() - start)


def _guarded(key: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a check finds; a check that itself fails is a fault that it finds."""
    try:
        return list(check())
    except Exception as error:
        return [
            Finding(
                key=key,
                name="this check",
                state=State.BROKEN,
                found=f"{type(error).__name__}: {error}",
                says="the doctor could not look: the installation is damaged in a way it does "
                "not know",
            )
        ]
