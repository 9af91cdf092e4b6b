"""What a launch hands to NeMo-Run: the NeMo recipe, or Megatron-LM's command as a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.plan import LaunchPlan
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.policy import LaunchOptions

# Parts of a NeMo recipe that no field of ours begins with.
PARTS = ("trainer", "data", "optim", "log", "resume")
# What data modules cannot do without, and what gives it to them.
NEEDED = {
    "IndexedDataModule": {
        "paths": "files.data_path=PREFIX",
        "tokenizer_dir": "files.tokenizer_dir=FOLDER",
    },
    "CorpusDataModule": {"folders": "data.folders=DIR"},
}


def is_override(word: str) -> bool:
    """Whether a word is an override of the NeMo recipe, not of a field of ours."""
    return word.partition("=")[0].partition(".")[0].rstrip("+-*/|& ") in PARTS


def nemo_task(plan: LaunchPlan, overrides: Sequence[str] = ()) -> Any:
    """Return the NeMo recipe of a launch, as a `run.Partial`.

    Args:
        plan: The launch.
        overrides: `PATH=VALUE` words, as NeMo's command line takes them.

    Raises:
        LaunchError: If the launch asks for what only Megatron's own script does.
        MegaCppError: If an override does not fit, or the model has what no layer carries out.
    """
    if plan.options.cuda_graphs:
        raise LaunchError(
            "CUDA graphs are captured under Megatron's own script only",
            given=f"cuda_graphs: {', '.join(plan.options.cuda_graphs)}",
            allowed="no cuda_graphs in the profile, or --as megatron",
            hint="--as megatron",
        )
    from nemo_run.cli import cli_parser

    from megacpp_nemo.recipes import to_nemo
    from megacpp_nemo.recipes.command_line import read

    def parse(words: list[str]) -> Any:
        task = to_nemo(plan.recipe)
        if plan.options.data_workers is not None:
            task.data.num_workers = plan.options.data_workers
        return cli_parser.parse_cli_args(task, words) if words else task

    task = read(parse, plan.recipe.name, list(overrides))
    _refuse_unbuilt(plan, task)
    return task


def _refuse_unbuilt(plan: LaunchPlan, task: Any) -> None:
    """Refuse here what the processes would refuse: a cluster's queue is long."""
    import fiddle as fdl

    from megacpp_nemo.host.preflight import refuse_unbuilt

    refuse_unbuilt(fdl.build(task.model.config), engine=plan.on_gpus or None)


def open_of(task: Any) -> list[str]:
    """Return what a NeMo recipe lacks before it can start, as what settles it."""
    lacking = NEEDED.get(task.data.__fn_or_cls__.__name__, {})
    given = task.data.__arguments__
    return [settle for name, settle in lacking.items() if not given.get(name)]


def megatron_task(
    plan: LaunchPlan, recipe: Any, root: str, *, release: str
) -> tuple[Any, list[str]]:
    """Return Megatron-LM's command as a script, and what it lacks before it can start.

    The script sets the environment itself. The tree is looked at where it can be seen from here.

    Args:
        plan: The launch.
        recipe: The plan's recipe, or the NeMo recipe after overrides.
        root: Root of Megatron-LM, as the machine that runs it sees it.
        release: The tree's release.

    Raises:
        MegaCppError: If the recipe has no lowering, or the tree is another release's.
    """
    from megacpp_nemo.launch.script import to_script

    options = plan.options
    seen = plan.executor.kind in ("local", "torchrun") or Path(root).is_dir()
    script = to_script(recipe, root, release=release, launch=options, check=seen)
    return script, open_items(recipe, options, release)


def open_items(recipe: Any, options: LaunchOptions, release: str) -> list[str]:
    """Return what a lowered command lacks before it can start, each with what settles it."""
    lowering = lower(recipe, release=release, launch=options)
    return [f"{item.settle} ({item.what})" for item in lowering.open]


def check_open(lacking: Sequence[str]) -> None:
    """Refuse a launch that lacks something.

    Raises:
        LaunchError: Naming what settles it.
    """
    if lacking:
        raise LaunchError(
            "The run could not start: something is still open",
            given="; ".join(lacking),
            allowed="a recipe with all it needs; --dryrun takes it as it is",
            hint=" ".join(item.partition(" (")[0] for item in lacking),
        )
