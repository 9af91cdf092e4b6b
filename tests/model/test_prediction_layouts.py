"""One state with prediction depths, however it is laid over processes.

The last pipeline stage holds a copy of the token embedding: its gradient is a part of the one
in a single process, and a checkpoint has the weight once.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from megacpp_nemo.model.prediction import reduced_losses
from tests.model.building import build_model, megatron, small_config
from tests.model.test_sharding import ONE, PIPELINE, TENSOR, compare, load, save, step
from tests.support.processes import in_processes

pytestmark = pytest.mark.two_process

DEPTHS = {"mtp_num_layers": 2, "mtp_pattern": "AEM"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_pipeline_stages_predict_as_one_process_does(tmp_path, tied):
    changes = {**DEPTHS, "share_embeddings_and_output_weights": tied}
    compare(tmp_path, ("AEMR", ONE), ("AE|MR", PIPELINE), **changes)


def test_two_tensor_ranks_predict_as_one_process_does(tmp_path):
    compare(tmp_path, ("AEMR", ONE), ("AEMR", TENSOR), **DEPTHS)


def test_a_checkpoint_with_depths_moves_between_pipeline_and_tensor_ranks(tmp_path):
    compare(tmp_path, ("AE|MR", PIPELINE), ("AEMR", TENSOR), **DEPTHS)


def test_a_checkpoint_with_depths_moves_from_two_stages_to_one(tmp_path):
    compare(tmp_path, ("AE|MR", PIPELINE), ("AEMR", ONE), **DEPTHS)


def test_both_embeddings_and_every_ranks_losses_are_equal_after_loading_and_a_step(tmp_path):
    def run(layout: dict[str, Any], start: Any) -> tuple[Any, Any]:
        with megatron(**layout):
            config = small_config("AE|MR" if layout else "AEMR", **layout, **DEPTHS)
            model = build_model(config)
            if start is None:
                save(model, tmp_path / "weights")
            else:
                load(model, start)
            step(model, config)
            weight = model.embedding.word_embeddings.weight
            shared = (getattr(weight, "shared", False), weight.is_embedding_or_output_parameter)
            return (weight.detach().numpy(), shared), reduced_losses(model).numpy()

    (((expected, _), losses),) = in_processes(run, ONE, None)
    first, last = in_processes(run, PIPELINE, tmp_path / "weights", ranks=2)
    # Only one of the copies counts for the norm of the gradients.
    assert (first[0][1], last[0][1]) == ((False, True), (True, True))
    for (weight, _), found in (first, last):
        assert numpy.array_equal(weight, expected)
        numpy.testing.assert_allclose(found, losses, rtol=1e-5)


def test_a_stages_initial_copy_of_the_embedding_is_the_first_stages(tmp_path):
    def initial() -> Any:
        with megatron(**PIPELINE):
            model = build_model(small_config("A|M", **PIPELINE, **DEPTHS), shake=False)
            return model.embedding.word_embeddings.weight.detach().numpy()

    first, last = in_processes(initial, ranks=2)
    assert first.any()
    assert numpy.array_equal(first, last)
