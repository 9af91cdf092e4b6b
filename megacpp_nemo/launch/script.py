"""A lowered recipe as a NeMo-Run script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nemo_run as run

from megacpp_nemo.cli.script import grouped, quoted, quoted_all
from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.lower import Lowering, lower
from megacpp_nemo.lowering.policy import LaunchOptions
from megacpp_nemo.lowering.releases import (
    DEFAULT_RELEASE,
    RELEASE_NAMES,
    Release,
    load_release,
)
from megacpp_nemo.lowering.tree import tree_version


def to_script(
    recipe: Any,
    megatron_root: str | Path,
    *,
    release: str | Release = DEFAULT_RELEASE,
    seams: str = "spec",
    launch: LaunchOptions | None = None,
    check: bool = True,
) -> run.Script:
    """Return the script that trains a recipe with Megatron-LM's own entry script.

        script = to_script(nam56r(...), "/opt/Megatron-LM")
        run.run(script, executor=run.SlurmExecutor(nodes=1, ntasks_per_node=8,
                                                   launcher="torchrun", ...))

    The executor starts it: with `launcher="torchrun"` its nodes and processes per node are
    torchrun's, and must be the recipe's `num_nodes` and `devices_per_node`. The script sets the
    launch policy's environment and nothing else; executor variables of the same name lose.

    It is a shell script, which NeMo-Run hands over as a file: arguments and variables reach
    Megatron as they are. Given as `args` and `env`, some executors would pass the quotes of
    `'*EME'` on and others would not quote at all.

    Python finds `megatron` beside the entry script. Where the command names a spec of this
    package, `megacpp_nemo` must be importable too: installed, or through
    `LaunchOptions(environment={"PYTHONPATH": FOLDER})`.

    Args:
        recipe: A `HybridRecipe`, or a NeMo recipe of this package after any overrides.
        megatron_root: Root of a Megatron-LM source tree, as the machine that runs it sees it.
        release: The tree's release, by its name or the path of its file.
        seams: `spec` or `native-only`, as `lower` takes it.
        launch: What the user decides about the launch.
        check: Whether the tree is looked at; False where only the cluster has it.

    Raises:
        LoweringError: If the recipe has no lowering, or the tree is none or another release's.
        RecipeError: If a NeMo recipe's settings contradict each other.
    """
    root = _root(megatron_root)
    known = release if isinstance(release, Release) else load_release(release)
    lowering = lower(recipe, release=known, seams=seams, launch=launch)
    if check:
        _check_tree(root, known)
    return run.Script(inline=_text(lowering, root))


def _root(given: Any) -> Path:
    """Return the root as a path; `~` is of the machine that runs the script, and is not taken."""
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if isinstance(text, str) and text and not text.startswith("~") and not set(text) & set("\n\0"):
        return Path(text)
    raise LoweringError(
        "The root of Megatron-LM is a folder, written out",
        given=f"megatron_root={given!r}",
        allowed="a path as one line of text, without ~",
        hint="megatron_root='/opt/Megatron-LM'",
    )


def _text(lowering: Lowering, root: Path) -> str:
    """Return the shell script: the environment, then the entry script in this process."""
    entry = str(root / lowering.policy.entry_script)
    command = [f"exec python {quoted(entry)}", *map(quoted_all, grouped(lowering.command))]
    lines = [
        f"# {lowering.name.split()[0]} on Megatron-LM {lowering.release}",
        "set -eu",
        *(f"export {name}={quoted(text)}" for name, text in lowering.policy.environment.items()),
        " \\\n".join(command),
    ]
    return "\n".join(lines) + "\n"


def _check_tree(root: Path, release: Release) -> None:
    """Refuse a folder that is not the release's source tree."""
    hint = "megatron_root='/opt/Megatron-LM', or check=False if only the cluster has it"
    if not root.is_dir():
        raise LoweringError(
            "There is no folder of Megatron-LM here",
            given=f"megatron_root={str(root)!r}",
            allowed="the root of a Megatron-LM source tree",
            hint=hint,
        )
    version = tree_version(root)
    if version != release.package_version:
        own = next((n for n in RELEASE_NAMES if load_release(n).package_version == version), None)
        raise LoweringError(
            f"The tree is Megatron-LM {version}, and the recipe is lowered to {release.name}",
            given=f"megatron_root={str(root)!r}, release={release.name!r}",
            allowed=f"a tree of megatron-core {release.package_version}",
            hint=f"release={own!r}" if own else f"megacpp releases add {root}, then its file",
        )
    if not (root / release.entry_script).is_file():
        raise LoweringError(
            f"The tree lacks Megatron-LM's {release.entry_script}",
            given=f"megatron_root={str(root)!r}",
            allowed="the root of a whole checkout, with its pretrain_*.py",
            hint=hint,
        )
