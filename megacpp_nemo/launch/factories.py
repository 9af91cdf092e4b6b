"""Executors by name on NeMo-Run's command line, one for each profile and executor file.

    nemo llm pretrain --factory nam56r run.executor="h200x8_slurm(account=ME)"
    nemo llm pretrain --factory nam56r run.executor=h200x8_slurm run.executor.account=ME
    nemo llm pretrain --factory nam56r_tiny run.executor="files(executor=./mine.yaml,profile=cpux2)"

Such an executor brings nodes, processes and environment. The layout over them is the recipe's, by
its own arguments: `megacpp launch` takes both from a profile at once.
"""

# NeMo-Run reads these annotations to parse its command line: it resolves neither annotations
# kept as text nor `X | Y`.
# ruff: noqa: UP045

import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

import nemo_run as run
from nemo_run.cli import api
from nemo_run.cli.api import EXECUTOR_CLASSES, RunContext

from megacpp_nemo.contract.errors import MegaCppError, nearest
from megacpp_nemo.contract.parallelism import Parallelism
from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.executors import ExecutorFile, read_executor, with_options
from megacpp_nemo.launch.kinds import KINDS
from megacpp_nemo.launch.nemo_run_executors import configured
from megacpp_nemo.launch.places import find, names
from megacpp_nemo.launch.profiles import Profile, read_profile
from megacpp_nemo.lowering.policy import environment


def from_files(executor: ExecutorFile, profile: Profile) -> run.Config:
    """Return NeMo-Run's executor of an executor's file on a profile's hardware.

    Raises:
        LaunchError: If the executor cannot start so many processes.
    """
    kind = KINDS[executor.kind]
    if not fits(executor, profile):
        raise LaunchError(
            f"The executor {executor.name} cannot start the processes of {profile.name}",
            given=profile.hardware,
            allowed=f"{kind.nodes or 'any number of'} nodes, {kind.processes or 'any number of'} "
            "processes on each",
            hint="an executor of kind slurm" if profile.nodes > 1 else "torchrun",
        )
    variables = environment(_layout(profile), profile.launch, cuda=profile.gpu is not None)
    return configured(
        executor,
        nodes=profile.nodes,
        processes=profile.devices_per_node,
        gpus=profile.gpu is not None,
        environment={**variables, **executor.environment},
    )


def fits(executor: ExecutorFile, profile: Profile) -> bool:
    """Whether an executor can start a profile's processes."""
    kind = KINDS[executor.kind]
    return (kind.nodes or profile.nodes) >= profile.nodes and (
        kind.processes or profile.devices_per_node
    ) >= profile.devices_per_node


def files(
    executor: Optional[str] = None, profile: Optional[str] = None, configs: Optional[str] = None
) -> run.Config:
    """Executor and profile of files of your own.

    Args:
        executor: Name or path.
        profile: Name or path.
        configs: Folder with executors/
            and profiles/.
    """
    from pathlib import Path

    if not executor or not profile:
        raise LaunchError(
            "An executor from files needs both of them",
            given=f"executor={executor!r}, profile={profile!r}",
            allowed="names or paths",
            hint="files(executor=./mine.yaml,profile=h200x8)",
        )
    own = Path(configs) if configs else None
    return from_files(
        read_executor(find("executors", executor, own)),
        read_profile(find("profiles", profile, own)),
    )


def _layout(profile: Profile) -> Parallelism:
    """Return the profile's layout, which decides about a variable of the environment."""
    changes = {
        path.partition(".")[2]: value
        for path, value in profile.changes.items()
        if path.startswith("parallelism.")
    }
    return Parallelism(**changes)


def _factory(name: str, executor: ExecutorFile, profile: Profile) -> Callable[..., run.Config]:
    options = KINDS[executor.kind].options

    def factory(**given: Any) -> run.Config:
        words = [f"{key}={_word(value)}" for key, value in given.items()]
        return from_files(with_options(executor, words), profile)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"{profile.hardware}:\n{KINDS[executor.kind].what}.\n"
    parameters = [
        inspect.Parameter(
            option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Optional[str]
        )
        for option in options
    ]
    factory.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return factory


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _register() -> dict[str, Callable[..., run.Config]]:
    """Register every pair of our own files that fit each other."""
    executors = [read_executor(path) for path in names("executors").values()]
    profiles = [read_profile(path) for path in names("profiles").values()]
    made = {
        f"{profile.name}_{executor.name}": _factory(
            f"{profile.name}_{executor.name}", executor, profile
        )
        for profile in profiles
        for executor in executors
        if fits(executor, profile)
    }
    made["files"] = files
    return {
        name: run.cli.factory(function, target=run.Executor, name=name)
        for name, function in made.items()
    }


def install() -> None:
    """Read arguments of an executor, and explain a wrong one; a second call changes nothing.

    Left alone, NeMo-Run cuts `run.executor=NAME(ARGUMENT=VALUE)` at its second `=`.
    """
    upstream, prefixed = RunContext.parse_executor, api._parse_prefixed_args
    if getattr(upstream, "explains", False):
        return

    @functools.wraps(prefixed)
    def whole(args: list[str], prefix: str) -> tuple[Optional[str], list[str], list[str]]:
        value, own, others = prefixed(args, prefix)
        given = [arg.partition("=")[2] for arg in args if arg.startswith(f"{prefix}=")]
        return given[-1] if given else value, own, others

    @functools.wraps(upstream)
    def parse_executor(self: RunContext, name: str, *args: str) -> Any:
        try:
            executor = upstream(self, name, *args)
        except MegaCppError:
            raise
        except Exception as error:
            raise _not_made(name, args) from error
        _check_needed(name, executor)
        return executor

    parse_executor.explains = True  # type: ignore[attr-defined]
    RunContext.parse_executor, api._parse_prefixed_args = parse_executor, whole


def _not_made(name: str, args: tuple[str, ...]) -> LaunchError:
    from megacpp_nemo.recipes.explain import factories, factory_name

    word = factory_name(name) or name
    known = factories(*EXECUTOR_CLASSES)
    if word in known:
        return LaunchError(
            f"The executor {word} cannot be made with these arguments",
            given=" ".join([f"run.executor={name}", *(f"run.executor.{arg}" for arg in args)]),
            allowed=", ".join(inspect.signature(known[word]).parameters) or "no arguments",
            hint=f"run.executor={word}",
        )
    return LaunchError(
        f"No executor is called {word!r}",
        given=f"run.executor={name}",
        allowed=", ".join(sorted(known)),
        hint=f"run.executor={nearest(word, known) or 'files(executor=./mine.yaml,profile=cpu)'}",
    )


def _check_needed(name: str, executor: Any) -> None:
    """Refuse what NeMo-Run would find missing only while it builds the executor."""
    given, target = executor.__arguments__, executor.__fn_or_cls__
    lacking = [
        parameter.name
        for parameter in inspect.signature(target).parameters.values()
        if parameter.default is inspect.Parameter.empty and given.get(parameter.name) is None
    ]
    lacking += [argument for argument in getattr(target, "NEEDED", ()) if not given.get(argument)]
    if lacking:
        raise LaunchError(
            f"The executor {name} lacks {', '.join(lacking)}",
            given=f"run.executor={name}",
            allowed=f"{', '.join(lacking)}, as an argument or an override",
            hint=" ".join(f"run.executor.{item}={item.upper()}" for item in lacking),
        )


FACTORIES = _register()
install()

__all__ = ["FACTORIES", "files", "from_files"]
