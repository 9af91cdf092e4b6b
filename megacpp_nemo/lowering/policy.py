"""Launch policy: what must stay outside the command line, and what only the launch decides.

- the environment: nothing in this package reads it, but CUDA, NCCL and Transformer Engine do;
- CUDA graphs, data workers and caches: flags that say how to run, not what to train, spelled
  for the release;
- the launcher's sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megacpp_nemo.contract.errors import LoweringError, nearest
from megacpp_nemo.contract.parallelism import Parallelism
from megacpp_nemo.lowering.plan import Plan
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.values import spelled

ATTENTION = (Role.ATTENTION, Role.LATENT_ATTENTION, Role.SPARSE_ATTENTION)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What can be captured, and the layers that have it. The whole expert layer can be captured
# only with drop-and-pad, which no recipe has.
GRAPHS: dict[str, tuple[Role, ...]] = {
    "attn": ATTENTION,
    "mamba": (Role.MAMBA,),
    "mlp": (Role.MLP,),
    "moe_router": (Role.EXPERTS,),
    "moe_preprocess": (Role.EXPERTS,),
}


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What a user decides about a launch. Nothing here changes what is trained.

    Args:
        cuda_graphs: Parts captured as CUDA graphs, of `GRAPHS`; none by default.
        blackwell: Whether the GPUs are Blackwell or later, which need no single CUDA queue.
        cache_dir: Folder for compile caches and data indices; None leaves each its default.
        data_workers: Data loader processes; None leaves Megatron's default.
        environment: Further variables; they win over the policy's own.

    Raises:
        LoweringError: If a value is not of its type, or a name is no variable's.
    """

    cuda_graphs: tuple[str, ...] = ()
    blackwell: bool = False
    cache_dir: str | None = None
    data_workers: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts, workers, cache = self.cuda_graphs, self.data_workers, self.cache_dir
        if not isinstance(parts, (tuple, list)) or not all(isinstance(x, str) for x in parts):
            raise _wrong_option("cuda_graphs", parts, "a tuple of names", "('attn',)")
        if len(set(parts)) < len(parts):
            fewer = tuple(dict.fromkeys(parts))
            raise _wrong_option("cuda_graphs", parts, "each part once", repr(fewer))
        if not isinstance(self.blackwell, bool):
            raise _wrong_option("blackwell", self.blackwell, "True or False", "True")
        if workers is not None and (type(workers) is not int or workers < 0):
            raise _wrong_option("data_workers", workers, "a whole number, 0 or more, or None", "2")
        if cache is not None and not _is_line(cache):
            raise _wrong_option("cache_dir", cache, "a folder as one line of text, or None", "'/c'")
        if not isinstance(self.environment, Mapping):
            raise _wrong_option("environment", self.environment, "text by name", "{'A_1': '1'}")
        for name, value in self.environment.items():
            if not isinstance(name, str) or not VARIABLE.fullmatch(name):
                raise _wrong_option("environment", name, "letters, digits and _", "{'A_1': '1'}")
            if not _is_line(value, blank=True):
                text = f"{name}={value!r}"
                raise _wrong_option("environment", text, "one line of text", f"{{{name!r}: '1'}}")


def _is_line(text: object, *, blank: bool = False) -> bool:
    """Whether something is one line of text, without the NUL that ends a variable."""
    return isinstance(text, str) and not set(text) & set("\n\0") and (blank or bool(text.strip()))


def _wrong_option(name: str, value: object, allowed: str, example: str) -> LoweringError:
    return LoweringError(
        f"LaunchOptions.{name} cannot be {value!r}",
        given=f"{name}={value!r}",
        allowed=allowed,
        hint=f"{name}={example}",
    )


@dataclass(frozen=True, kw_only=True)
class LaunchPolicy:
    """A launch, spelled for a release.

    Args:
        entry_script: Megatron-LM's script.
        num_nodes: torchrun's `--nnodes`.
        devices_per_node: torchrun's `--nproc-per-node`.
        environment: Variables by name, sorted.
        arguments: Flags of the launch, to follow the argument vector.
    """

    entry_script: str
    num_nodes: int
    devices_per_node: int
    environment: Mapping[str, str]
    arguments: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as JSON's types."""
        return {
            "entry_script": self.entry_script,
            "num_nodes": self.num_nodes,
            "devices_per_node": self.devices_per_node,
            "environment": dict(self.environment),
            "arguments": list(self.arguments),
        }


