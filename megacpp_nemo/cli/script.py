"""A lowering as a shell script, and as bare arguments."""

from __future__ import annotations

import re
import shlex

from megacpp_nemo.cli.usage import UsageError
from megacpp_nemo.lowering.lower import Lowering

ROOT = '"$MEGATRON/{}"'
MEGATRON = ': "${MEGATRON:?set it to the root of Megatron-LM}"'
RENDEZVOUS = ': "${RENDEZVOUS:?set it to HOST:PORT of the first machine}"'


def bare(lowering: Lowering) -> str:
    """Return the command's arguments, one a line.

    Raises:
        UsageError: If an argument has a line break.
    """
    broken = [word for word in lowering.command if "\n" in word]
    if broken:
        raise UsageError(
            "An argument has a line break, and argv is one argument a line",
            given=repr(broken[0]),
            allowed="arguments without line breaks",
            hint="--format shell or --format json",
        )
    return "".join(f"{word}\n" for word in lowering.command)


def script(lowering: Lowering) -> str:
    """Return a whole script for sh: the environment, then the launch, one flag a line."""
    about = f"# {lowering.name} on Megatron-LM {lowering.release}, as megacpp lower writes it."
    missing = [f"# Still open: {item.what}; {item.settle}" for item in lowering.open]
    needs = [MEGATRON, *([RENDEZVOUS] if lowering.policy.num_nodes > 1 else [])]
    lines = ["#!/bin/sh", *map(_one_line, (about, *missing)), "set -eu", *needs, *launch(lowering)]
    return "\n".join(lines) + "\n"


def launch(lowering: Lowering) -> list[str]:
    """Return the lines of the launch: assignments, then torchrun with one flag a line."""
    policy = lowering.policy
    exports = [f"export {name}={quoted(value)}" for name, value in policy.environment.items()]
    torchrun = [f"torchrun --nnodes {policy.num_nodes}"]
    if policy.num_nodes > 1:
        torchrun.append('--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS"')
    torchrun.append(f"--nproc-per-node {policy.devices_per_node}")
    torchrun.append(ROOT.format(policy.entry_script))
    command = [" ".join(torchrun), *map(quoted_all, grouped(lowering.command))]
    return [*exports, *[f"{line} \\" for line in command[:-1]], command[-1]]


def grouped(words: tuple[str, ...]) -> list[list[str]]:
    """Return each flag with its values."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def quoted_all(words: list[str]) -> str:
    """Return words as a shell reads them, indented as a flag of the launch."""
    return "  " + " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """Return a word as a shell reads it."""
    return shlex.quote(word)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)
