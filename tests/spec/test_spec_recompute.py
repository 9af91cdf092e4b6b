"""Whole layers run again in Megatron's own stack: by its flags, or by the name of the spec."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel

from tests.spec import release_model
from tests.spec.release_model import AUTHOR_MAMBA, RECURRENT, SPARSE
from tests.support.processes import in_process

AGAIN = "parallelism.recompute=full"
FLAGS = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
CORES = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
LAYERS = f"layers=LemR,{RECURRENT}"
DEPTHS = f"layers=LemR,mtp=Le,{RECURRENT}"


def step(pattern: str, name: str, **changes: Any) -> tuple[Any, dict[str, Any], Counter[str], int]:
    """Return loss, gradients, forward passes of modules and kept bytes of a training step."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1)
    model = release_model.build(pattern, name, **changes)
    runs: Counter[str] = Counter()
    for module_name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=module_name: runs.update([name]))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = release_model.loss_of(model)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, runs, sum(kept.values())


def compared(
    pattern: str, name: str, again: str, changes: dict[str, Any], both: dict[str, Any]
) -> dict[str, Any]:
    """Return how a step that computes again differs from one that keeps everything."""
    release_model.start()
    plain = step(pattern, name, **both)
    other = step(pattern, f"{name},{again}" if again else name, **both, **changes)
    assert plain[1].keys() == other[1].keys()
    gaps = [(plain[0] - other[0]).abs().max()]
    gaps += [(plain[1][key] - other[1][key]).abs().max() for key in plain[1]]
    return {
        "gap": max(gap.item() for gap in gaps),
        "again": sorted(key for key in other[2] if other[2][key] > plain[2][key]),
        "kept": other[3] / plain[3],
    }


def inside(pattern: str) -> set[str]:
    """Return the part of each layer of a pattern that its output is made by."""
    part = {"*": "self_attention", "D": "self_attention", "E": "mlp", "M": "mixer"}
    return {f"decoder.layers.{place}.{part[symbol]}" for place, symbol in enumerate(pattern)}


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("*EMM*", f"layers=DemRL,{RECURRENT},{SPARSE}"), ("*EM", f"layers=LeN,{AUTHOR_MAMBA}")],
)
def test_the_name_of_the_spec_lets_every_layer_run_again(pattern, name):
    found = in_process(compared, pattern, name, AGAIN, {}, {})
    assert found["gap"] == 0
    assert inside(pattern) <= set(found["again"])
    assert found["kept"] < 0.2


def test_the_flags_alone_change_nothing_in_a_stack_that_keeps_everything():
    found = in_process(compared, "*EMM", LAYERS, "", FLAGS, {})
    assert not found["again"]
    assert found["kept"] == pytest.approx(1, abs=0.05)


def on(on_release: Any, release: str, *job: Any) -> dict[str, Any]:
    output = on_release(release, "tests.spec.test_spec_recompute", json.dumps(job))
    found: dict[str, Any] = json.loads(output.rpartition("compared: ")[2])
    return found


@pytest.mark.megatron_source
@pytest.mark.parametrize(
    ("release", "again", "changes"),
    [
        ("0.17.1", AGAIN, {}),
        ("0.18.2", "", FLAGS),
        ("0.19.0", "", FLAGS),
        ("main-2026-08", "", FLAGS),
    ],
)
def test_every_layer_runs_again_on_later_releases(on_release, release, again, changes):
    found = on(on_release, release, "*EMM", LAYERS, again, changes, {})
    assert found["gap"] == 0
    assert inside("*EMM") <= set(found["again"])
    assert found["kept"] < 0.2


@pytest.mark.megatron_source
@pytest.mark.parametrize(
    ("release", "again", "changes"),
    [("0.17.1", AGAIN, {}), ("0.18.2", AGAIN, {}), ("0.19.0", "", FLAGS)],
)
def test_prediction_depths_run_again_too(on_release, release, again, changes):
    job = ("*EMM/*E/*E", DEPTHS, again, changes, {"mtp_num_layers": 2})
    found = on(on_release, release, *job)
    # 0.19 runs a depth inside another recomputation, and sums its gradients in another order.
    assert found["gap"] < 1e-6
    assert inside("*EMM") <= set(found["again"])
    assert any(name.startswith("mtp.") for name in found["again"])
    assert found["kept"] < 0.3


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", ["0.16.1", "0.17.1", "0.18.2", "0.19.0", "main-2026-08"])
def test_cores_of_attention_run_again_on_every_release(on_release, release):
    found = on(on_release, release, "*EMM", LAYERS, "", CORES, {})
    assert found["gap"] == 0
    cores = "decoder.layers.0.self_attention.core_attention"
    assert all(name.startswith(cores) for name in found["again"])
    assert cores in found["again"]


@pytest.mark.megatron_source
def test_the_flags_change_nothing_in_the_stack_of_0_17(on_release):
    found = on(on_release, "0.17.1", "*EMM", LAYERS, "", FLAGS, {})
    assert not found["again"]
    assert found["kept"] == pytest.approx(1, abs=0.05)


if __name__ == "__main__":
    import sys

    print("compared: " + json.dumps(compared(*json.loads(sys.argv[1]))))
