"""N-gram tables in host memory train as those on the device do, in any layout they allow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.model.host_optimizer import HostTableOptimizer, with_host_tables
from megacpp_nemo.model.ngram_table import HostNgramTable, NgramTable
from tests.model.building import (
    build_model,
    groups,
    megatron,
    random_tokens,
    run_model,
    shaken,
    small_config,
)
from tests.model.test_input_layouts import INPUTS, run_step
from tests.model.test_sharding import ONE, TENSOR
from tests.support.processes import in_process, in_processes

TABLE = "embedding.ngram_hash.table.weight"
STEPS = 5
HOST: dict[str, Any] = {**INPUTS, "ngram_placement": "host"}
SHARED: dict[str, Any] = {"use_distributed_optimizer": True}


def trainer(changes: dict[str, Any], shared: dict[str, Any]) -> Any:
    """Return a model in Megatron's wrappers, its optimizer and its schedule."""
    config = small_config("M", **changes)
    config.finalize_model_grads_func = finalize_model_grads
    model: Any = build_model(config, shake=False)
    # So that the table has a gradient in the first step; a buffer would not be shaken.
    shaken(model.embedding.ngram_hash.out_proj)
    if config.bf16:
        model = Float16Module(config, model)
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **shared)
    wrapped = DistributedDataParallel(config, buffers, model)
    settings = OptimizerConfig(
        lr=1e-2, min_lr=1e-3, weight_decay=0.3, clip_grad=0.02, bf16=config.bf16,
        params_dtype=config.params_dtype, **shared,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [wrapped])
    optimizer = with_host_tables(optimizer, settings, [wrapped])
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-2, min_lr=1e-3, lr_warmup_steps=2, lr_decay_steps=6,
        lr_decay_style="cosine", start_wd=0.3, end_wd=0.3, wd_incr_steps=6,
        wd_incr_style="constant", wsd_decay_steps=None, lr_wsd_decay_style=None,
    )  # fmt: skip
    return SimpleNamespace(
        config=config, wrapped=wrapped, optimizer=optimizer, schedule=schedule, number=0
    )


def advance(run: Any, steps: int) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each of the next steps."""
    found = []
    for _ in range(steps):
        run.optimizer.zero_grad()
        loss = run_step(run.wrapped, run.config, run.number)
        norm = run.optimizer.step()[1]
        run.schedule.step(1)
        run.number += 1
        found.append((loss, float(norm)))
    return found


def weights_of(run: Any) -> dict[str, Any]:
    """Return what a checkpoint would have of this process, by name."""
    state = {**dict(run.wrapped.named_parameters()), **dict(run.wrapped.named_buffers())}
    return {
        name.removeprefix("module.").removeprefix("module."): weight.detach().float().numpy().copy()
        for name, weight in state.items()
    }


def train(
    layout: dict[str, Any], changes: dict[str, Any], shared: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return losses and norms of some steps, and the weights before and behind them."""
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    with megatron(**sizes):
        run = trainer({**changes, **layout}, shared)
        first = weights_of(run)
        found = advance(run, STEPS)
        return found, first, weights_of(run)


BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


@pytest.mark.two_process
@pytest.mark.parametrize(
    ("layout", "ranks", "changes", "shared"),
    [
        (ONE, 1, {}, {}),
        (ONE, 1, {"mtp_num_layers": 1, "mtp_pattern": "M"}, {}),
        (ONE, 1, BF16, {}),
        (ONE, 2, {}, {}),
        (ONE, 2, {}, SHARED),
        (TENSOR, 2, {}, {}),
    ],
    ids=["one", "depths", "bf16", "data", "shared_optimizer", "tensor"],
)
def test_the_host_table_trains_as_the_device_table_does(layout, ranks, changes, shared):
    device = in_processes(train, layout, {**INPUTS, **changes}, shared, ranks=ranks)
    host = in_processes(train, layout, {**HOST, **changes}, shared, ranks=ranks)
    # What is rounded to bf16 is rounded at other places of the sum.
    close = 2e-2 if changes == BF16 else 1e-5
    for (expected, start, end), (found, first, last) in zip(device, host, strict=True):
        numpy.testing.assert_allclose(found, expected, rtol=close)
        # Clipping is part of it.
        assert all(norm > 0.02 for _, norm in found)
        assert first.keys() == start.keys() == last.keys()
        for name in start:
            gap = abs(last[name] - end[name])
            if changes == BF16:
                # Adam makes whole steps of the rounding of gradients near zero: of a few elements.
                assert numpy.quantile(gap, 0.995) < 1e-2, name
                continue
            assert numpy.array_equal(first[name], start[name]), name
            assert gap.max() < 1e-4, name
        assert abs(last[TABLE] - first[TABLE]).max() > 1e-2


@pytest.mark.two_process
def test_every_data_parallel_rank_keeps_the_same_table_to_the_bit():
    one, two = in_processes(train, ONE, HOST, {}, ranks=2)
    assert numpy.array_equal(one[2][TABLE], two[2][TABLE])
    assert one[0] != two[0]


def test_the_table_stays_in_host_memory_and_fp32_and_no_parameter_holds_it():
    def look() -> None:
        with megatron():
            run = trainer({**HOST, **BF16}, {})
            names = [name for name, _ in run.wrapped.named_parameters()]
            assert not [name for name in names if "table" in name and "ngram" in name]
            model = run.wrapped.module.module
            table = model.embedding.ngram_hash.table
            before = table.weight
            model.to(torch.float64).to("meta")
            assert table.weight is before
            assert (before.dtype, before.device.type) == (torch.float32, "cpu")
            held = run.optimizer.chained_optimizers
            assert isinstance(held[-1], HostTableOptimizer)
            assert held[-1].optimizer.param_groups[0]["params"][0] is before
            # Weight decay and rates are those that Megatron gives the table on the device.
            kept = {k: v for k, v in held[-1].param_groups[0].items() if k != "params"}
            assert (kept["wd_mult"], kept["max_lr"], kept["min_lr"]) == (1.0, 1e-2, 1e-3)

    in_process(look)


