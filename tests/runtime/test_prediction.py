"""A recipe with multi-token prediction trains, logs each depth and moves between layouts.

It is a mixture of all that NAM56R has: its Mamba layers are Mamba-3, one attention layer is DSA,
and its input side has the n-gram memory and structure channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from torch import nn

from megacpp_nemo.contract.parameters import classify
from megacpp_nemo.planner.parameters import padded_vocabulary, parameters
from tests.support.processes import in_process, in_processes
from tests.support.training import configure, small_recipe

STEPS = 3
DEPTHS = {
    # Megatron 0.16 cannot save the distributed optimizer's state where the weights before a shared
    # embedding do not end at a multiple of 64.
    "hidden_size": 64,
    "model.mtp.num_layers": 2,
    "model.mtp.pattern": "AEM",
    "features.mamba": "author",
    "features.sparse_attention": True,
    "model.sparse_attention.a_ranks": (1,),
    "model.sparse_attention.indexer_topk": 8,
    "features.ngram_hash": True,
    "model.embedding.ngram.table_size": 100,
    "features.structure": "core",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sequence_parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2_distributed_optimizer": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "pp2_distributed_optimizer": {
        "pipeline_model_parallel_size": 2,
        "use_distributed_optimizer": True,
    },
}


def train_depths(
    sources: Path, folder: Path, start: Path | None = None, steps: int = STEPS, **changes: Any
) -> dict[str, Any]:
    """Train from a checkpoint's weights or anew; return what was logged and the embedding."""
    import fiddle as fdl
    import lightning.pytorch as pl
    import nemo_run as run
    from nemo.lightning import RestoreConfig

    from megacpp_nemo.callbacks.matrices import hybrid_models

    found: dict[str, Any] = {"logged": []}

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            names = ("reduced_train_loss", "grad_norm", "mtp_1_loss", "mtp_2_loss")
            found["logged"].append([float(metrics[n]) for n in names if n in metrics])

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            (model,) = hybrid_models(trainer.strategy.model)
            embedding = getattr(model, "embedding", nn.Module())
            found["inputs"] = {n: w.detach().numpy() for n, w in embedding.named_parameters()}
            found["shapes"] = {name: tuple(w.shape) for name, w in model.named_parameters()}
            found["kept"] = set(trainer.logged_metrics)

    partial = configure(small_recipe(**changes), sources, folder, steps=steps)
    if start is not None:
        partial.resume.restore_config = run.Config(RestoreConfig, path=str(start))
    built = fdl.build(partial)
    built.keywords["trainer"].callbacks.append(Recorder())
    built()
    return found


@pytest.fixture(scope="module")
def start(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with depths, of one process."""
    folder = tmp_path_factory.mktemp("depths")
    in_process(lambda: train_depths(sources, folder, steps=2, **DEPTHS) and None)
    return folder / "checkpoints" / "step=2"


@pytest.fixture(scope="module")
def single(start: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("single")
    return in_process(lambda: train_depths(sources, folder, start, **DEPTHS))


@pytest.mark.two_process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_log_and_train_what_one_does(
    layout: str, single: Any, start: Path, sources: Path, tmp_path: Path
) -> None:
    changes = {**DEPTHS, "devices_per_node": 2, **LAYOUTS[layout]}
    results = in_processes(lambda: train_depths(sources, tmp_path, start, **changes), ranks=2)
    for result in results:
        numpy.testing.assert_allclose(result["logged"], single["logged"], rtol=2e-5)
    if "pipeline_model_parallel_size" in changes:
        first, last = (result["inputs"] for result in results)
        assert first.keys() == last.keys() == single["inputs"].keys()
        for name, weight in single["inputs"].items():
            assert numpy.array_equal(first[name], last[name]), name
            numpy.testing.assert_allclose(first[name], weight, atol=1e-4, err_msg=name)


@pytest.mark.two_process
def test_depths_without_weight_do_not_hold_up_overlapped_reduction(
    sources: Path, tmp_path: Path
) -> None:
    changes = {
        **DEPTHS,
        "model.mtp.loss_scaling_factor": 0.0,
        "devices_per_node": 2,
        **LAYOUTS["dp2_distributed_optimizer"],
    }
    for result in in_processes(lambda: train_depths(sources, tmp_path, **changes), ranks=2):
        assert numpy.shape(result["logged"]) == (STEPS, 4)


def test_the_recipe_logs_each_depths_loss(single: Any) -> None:
    assert {"mtp_1_loss", "mtp_2_loss"} <= single["kept"]
    assert numpy.shape(single["logged"]) == (STEPS, 4)
    # Every head of 512 tokens starts at ln 512 = 6.24.
    for loss in numpy.array(single["logged"])[:, 2:].flat:
        assert 5 < loss < 6.5


def test_the_planned_parameters_of_the_depths_are_those_built(single: Any) -> None:
    intent = small_recipe(**DEPTHS)
    planned = {parameter.name: parameter.shape for parameter in parameters(intent)}
    built = {
        classify(name, shape, layers=intent.layers, model=intent.model, mamba="author").name: shape
        for name, shape in single["shapes"].items()
    }
    # What is built has the vocabulary of its tokenizer.
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert planned[name] == (padded_vocabulary(intent), built[name][1])
        built[name] = planned[name]
    assert planned == built


def test_one_setting_on_the_tiny_recipe_gives_it_a_depth(sources: Path, tmp_path: Path) -> None:
    result = in_process(
        lambda: train_depths(sources, tmp_path, steps=2, **{"model.mtp.num_layers": 1})
    )
    assert numpy.shape(result["logged"]) == (2, 3)
    assert "mtp_1_loss" in result["kept"]
    assert "mtp_2_loss" not in result["kept"]


def test_validation_is_of_the_main_head_alone(sources: Path, tmp_path: Path) -> None:
    def validated(weight: float) -> float:
        import fiddle as fdl

        changes = {**DEPTHS, "model.mtp.loss_scaling_factor": weight}
        intent, folder = small_recipe(**changes), tmp_path / str(weight)
        partial = configure(intent, sources, folder, steps=1, save_interval=None)
        partial.trainer.limit_val_batches = partial.trainer.val_check_interval = 1
        built = fdl.build(partial)
        trainer = built.keywords["trainer"]
        optim = built.keywords["optim"]
        optim.config.lr = optim.lr_scheduler.min_lr = 0.0
        built()
        return float(trainer.callback_metrics["val_loss"])

    first, second = (in_process(validated, weight) for weight in (0.0, 10.0))
    assert first == second
    assert first < 6.5
