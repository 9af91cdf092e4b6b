"""What a launch comes to, before anything starts: recipe, hardware, executor, environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megacpp_nemo.contract import HybridRecipe, recipe
from megacpp_nemo.contract.parallelism import Parallelism
from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.executors import ExecutorFile, missing, renames
from megacpp_nemo.launch.kinds import KINDS
from megacpp_nemo.launch.memory import check_memory
from megacpp_nemo.launch.profiles import HARDWARE, Profile
from megacpp_nemo.lowering.policy import LaunchOptions, environment

POLICY = "launch policy"
COMMAND_LINE = "--env"
# Options whose name in capitals would be no value of them.
SAMPLES = {"workdir_pvc": "my-claim"}
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


class Variable(NamedTuple):
    """A variable of the environment, and who set it.

    Args:
        name: Its name.
        value: Its value.
        source: Who set it: the policy, a profile, an executor or the command line.
        instead: What an earlier source set, if it was something else.
    """

    name: str
    value: str
    source: str
    instead: str = ""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """A launch, decided and checked.

    Args:
        recipe: What is trained, with the profile's layout.
        profile: The hardware; None for what the recipe itself asks for.
        executor: Who starts it, with all its options.
        options: What is decided about the launch, the environment of all sources but the policy
            included.
        variables: The whole environment, by name.
    """

    recipe: HybridRecipe
    profile: Profile | None
    executor: ExecutorFile
    options: LaunchOptions
    variables: tuple[Variable, ...]

    @property
    def layout(self) -> Parallelism:
        """The layout, which says how many nodes and processes there are."""
        return self.recipe.parallelism

    @property
    def on_gpus(self) -> bool:
        """Whether it is for GPUs."""
        return _on_gpus(self.recipe, self.profile)

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment by name."""
        return {variable.name: variable.value for variable in self.variables}


def plan_launch(
    name: str,
    *,
    executor: ExecutorFile,
    profile: Profile | None = None,
    changes: Mapping[str, Any] | None = None,
    mode: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """Return the plan of a launch.

    Args:
        name: The recipe's.
        executor: Who starts it.
        profile: The hardware and the layout over it.
        changes: Fields of the recipe by path; they win over the profile's.
        mode: Parallelism mode; the profile's if not given.
        environment: Further variables; they win over all others.

    Raises:
        MegaCppError: If the recipe contradicts itself, the hardware has other sizes than the
            layout, the model does not fit, or the executor cannot start so many processes.
    """
    chosen = mode or (profile and profile.mode) or "nemo_native"
    own = dict(changes or {})
    if profile is not None:
        _check_sizes(recipe(name, mode=chosen).parallelism, profile, own)
    intent = recipe(name, mode=chosen, changes={**(profile.changes if profile else {}), **own})
    _check_executor(executor, intent.parallelism)
    if profile is not None and profile.gpu is not None:
        check_memory(intent, profile.gpu)
    options = profile.launch if profile else LaunchOptions()
    variables = _variables(intent, profile, executor, environment or {})
    given = {item.name: item.value for item in variables if item.source != POLICY}
    return LaunchPlan(
        recipe=intent,
        profile=profile,
        executor=executor,
        options=dataclasses.replace(options, environment=given),
        variables=variables,
    )


def check_complete(plan: LaunchPlan) -> None:
    """Check that the executor has every option that a launch needs.

    Raises:
        LaunchError: Naming all that are missing.
    """
    if lacking := missing(plan.executor):
        raise LaunchError(
            f"The executor {plan.executor.name} lacks {', '.join(lacking)}",
            given=", ".join(f"{name} not set" for name in lacking),
            allowed=f"{', '.join(lacking)}, by --set or in a file of your own",
            hint=" ".join(f"--set {name}={SAMPLES.get(name, name.upper())}" for name in lacking),
        )


def _on_gpus(intent: HybridRecipe, profile: Profile | None) -> bool:
    if profile is not None:
        return profile.gpu is not None
    return intent.features.kernels == "required"


def _check_sizes(base: Parallelism, profile: Profile, own: Mapping[str, Any]) -> None:
    """Refuse a layout of more, or fewer, processes than the hardware has."""

    def size(field: str, otherwise: int) -> int:
        value = own.get(f"parallelism.{field}", otherwise)
        return value if type(value) is int and value > 0 else otherwise

    have = profile.devices
    asked = size("num_nodes", profile.nodes) * size("devices_per_node", profile.devices_per_node)
    model = 1
    for field in SIZES:
        model *= size(field, profile.changes.get(f"parallelism.{field}", getattr(base, field)))
    sizes = [f"{name}={own[f'parallelism.{name}']}" for name in (*HARDWARE.values(), *SIZES)
             if f"parallelism.{name}" in own]  # fmt: skip
    things = "GPUs" if profile.gpu else "processes"
    if max(asked, model) > have:
        raise LaunchError(
            f"The layout needs {max(asked, model)} {things}, and {profile.name} has {have}",
            given=f"{', '.join(sizes) or 'the layout'} on {profile.hardware}",
            allowed=f"a layout of {have} {things}",
            hint="a larger profile, or smaller parallel sizes",
        )
    if asked < have:
        raise LaunchError(
            f"The layout uses {asked} of the {have} {things} of {profile.name}",
            given=f"{', '.join(sizes)} on {profile.hardware}",
            allowed=f"a layout of {have} {things}",
            hint=f"without {', '.join(sizes)}, or a smaller profile",
        )


def _check_executor(executor: ExecutorFile, layout: Parallelism) -> None:
    kind = KINDS[executor.kind]
    for most, have, what in (
        (kind.nodes, layout.num_nodes, "node"),
        (kind.processes, layout.devices_per_node, "process"),
    ):
        if most is not None and have > most:
            plural = "nodes" if what == "node" else "processes on each node"
            raise LaunchError(
                f"The executor {executor.name} starts {most} {what}, and the layout has {have}",
                given=f"{have} {plural}, {kind.what}",
                allowed=f"{most} {what}",
                hint="--executor slurm" if what == "node" else "--executor torchrun",
            )


def _variables(
    intent: HybridRecipe,
    profile: Profile | None,
    executor: ExecutorFile,
    given: Mapping[str, str],
) -> tuple[Variable, ...]:
    """Return the environment, each variable with its source; a later source wins."""
    options = profile.launch if profile else LaunchOptions()
    policy = environment(
        intent.parallelism,
        dataclasses.replace(options, environment={}),
        cuda=_on_gpus(intent, profile),
    )
    sources = (
        (POLICY, policy),
        (f"profile {profile.name}" if profile else "", options.environment),
        (f"executor {executor.name}", executor.environment),
        (COMMAND_LINE, given),
    )
    found: dict[str, Variable] = {}
    for source, values in sources:
        for name, value in values.items():
            if renames(executor.kind, name):
                raise LaunchError(
                    f"NeMo-Run writes names of variables in capitals for {executor.kind}",
                    given=f"{name}={value}, from {source}",
                    allowed="a name in capitals",
                    hint=f"{name.upper()}={value}",
                )
            before = found.get(name)
            instead = before.value if before and before.value != value else ""
            found[name] = Variable(name, value, source, instead)
    return tuple(found[name] for name in sorted(found))
