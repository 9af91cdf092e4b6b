"""Each adapter fires only where it is needed, and does what it says."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract import RuntimeRefusal
from megacpp_nemo.host import compat
from tests.support.processes import in_process

NAMES = {adapter.name for adapter in compat.ADAPTERS}


@pytest.fixture(autouse=True)
def _imports(sources: Path) -> None:
    """NeMo is imported and the adapters are in force."""


def test_every_adapter_says_what_breaks_without_it() -> None:
    assert len(NAMES) == len(compat.ADAPTERS)
    assert all(len(adapter.reason) > 20 for adapter in compat.ADAPTERS)


def test_installing_again_changes_nothing() -> None:
    from megatron.core import optimizer

    before = optimizer.get_megatron_optimizer
    assert compat.install() == compat.install()
    assert optimizer.get_megatron_optimizer is before


def test_no_adapter_is_needed_once_all_are_installed() -> None:
    compat.install()
    assert [adapter.name for adapter in compat.ADAPTERS if adapter.needed()] == []


@pytest.mark.parametrize("name", ["optimizer-conditions", "latent-attention-mock", "router-gemm"])
def test_an_adapter_is_not_needed_where_upstream_has_what_it_adds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import optimizer
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    def takes_conditions(config: Any, chunks: Any, no_weight_decay_cond: Any = None) -> None:
        """The signature of an older Megatron."""

    monkeypatch.setattr(optimizer, "get_megatron_optimizer", takes_conditions)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(multi_latent_attention, "HAVE_TE", True)
    monkeypatch.setattr(moe_utils, "te_general_gemm", object(), raising=False)
    adapter = next(adapter for adapter in compat.ADAPTERS if adapter.name == name)
    assert not adapter.needed()


def test_nemo_imported_before_the_adapter_is_repaired() -> None:
    def run() -> tuple[bool, bool, list[str]]:
        from nemo.utils.callbacks import dist_ckpt_io

        compat._applied.clear()
        names = ("AsyncCallsQueue", "StrictHandling", "dist_checkpointing")
        for name in names:
            delattr(dist_ckpt_io, name)
        dist_ckpt_io.HAVE_MEGATRON_CORE = False
        before = compat._tensorstore_missing()
        compat.install()
        missing = [name for name in names if not hasattr(dist_ckpt_io, name)]
        return before, dist_ckpt_io.HAVE_MEGATRON_CORE, missing

    assert in_process(run) == (True, True, [])


def test_a_zarr_checkpoint_is_refused_by_name() -> None:
    from megatron.core.dist_checkpointing.strategies import tensorstore

    with pytest.raises(RuntimeRefusal, match="zarr"):
        tensorstore.TensorStoreLoadShardedStrategy(load_directly_on_device=True)


def test_type_checks_for_resiliency_callbacks_find_none() -> None:
    from nemo.lightning import nemo_logger

    if nemo_logger.HAVE_RES:
        pytest.skip("nvidia-resiliency-ext is installed, so there is nothing to stand in for")
    assert not isinstance(object(), nemo_logger.lcp.LocalCheckpointCallback)


class _Parameter:
    def __init__(self, *shape: int) -> None:
        self.shape = shape


def _groups(overrides: dict[Any, dict[str, float]], name: str, parameter: Any) -> dict[str, float]:
    merged: dict[str, float] = {}
    for key, values in overrides.items():
        if key.matches(parameter, name):
            merged.update(values)
    return merged


def _config(**changes: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(optimizer="adam", lr=1.0, min_lr=0.1, **changes)


def test_a_weight_decay_condition_replaces_megatrons_own() -> None:
    overrides = compat.condition_overrides(
        _config(), lambda name, parameter: name.endswith("special"), None, 1.0
    )
    assert _groups(overrides, "layer.special", _Parameter(3, 3)) == {"wd_mult": 0.0}
    assert _groups(overrides, "layer.bias", _Parameter(3)) == {}


def test_without_a_weight_decay_condition_one_dimensional_parameters_are_spared() -> None:
    overrides = compat.condition_overrides(_config(), None, lambda name, parameter: False, 2.0)
    assert _groups(overrides, "layer.weight", _Parameter(3)) == {"wd_mult": 0.0}
    assert _groups(overrides, "layer.weight", _Parameter(3, 3)) == {}


def test_a_learning_rate_condition_scales_the_rate() -> None:
    overrides = compat.condition_overrides(
        _config(), None, lambda name, parameter: "head" in name, 0.5
    )
    assert _groups(overrides, "head.weight", _Parameter(3, 3)) == {
        "lr_mult": 0.5,
        "max_lr": 0.5,
        "min_lr": 0.05,
    }
    assert _groups(overrides, "body.weight", _Parameter(3, 3)) == {}


def test_the_conditions_reach_the_optimizers_parameter_groups(
    sources: Path, tmp_path: Path
) -> None:
    import lightning.pytorch as pl

    from tests.support.training import configure, small_recipe

    class Groups(pl.Callback):
        rows: list[tuple[float, float, int]]

        def on_train_start(self, trainer: Any, *args: Any) -> None:
            self.rows = sorted(
                (group["pre_mult_lr"], round(group["weight_decay"], 6), len(group["params"]))
                for group in trainer.optimizers[0].param_groups
            )

    def run(conditions: bool) -> list[tuple[float, float, int]]:
        import fiddle as fdl

        groups = Groups()
        partial = configure(small_recipe(), sources, tmp_path / str(conditions), steps=1)
        if conditions:
            partial.optim.no_weight_decay_cond = _never
            partial.optim.scale_lr_cond = _is_head
            partial.optim.lr_mult = 0.25
        built = fdl.build(partial)
        built.keywords["trainer"].callbacks.append(groups)
        built()
        return groups.rows

    plain = in_process(run, False)
    assert {decay for _, decay, _ in plain} == {0.0, 0.1}
    conditioned = in_process(run, True)
    assert {decay for _, decay, _ in conditioned} == {0.1}
    assert sorted(count for *_, count in conditioned)[0] == 1


def _never(name: str, parameter: Any) -> bool:
    return False


def _is_head(name: str, parameter: Any) -> bool:
    return "output_layer" in name


def test_a_missing_nemo_logger_needs_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nemo.lightning.nemo_logger")
    assert not compat._logger_needs_resiliency()
    with_package = types.SimpleNamespace(HAVE_RES=True, lcp=object())
    monkeypatch.setitem(sys.modules, "nemo.lightning.nemo_logger", with_package)
    assert not compat._logger_needs_resiliency()