def save(run: Any, folder: Path) -> None:
    model = run.wrapped.module.sharded_state_dict()
    folder.mkdir()
    state = {
        "model": model,
        "optimizer": run.optimizer.sharded_state_dict(model),
        "schedule": run.schedule.state_dict(),
    }
    dist_checkpointing.save(state, str(folder))


def load(run: Any, folder: Path, *, optimizer: bool = True) -> None:
    model = run.wrapped.module.sharded_state_dict()
    state: dict[str, Any] = {"model": model}
    if optimizer:
        state["optimizer"] = run.optimizer.sharded_state_dict(model, is_loading=True)
    found = dist_checkpointing.load(state, str(folder))
    run.wrapped.module.load_state_dict(found["model"])
    if optimizer:
        run.optimizer.load_state_dict(found["optimizer"])


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    def whole() -> Any:
        with megatron():
            run = trainer(HOST, {})
            advance(run, 2)
            save(run, tmp_path / "saved")
            return advance(run, 3), weights_of(run)

    def resumed() -> Any:
        with megatron():
            run = trainer({**HOST, "seed": 77}, {})
            load(run, tmp_path / "saved")
            for _ in range(2):
                run.schedule.step(1)
            run.number = 2
            return advance(run, 3), weights_of(run)

    expected, weights = in_process(whole)
    found, last = in_process(resumed)
    assert found == expected
    assert not [name for name in weights if not numpy.array_equal(weights[name], last[name])]


@pytest.mark.parametrize(("first", "second"), [(INPUTS, HOST), (HOST, INPUTS)])
def test_weights_move_between_the_placements(tmp_path, first, second):
    def begin() -> Any:
        with megatron():
            run = trainer(first, {})
            advance(run, 1)
            save(run, tmp_path / "saved")
            return weights_of(run)

    def go_on() -> Any:
        with megatron():
            run = trainer({**second, "seed": 77}, {})
            load(run, tmp_path / "saved", optimizer=False)
            return weights_of(run)

    expected, found = in_process(begin), in_process(go_on)
    assert not [name for name in expected if not numpy.array_equal(expected[name], found[name])]


def test_gradients_that_no_optimizer_would_take_are_refused():
    def backward() -> None:
        with megatron():
            model = build_model(small_config("M", **HOST))
            run_model(model, random_tokens(2, 16)).sum().backward()

    def refused() -> str:
        with pytest.raises(RuntimeRefusal, match="Nothing would apply") as caught:
            backward()
        return str(caught.value)

    assert "ngram_placement='device'" in in_process(refused)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"calculate_per_token_loss": True}, "calculate_per_token_loss=True"),
        ({"fp16": True}, "fp16=True"),
    ],
)
def test_settings_it_is_not_trained_with_are_refused(changes, named):
    with pytest.raises(RuntimeRefusal, match=f"(?s)host memory.*{named}"):
        small_config("AM", **HOST, **changes)
    small_config("AM", **INPUTS, **changes)


def test_several_pipeline_stages_are_refused():
    stages = {"pipeline_model_parallel_size": 2}
    with pytest.raises(RecipeError, match="host memory are trained on a single pipeline stage"):
        small_config("A|M", **HOST, **stages)
    small_config("A|M", **INPUTS, **stages)


@pytest.mark.parametrize("setting", [{"optimizer": "sgd"}, {"optimizer_cpu_offload": True}])
def test_optimizers_it_is_not_trained_with_are_refused(setting):
    def build() -> str:
        with megatron():
            model = build_model(small_config("M", **HOST))
            config = OptimizerConfig(lr=1e-2, **setting)
            with pytest.raises(RuntimeRefusal) as caught:
                with_host_tables(None, config, [model])
            return str(caught.value)

    assert f"{next(iter(setting))}=" in in_process(build)


def test_an_unknown_place_is_refused():
    with pytest.raises(RecipeError, match="placement cannot be 'hots'") as caught:
        small_config("M", ngram_placement="hots")
    assert "host" in caught.value.hint


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_a_table_alone_moves_as_under_plain_adamw(device):
    """On a GPU, clipping meets tensors of both memories, and the device holds no table."""

    def rows_of(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(-1, 5000, (2, 16, 3), generator=draw)
        return rows.to(device)

    def look() -> None:
        with megatron():
            kinds = [NgramTable, HostNgramTable]
            plain, host = (kind(small_config("M", **HOST), 5000, 8, groups().tp) for kind in kinds)
            assert torch.equal(plain.weight.cpu(), host.weight)
            assert (plain.weight.device.type, host.weight.device.type) == (device, "cpu")
            assert host.weight.is_pinned() is (device == "cuda")
            adam = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
            config = OptimizerConfig(lr=0.01, weight_decay=0.1, clip_grad=0.5)
            ours = with_host_tables(ChainedOptimizer([]), config, [host])
            for step in range(4):
                adam.zero_grad()
                for table in (plain, host):
                    read = table(rows_of(step))
                    assert read.device.type == device
                    read.square().sum().backward()
                norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                adam.step()
                assert ours.step()[1] == pytest.approx(norm.item(), rel=1e-5)
            torch.testing.assert_close(host.weight, plain.weight.cpu(), rtol=0, atol=1e-6)

    in_process(look)
