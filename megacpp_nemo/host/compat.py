"""Adapters between NeMo 2.7.3 and Megatron-Core 0.16.1.

Each adapter is a probe and a change. `install()` applies those whose probe says they are
needed, once, and returns their names; delete an adapter when its probe never fires again.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.host.console import ignore_known_warnings


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One difference between the two packages, and what bridges it.

    Args:
        name: Short name, shown in logs.
        reason: What breaks without it.
        needed: Probe of the installed packages.
        apply: Makes the change.
    """

    name: str
    reason: str
    needed: Callable[[], bool]
    apply: Callable[[], None]


_applied: list[str] = []


def install() -> tuple[str, ...]:
    """Apply every adapter that is needed and not yet applied; return the names in force."""
    ignore_known_warnings()
    for adapter in ADAPTERS:
        if adapter.name not in _applied and adapter.needed():
            adapter.apply()
            _applied.append(adapter.name)
    return tuple(_applied)


# --- tensorstore strategy -------------------------------------------------------------------

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_CHECKPOINT_IO = "nemo.utils.callbacks.dist_ckpt_io"


def _tensorstore_missing() -> bool:
    module = sys.modules.get(_CHECKPOINT_IO)
    if module is not None and not module.HAVE_MEGATRON_CORE:
        return True
    return not _has_module(f"{_STRATEGIES}.tensorstore")


