"""What of a batch reaches the model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megacpp_nemo.contract.errors import RuntimeRefusal

STRUCTURE = {"category": torch.ones(2, 4), "node_type": torch.zeros(2, 4)}


@pytest.fixture
def steps(monkeypatch):
    from megacpp_nemo.model import steps

    def upstream(batches, use_mtp):
        given = next(batches)
        return dict.fromkeys(given[0] if isinstance(given, tuple) else given)

    monkeypatch.setattr(steps, "gpt_data_step", upstream)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self + 10)
    return steps


class Model:
    """Keeps what it was called with."""

    def __init__(self, structure=None, training=True):
        self.config, self.training = SimpleNamespace(structure=structure), training

    def __call__(self, **given):
        self.given = given
        return torch.zeros(())


def batch(**more):
    return {"tokens": 1, "position_ids": 2, "labels": 3, "loss_mask": 4, **more}


@pytest.mark.parametrize("wrapped", [False, True])
def test_channels_and_documents_move_to_the_device(steps, wrapped):
    tensors = {
        "tokens": torch.ones(2, 4),
        "document_ids": torch.zeros(2, 4),
        "structure": STRUCTURE,
    }
    kept = steps.hybrid_data_step(iter([(tensors, 0, 0) if wrapped else tensors]))
    assert kept["document_ids"].mean() == 10
    assert {name: int(ids.mean()) for name, ids in kept["structure"].items()} == {
        "category": 11,
        "node_type": 10,
    }
    assert "structure" not in steps.hybrid_data_step(iter([{"tokens": torch.ones(2, 4)}]))


def test_a_model_with_channels_is_given_them_and_no_other_is(steps):
    model = Model("all")
    steps.hybrid_forward_step(model, batch(structure=STRUCTURE))
    assert model.given["structure"] is STRUCTURE
    model = Model()
    steps.hybrid_forward_step(model, batch(structure=STRUCTURE))
    assert "structure" not in model.given


def test_training_without_the_channels_is_refused_and_evaluating_is_not(steps):
    with pytest.raises(RuntimeRefusal, match=r"data\.structure=core"):
        steps.hybrid_forward_step(Model("core"), batch())
    model = Model("core", training=False)
    steps.hybrid_forward_step(model, batch())
    assert model.given["structure"] is None
