"""`megacpp doctor`: what works on this machine, what does not, and what repairs it."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.output import native_path, say
from megacpp_nemo.cli.screen import Cell, Screen
from megacpp_nemo.cli.usage import Parser, whole_number

if TYPE_CHECKING:
    from megacpp_nemo.doctor import Finding, Report

BROKEN_STATUS = 1
TREE = "megatron_lm.tree"
SECONDS = 300
GROUPS = {
    "machine": "Machine",
    "package": "Packages",
    "plugin": "Plugin",
    "adapters": "Adapters between NeMo and Megatron-Core",
    "lane": "What runs here",
    "megatron_lm": "Megatron-LM",
}
WORDS = {"ok": "ok", "limited": "limited", "broken": "BROKEN", "unchecked": "-"}
STYLES = {"ok": "green", "limited": "yellow", "broken": "red", "unchecked": "dim"}


def parser(name: str) -> Parser:
    """Return what `megacpp doctor` takes."""
    made = Parser(
        name,
        "[--quick] [--json] [--megatron DIR] [--timeout SECONDS]",
        "Say what is installed, whether NeMo-Run really gets this package's recipes, which ways\n"
        "of running work here, and what each missing piece costs. What is broken comes with the\n"
        "command that repairs it.\n\n"
        "Versions are read without importing anything; then all imports are tried in one process\n"
        "of their own, half a minute. --quick leaves them out.\n\n"
        "Exit status: 0 what training here needs works, 1 something of it is broken. What is only\n"
        "missing, such as a GPU, does not make it 1; a folder of --megatron that is no tree does.",
        ("megacpp doctor --quick", "megacpp doctor --quick --json"),
        ("text", "json"),
    )
    made.add("--quick", action="store_true", help="read versions and paths only, in 0.2 seconds")
    made.add("--json", action="store_true", help="as --format json")
    made.add("--megatron", metavar="DIR", help="a Megatron-LM tree; the usual places by default")
    made.add(
        "--timeout",
        metavar="SECONDS",
        type=whole_number(1),
        default=SECONDS,
        help=f"most seconds for all imports; {SECONDS} by default",
    )
    return made


def run(given: argparse.Namespace) -> str:
    """Return the examination; `given.status` is what the process ends with.

    Raises:
        UsageError: If there are words that mean nothing here.
    """
    if given.words:
        parser(given.command).refuse("doctor takes no words", " ".join(given.words))
    if given.json:
        if "format" in given.seen and given.format != "json":
            parser(given.command).refuse("--json is --format json", f"--format {given.format}")
        given.format = "json"
    from megacpp_nemo.doctor import examine

    if not given.quick and given.format == "text":
        say("Trying the imports of a run, about half a minute (--quick leaves them out) ...")
    tree = None if given.megatron is None else native_path(given.megatron)
    report = examine(quick=given.quick, megatron=tree, timeout_s=given.timeout)
    given.status = 0 if report.ok else BROKEN_STATUS
    return to_json(report.to_dict()) if given.format == "json" else _text(report, given.screen)


def _text(report: Report, screen: Screen) -> str:
    from megacpp_nemo import __version__

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.system()} {platform.machine()}, {cores} cores"
    parts = [
        f"megacpp {__version__}, Python {platform.python_version()}, {machine}",
        _verdict(report, screen),
    ]
    for group, title in GROUPS.items():
        own = [finding for finding in report.findings if finding.group == group]
        if own:
            parts.append(f"{screen.heading(title)}\n{_group(group, own, screen)}")
    parts += _repairs(report, screen)
    return "\n\n".join(parts) + "\n"


def _verdict(report: Report, screen: Screen) -> str:
    if [fault.key for fault in report.faults] == [TREE]:
        return screen.paint("The folder of --megatron is no Megatron-LM tree.", "red")
    if not report.ok:
        count = len(report.faults)
        things = "one thing is" if count == 1 else f"{count} things are"
        return screen.paint(f"Training cannot work here: {things} broken.", "red")
    if report.quick:
        return "Nothing is broken in what can be read quickly; the imports were not tried."
    return screen.paint("Training works here.", "green")


def _group(group: str, findings: Sequence[Finding], screen: Screen) -> str:
    """Return the findings of a group; packages that are as they should be in one line."""
    plain = [f for f in findings if f.state.value == "ok"] if group == "package" else []
    rows = [_row(f) for f in findings if f not in plain]
    head = ["", "what", "found", "what it means"]
    if all(not f.says for f in findings):
        head, rows = head[:-1], [row[:-1] for row in rows]
    lines = [screen.table(head, rows)] if rows else []
    if plain:
        listed = ", ".join(f"{f.name.partition('[')[0]} {f.found}" for f in plain)
        lines.append(screen.wrapped(f"As needed: {listed}."))
    return "\n\n".join(lines)


def _row(finding: Finding) -> list[str | Cell]:
    state = finding.state.value
    return [Cell(WORDS[state], STYLES[state]), finding.name, finding.found, finding.says]


def _repairs(report: Report, screen: Screen) -> list[str]:
    """Return the commands: what repairs, and what would give more."""
    more = [f for f in report.findings if f.state.value == "limited" and f.fix]
    parts = []
    if report.fixes:
        commands = [f"  {screen.paint(fix, 'green')}" for fix in report.fixes]
        parts.append("\n".join([screen.heading("Repair, in this order"), *commands]))
    if more:
        names: dict[str, list[str]] = {}
        for finding in more:
            names.setdefault(finding.fix, []).append(finding.name)
        lines = [f"  {', '.join(own)}:\n    {fix}" for fix, own in names.items()]
        parts.append("\n".join([screen.heading("To have more"), *lines]))
    return parts