def make_policy(plan: Plan, options: LaunchOptions | None = None) -> LaunchPolicy:
    """Return the launch policy of a plan.

    Raises:
        LoweringError: If a part to capture is unknown, has no layers, or the release cannot.
    """
    options = options or LaunchOptions()
    parallelism = plan.recipe.parallelism
    return LaunchPolicy(
        entry_script=plan.release.entry_script,
        num_nodes=parallelism.num_nodes,
        devices_per_node=parallelism.devices_per_node,
        environment=environment(parallelism, options),
        arguments=(*_graph_flags(plan, options.cuda_graphs), *_loading_flags(options)),
    )


def environment(
    parallelism: Parallelism, options: LaunchOptions, *, cuda: bool = True
) -> dict[str, str]:
    """Return the variables of a launch, sorted by name; those of `options` win.

    Args:
        parallelism: The layout.
        options: What the user decides.
        cuda: Whether it runs on GPUs; without them only caches and `options` are left.
    """
    values = _of_gpus(parallelism, options) if cuda else {}
    if options.cache_dir:
        values["TORCHINDUCTOR_CACHE_DIR"] = f"{options.cache_dir}/torchinductor"
        values["TRITON_CACHE_DIR"] = f"{options.cache_dir}/triton"
    values.update(options.environment)
    return dict(sorted(values.items()))


def _of_gpus(parallelism: Parallelism, options: LaunchOptions) -> dict[str, str]:
    values = {
        "NCCL_NVLS_ENABLE": "0",
        "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
        "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
        "NVTE_NORM_BWD_USE_CUDNN": "1",
        "NVTE_NORM_FWD_USE_CUDNN": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    }
    shared = parallelism.tensor_model_parallel_size > 1 or parallelism.context_parallel_size > 1
    if shared and not options.blackwell:
        # Megatron orders communication and computation by their place in one queue.
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return values


def _loading_flags(options: LaunchOptions) -> list[str]:
    flags = []
    if options.data_workers is not None:
        flags += ["--num-workers", str(options.data_workers)]
    if options.cache_dir:
        flags += spelled("--data-cache-path", f"{options.cache_dir}/data")
    return flags


def _graph_flags(plan: Plan, parts: tuple[str, ...]) -> list[str]:
    if not parts:
        return []
    if plan.recipe.parallelism.recompute == "full":
        raise _graph_refusal(
            "Parts of a layer that is computed again whole cannot be captured",
            parts,
            "no cuda_graphs, or parallelism.recompute=none",
        )
    for part in parts:
        _check_graph(plan, part)
    if "moe_preprocess" in parts and "moe_router" not in parts:
        raise _graph_refusal(
            "moe_preprocess is captured with moe_router",
            parts,
            f"cuda_graphs={','.join(sorted({*parts, 'moe_router'}))}",
        )
    flags, place = plan.release.flags, _graph_flag(plan)
    if flags[place].nargs is None and len(parts) > 1:
        raise _graph_refusal(
            f"Megatron {plan.release.name} captures one part", parts, f"cuda_graphs={parts[0]}"
        )
    return ["--cuda-graph-impl", "transformer_engine", place, *parts]


def _graph_flag(plan: Plan) -> str:
    known = [f for f in ("--cuda-graph-modules", "--cuda-graph-scope") if f in plan.release.flags]
    if not known:  # of a release file of one's own
        raise LoweringError(
            f"Megatron {plan.release.name} captures no parts of a model",
            given="neither --cuda-graph-modules nor --cuda-graph-scope",
            allowed="a release with one of them",
            hint="no cuda_graphs",
        )
    return known[0]


def _check_graph(plan: Plan, part: str) -> None:
    if part not in GRAPHS:
        close = nearest(part, GRAPHS)
        raise _graph_refusal(
            f"No part to capture is called {part!r}", (part,), f"cuda_graphs={close or 'attn'}"
        )
    flag = plan.release.flags[_graph_flag(plan)]
    if flag.choices and part not in flag.choices:
        offered = [choice for choice in flag.choices if choice in GRAPHS]
        raise _graph_refusal(
            f"Megatron {plan.release.name} cannot capture {part}",
            (part,),
            _graphs_hint(offered[:1]),
        )
    if not plan.has(*GRAPHS[part]):
        have = [name for name, roles in GRAPHS.items() if plan.has(*roles)]
        raise _graph_refusal(
            f"The model has no layers with {part} to capture",
            (part,),
            _graphs_hint(have),
        )


def _graphs_hint(parts: list[str]) -> str:
    return f"cuda_graphs={','.join(parts)}" if parts else "no cuda_graphs"


def _graph_refusal(what: str, parts: tuple[str, ...], hint: str) -> LoweringError:
    return LoweringError(
        what, given=f"cuda_graphs={','.join(parts)}", allowed=", ".join(GRAPHS), hint=hint
    )
