"""`megacpp launch`: a recipe on this machine or a cluster, by NeMo-Run."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacpp_nemo.cli.generate import quiet
from megacpp_nemo.cli.given import read_changes
from megacpp_nemo.cli.lower import release_of, to_json, variables_of
from megacpp_nemo.cli.output import native_path, say
from megacpp_nemo.cli.usage import Parser, UsageError, add_recipe_options, add_release
from megacpp_nemo.contract.errors import lookup
from megacpp_nemo.lowering.releases import DEFAULT_RELEASE

LANES = ("nemo", "megatron")


def parser(name: str) -> Parser:
    """Return what `megacpp launch` takes."""
    made = Parser(
        name,
        "RECIPE --executor E [--profile P] [FIELD=VALUE ...] [--dryrun] ...",
        "Start a recipe: as a NeMo recipe, or as Megatron-LM's own command. A profile is hardware\n"
        "and a layout over it, an executor is who starts the processes; both are YAML files, by\n"
        "name or by path. A FIELD is a recipe's field, or a path of the NeMo recipe below\n"
        "trainer, data, optim, log or resume.",
        (
            "megacpp launch nam56r_tiny --executor torchrun --profile cpux2 --dryrun",
            "megacpp launch nam52 --executor slurm --profile h200x8 --set account=ME --dryrun",
            "megacpp launch nam52 ngram_hash=false --executor slurm --profile h200x16 \\",
            "    --set account=ME --as megatron --megatron-root /opt/Megatron-LM --dryrun",
        ),
        ("text", "json"),
    )
    made.add(
        "--executor", metavar="E", help="local, torchrun, docker, slurm, kubernetes, or a file"
    )
    made.add("--profile", metavar="P", help="such as h200x8, or a file; else the recipe's layout")
    made.add("--as", metavar="LANE", dest="lane", default="nemo", help="nemo (default) or megatron")
    add_recipe_options(made)
    add_release(made, DEFAULT_RELEASE)
    made.add("--megatron-root", metavar="DIR", help="Megatron-LM, where it runs; for megatron")
    made.add("--set", metavar="NAME=VALUE", dest="options", action="append", default=[],
             help="an option of the executor; may be given several times")  # fmt: skip
    made.add("--env", metavar="NAME=VALUE", action="append", default=[],
             help="a variable of the launch; may be given several times")  # fmt: skip
    made.add("--configs", metavar="DIR", help="folder of your own executors/ and profiles/")
    made.add("--dryrun", action="store_true", help="print the launch, start nothing")
    made.add("--detach", action="store_true", help="submit it and return")
    return made


def run(given: argparse.Namespace) -> str:
    """Return the launch as text if it is dry; else run it.

    A run that fails ends the command with its own exit status.

    Raises:
        MegaCppError: If anything is wrong before it starts.
    """
    _check_words(given)
    from megacpp_nemo.launch.errors import RunFailed
    from megacpp_nemo.launch.plan import check_complete

    plan, overrides = _plan(given)
    check_complete(plan)
    if not given.dryrun:
        from megacpp_nemo.launch.machine import check_machine

        check_machine(plan.executor, detach=given.detach)
    with quiet(), _described():
        task, executor, lacking = _prepared(given, plan, overrides)
        from megacpp_nemo.launch import experiment, tasks

    title = experiment.title_of(plan.recipe.name)
    if given.dryrun:
        return _dry(given, plan, experiment.dry_run(task, executor, title, plan.executor), lacking)
    tasks.check_open(lacking)
    try:
        started = experiment.start(task, executor, title, plan.executor, detach=given.detach)
    except RunFailed as error:
        _tell(error, given)
        return ""
    return f"{'Submitted' if given.detach else 'Done'}: nemo experiment status {started}\n"


def _check_words(given: argparse.Namespace) -> None:
    made = parser(given.command)
    if not given.words:
        made.refuse("launch needs a recipe", "none", hint="megacpp launch nam56r_tiny")
    if given.executor is None:
        hint = f"megacpp launch {given.words[0]} --executor torchrun"
        made.refuse("launch needs an executor", "no --executor", hint=hint)
    known = {lane: lane for lane in LANES}
    given.lane = lookup(known, given.lane, what=f"launch knows no --as {given.lane!r}",
                        field="--as", error=UsageError)  # fmt: skip
    if given.lane == "megatron" and given.megatron_root is None:
        made.refuse(
            "launch --as megatron needs the root of Megatron-LM",
            "no --megatron-root",
            hint="--megatron-root /opt/Megatron-LM",
        )
    if given.lane == "nemo":
        for option, changed in (
            ("--megatron-root", given.megatron_root is not None),
            ("--release", given.release != DEFAULT_RELEASE),
        ):
            if changed:
                made.refuse(f"{option} is for --as megatron", option, hint="--as megatron")


def _plan(given: argparse.Namespace) -> tuple[Any, list[str]]:
    """Return the plan, and the overrides of the NeMo recipe."""
    from megacpp_nemo.launch.executors import read_executor, with_options
    from megacpp_nemo.launch.places import find
    from megacpp_nemo.launch.plan import plan_launch
    from megacpp_nemo.launch.profiles import read_profile
    from megacpp_nemo.launch.tasks import is_override

    own = Path(native_path(given.configs)) if given.configs else None
    executor = read_executor(find("executors", native_path(given.executor), own))
    profile = given.profile and read_profile(find("profiles", native_path(given.profile), own))
    name, *words = given.words
    overrides = [word for word in words if is_override(word)]
    changes, mode = read_changes([word for word in words if word not in overrides])
    plan = plan_launch(
        name,
        executor=with_options(executor, given.options),
        profile=profile,
        changes=changes,
        mode=mode or given.mode,
        environment=variables_of(given.env),
    )
    return plan, overrides


def _prepared(
    given: argparse.Namespace, plan: Any, overrides: list[str]
) -> tuple[Any, Any, list[str]]:
    """Return the task, NeMo-Run's executor, and what the task still lacks."""
    from megacpp_nemo.launch import tasks
    from megacpp_nemo.launch.nemo_run_executors import executor_of

    if given.lane == "nemo":
        task = tasks.nemo_task(plan, overrides)
        return task, executor_of(plan), tasks.open_of(task)
    recipe = tasks.nemo_task(plan, overrides) if overrides else plan.recipe
    root, release = native_path(given.megatron_root), release_of(given.release)
    script, lacking = tasks.megatron_task(plan, recipe, root, release=release)
    return script, executor_of(plan, environment=False), lacking


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """Have a standard error with a descriptor, which Megatron's import asks for."""
    try:
        sys.stderr.fileno()
        kept = sys.stderr
    except (AttributeError, OSError, ValueError):
        kept = sys.__stderr__ or sys.stderr
    with contextlib.redirect_stderr(kept):
        yield


def _dry(given: argparse.Namespace, plan: Any, dry: Any, lacking: list[str]) -> str:
    from megacpp_nemo.launch.report import launch_data, launch_text

    if given.format == "json":
        return to_json(launch_data(plan, dry, lacking, lane=given.lane))
    text: str = launch_text(plan, dry, lacking, lane=given.lane, screen=given.screen)
    return text


def _tell(error: Any, given: argparse.Namespace) -> None:
    """Write the last lines of the rank that failed first, and what is known of it."""
    from megacpp_nemo.cli.errors import told
    from megacpp_nemo.cli.screen import visible

    sys.stdout.flush()
    for line in error.lines:
        say(f"  {visible(line)}")
    say(told(error, ["--color", given.color]))
    given.status = error.exit_status