def _has_module(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _provide_tensorstore() -> None:
    """Stand in for the removed module, and repair NeMo if it was imported without it."""
    package = importlib.import_module(_STRATEGIES)
    name = f"{_STRATEGIES}.tensorstore"
    if not _has_module(name):
        module = types.ModuleType(name, "Placeholder: zarr checkpoints left Megatron-Core in 0.16.")
        module.TensorStoreLoadShardedStrategy = _NoTensorStore  # type: ignore[attr-defined]
        sys.modules[name] = module
        package.tensorstore = module  # type: ignore[attr-defined]
    loaded = sys.modules.get(_CHECKPOINT_IO)
    if loaded is not None and not loaded.HAVE_MEGATRON_CORE:
        _complete_checkpoint_io(loaded)


class _NoTensorStore:
    """Raises when a zarr checkpoint is really asked for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        from megacpp_nemo.contract.errors import RuntimeRefusal

        raise RuntimeRefusal(
            "Checkpoints in zarr format cannot be read by this Megatron-Core",
            given="a zarr checkpoint",
            allowed="torch_dist checkpoints",
            hint="convert the checkpoint with a release that reads zarr",
        )


def _complete_checkpoint_io(module: Any) -> None:
    """Give NeMo's checkpoint module the Megatron names its failed import left out."""
    wanted = {
        "megatron.core": ("dist_checkpointing",),
        "megatron.core.dist_checkpointing.dict_utils": ("extract_matching_values",),
        "megatron.core.dist_checkpointing.mapping": ("ShardedBase",),
        "megatron.core.dist_checkpointing.serialization": (
            "get_default_load_sharded_strategy",
            "get_default_save_sharded_strategy",
        ),
        _STRATEGIES: ("tensorstore",),
        f"{_STRATEGIES}.async_utils": ("AsyncCallsQueue", "AsyncRequest"),
        f"{_STRATEGIES}.base": ("SaveShardedStrategy",),
        f"{_STRATEGIES}.fully_parallel": (
            "FullyParallelLoadStrategyWrapper",
            "FullyParallelSaveStrategyWrapper",
        ),
        f"{_STRATEGIES}.torch": ("TorchDistSaveShardedStrategy",),
        "megatron.core.dist_checkpointing.validation": ("StrictHandling",),
        "megatron.core.parallel_state": ("get_data_parallel_group",),
    }
    for source, names in wanted.items():
        origin = importlib.import_module(source)
        for name in names:
            setattr(module, name, getattr(origin, name))
    module.HAVE_MEGATRON_CORE = True


# --- optimizer signature --------------------------------------------------------------------


def _optimizer_lost_conditions() -> bool:
    import inspect

    from megatron.core import optimizer

    taken = inspect.signature(optimizer.get_megatron_optimizer).parameters
    return "no_weight_decay_cond" not in taken


def _translate_conditions() -> None:
    """Accept NeMo's parameter conditions and pass them as Megatron's `config_overrides`.

    What is built trains n-gram tables in host memory, too.
    """
    from megatron.core import optimizer

    upstream = optimizer.get_megatron_optimizer

    def get_megatron_optimizer(
        config: Any,
        model_chunks: Any,
        no_weight_decay_cond: Callable[[str, Any], bool] | None = None,
        scale_lr_cond: Callable[[str, Any], bool] | None = None,
        lr_mult: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        overrides = kwargs.pop("config_overrides", None)
        if no_weight_decay_cond is not None or scale_lr_cond is not None:
            overrides = {
                **(overrides or {}),
                **condition_overrides(config, no_weight_decay_cond, scale_lr_cond, lr_mult),
            }
        from megacpp_nemo.model.host_optimizer import with_host_tables

        built = upstream(config, model_chunks, config_overrides=overrides, **kwargs)
        return with_host_tables(built, config, model_chunks, overrides)

    optimizer.get_megatron_optimizer = get_megatron_optimizer


def condition_overrides(
    config: Any,
    no_weight_decay_cond: Callable[[str, Any], bool] | None,
    scale_lr_cond: Callable[[str, Any], bool] | None,
    lr_mult: float,
) -> dict[Any, dict[str, float]]:
    """Return Megatron's parameter overrides for NeMo's two conditions.

    Args:
        config: Megatron's `OptimizerConfig`.
        no_weight_decay_cond: `(name, parameter) -> bool`, true where weight decay is off.
            None keeps Megatron's standard choice, biases and 1-D parameters.
        scale_lr_cond: `(name, parameter) -> bool`, true where the learning rate is scaled.
        lr_mult: The scale.

    Returns:
        A mapping for `get_megatron_optimizer(config_overrides=...)`. The scale is given as
        `lr_mult`, which NeMo applies to the group's rate, and as `max_lr` and `min_lr`, which
        Megatron's own scheduler reads.
    """
    from megatron.core.optimizer import ParamKey, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    def key(name: str, condition: Callable[[str, Any], bool]) -> Any:
        predicate = ParamWithNamePredicate(name=name, fn=lambda p, n: condition(n, p))
        return ParamKey(with_name_predicate=predicate)

    overrides: dict[Any, dict[str, float]] = {}
    if no_weight_decay_cond is None:
        overrides.update(get_standard_config_overrides(config))
    else:
        overrides[key("no_weight_decay", no_weight_decay_cond)] = {"wd_mult": 0.0}
    if scale_lr_cond is not None:
        scaled = {"lr_mult": lr_mult, "max_lr": config.lr * lr_mult}
        if config.min_lr is not None:
            scaled["min_lr"] = config.min_lr * lr_mult
        overrides[key("scaled_lr", scale_lr_cond)] = scaled
    return overrides


# --- without Transformer Engine -------------------------------------------------------------


def transformer_engine_available() -> bool:
    """Whether Megatron-Core found Transformer Engine."""
    from megatron.core.extensions import transformer_engine

    return bool(transformer_engine.HAVE_TE)


def _latent_attention_trusts_mock() -> bool:
    from megatron.core.transformer import multi_latent_attention

    return multi_latent_attention.HAVE_TE and not transformer_engine_available()


def _distrust_mock() -> None:
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = False


def _router_gemm_missing() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return not hasattr(moe_utils, "te_general_gemm")


def _provide_router_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


# --- without nvidia-resiliency-ext ----------------------------------------------------------


def _logger_needs_resiliency() -> bool:
    module = sys.modules.get("nemo.lightning.nemo_logger")
    return module is not None and not module.HAVE_RES and not isinstance(module.lcp, _NoResiliency)


class _NoResiliency:
    """Stands for the package in type checks: no callback is one of its own."""

    class LocalCheckpointCallback:
        """A type without instances."""


def _answer_type_checks() -> None:
    sys.modules["nemo.lightning.nemo_logger"].lcp = _NoResiliency()  # type: ignore[attr-defined]


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        name="tensorstore",
        reason="NeMo's checkpoint module imports a Megatron strategy that 0.16 removed",
        needed=_tensorstore_missing,
        apply=_provide_tensorstore,
    ),
    Adapter(
        name="optimizer-conditions",
        reason="get_megatron_optimizer takes config_overrides instead of NeMo's conditions",
        needed=_optimizer_lost_conditions,
        apply=_translate_conditions,
    ),
    Adapter(
        name="latent-attention-mock",
        reason="without Transformer Engine, MLA compares types against a mock",
        needed=_latent_attention_trusts_mock,
        apply=_distrust_mock,
    ),
    Adapter(
        name="router-gemm",
        reason="without Transformer Engine, the MoE router looks for a name never set",
        needed=_router_gemm_missing,
        apply=_provide_router_gemm,
    ),
    Adapter(
        name="local-checkpoint-type",
        reason="without nvidia-resiliency-ext, NeMo's logger fails on any checkpoint callback",
        needed=_logger_needs_resiliency,
        apply=_answer_type_checks,
    ),
)
