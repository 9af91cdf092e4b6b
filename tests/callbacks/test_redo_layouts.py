"""The same units are measured, judged and made new alike, however a run is laid over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.experts import LEVER, RECYCLED, metered
from tests.callbacks.runs import (
    OVERLAPPED,
    TWO,
    configured,
    named_parameters,
    on_ranks,
    train_with,
)

MODEL = {"pattern": "AEME", "model.experts.activation": "swiglu", "model.mtp.num_layers": 1}
TENSOR = {**TWO, "tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TENSOR,
    "tp2_ep2": {**TENSOR, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "ep2": {**TWO, "expert_model_parallel_size": 2},
    "pp2": {**TWO, "pipeline_model_parallel_size": 2},
    "dp2_overlapped": OVERLAPPED,
    "bf16": {"precision": "bf16", "use_distributed_optimizer": False},
    "bf16_overlapped": {"precision": "bf16", **OVERLAPPED},
}
ALIKE = [name for name in LAYOUTS if not name.startswith("bf16")]
STEPS, SEED = 6, 11


def run(sources: Path, folder: Path, start: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
    """Recycle units after a step of a run; return what was seen, and the run's losses."""
    import nemo_run
    from nemo.lightning import RestoreConfig

    seen: dict[str, Any] = {}

    def act(trainer: Any, meter: Any) -> None:
        from megacpp_nemo.callbacks.redo import dormant, recycle, report, scores

        seen["scores"], seen["masks"] = scores(meter), dormant(meter, LEVER)
        seen["report"] = report(meter, LEVER, step=RECYCLED)
        seen["state"] = meter.state_dict()
        seen["before"] = snapshot(trainer)
        parallel = trainer.strategy.megatron_parallel
        seen["action"] = recycle(
            parallel, meter, LEVER, trainer.optimizers, step=RECYCLED, seed=SEED
        )
        seen["after"] = snapshot(trainer)
        seen["shares"] = shares(parallel, meter)

    partial = configured(sources, folder, steps=STEPS, **{**MODEL, **changes})
    if start is not None:
        partial.resume.restore_config = nemo_run.Config(RestoreConfig, path=str(start))
    seen["losses"] = train_with(partial, *metered(act))["loss"]
    return seen


def snapshot(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return a copy of what this rank holds of each parameter, and of its optimizer's state."""
    from megacpp_nemo.callbacks.optimizers import OptimizerStates

    states = OptimizerStates(trainer.optimizers)
    found = {}
    for name, parameter in named_parameters(trainer).items():
        owned = states.owned(parameter)
        found[name] = {
            "weights": parameter.detach().clone(),
            "own": slice(owned.begin, owned.end),
            "master": owned.master.clone(),
            "moments": [moment.clone() for moment in owned.moments],
        }
    return found


def shares(parallel: Any, meter: Any) -> list[dict[str, Any]]:
    """Return this rank's share of each MLP, and what its parameters are called here."""
    from megacpp_nemo.callbacks.matrices import hybrid_models
    from megacpp_nemo.callbacks.mlps import shares_of

    bare = hybrid_models(parallel)
    names = {id(p): name for name, p in bare[0].named_parameters()}
    found = []
    for share in shares_of(bare, meter.mlps):
        into, _, out = share.tensors()
        units = slice(share.begin, share.begin + share.units)
        at = {"mlp": share.mlp.name, "units": units, "into": names[id(into)], "out": names[id(out)]}
        found.append(at)
    return found


def written(rank: dict[str, Any]) -> dict[str, Tensor]:
    """Return where this rank's parameters were to be written, by name."""
    where = {}
    for share in rank["shares"]:
        mask = rank["masks"][share["mlp"]][share["units"]]
        into, out = (rank["after"][share[name]]["weights"] for name in ("into", "out"))
        rows = mask.repeat(into.size(0) // len(mask))
        where[share["into"]] = rows[:, None].expand(into.shape)
        where[share["out"]] = mask.expand(out.shape)
    return where


def renewed(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the whole incoming weights `[gate and up, units, width]` of each MLP."""
    parts: dict[str, dict[int, Tensor]] = {}
    for rank in ranks:
        for share in rank["shares"]:
            into = rank["after"][share["into"]]["weights"]
            units = share["units"].stop - share["units"].start
            of_mlp = parts.setdefault(share["mlp"], {})
            of_mlp[share["units"].start] = into.view(-1, units, into.size(1))
    return {
        name: torch.cat([of_mlp[begin] for begin in sorted(of_mlp)], 1)
        for name, of_mlp in parts.items()
    }


@pytest.fixture(scope="module")
def start(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("start")
    on_ranks(lambda: train_with(configured(sources, folder, steps=2, save_interval=2, **MODEL)))
    return folder / "checkpoints" / "step=2"


@pytest.fixture(scope="module")
def single(start: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    (seen,) = on_ranks(run, sources, tmp_path_factory.mktemp("single"), start, {})
    return seen


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(
    request: pytest.FixtureRequest,
    start: Path,
    sources: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What each rank of a layout saw."""
    changes = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return on_ranks(run, sources, folder, start, changes, ranks=changes.get("devices_per_node", 1))


alike = pytest.mark.parametrize("ranks", ALIKE, indirect=True)


def test_rounding_cannot_move_a_unit_over_the_threshold(single: Any) -> None:
    """And some units of routed and of shared experts are dormant, but few are."""
    names = [name for name, mask in single["masks"].items() if mask.any()]
    assert {"experts." in name for name in names} == {True, False}
    distance = min(float((s - LEVER.threshold).abs().min()) for s in single["scores"].values())
    assert distance > 1e-4
    assert 0 < single["report"].totals["ratio"] < 0.5


@pytest.mark.two_process
@alike
def test_every_rank_measures_and_reports_what_one_process_does(ranks: Any, single: Any) -> None:
    for rank in ranks:
        torch.testing.assert_close(
            rank["state"]["means"], single["state"]["means"], rtol=1e-4, atol=1e-9
        )
        for name in ("ages", "steps"):
            assert torch.equal(rank["state"][name], single["state"][name])
        assert torch.equal(rank["state"]["means"], ranks[0]["state"]["means"])
        for kind in ("report", "action"):
            mine, its = rank[kind], single[kind]
            assert (mine.matrices, mine.totals, mine.bytes) == (its.matrices, its.totals, its.bytes)


@pytest.mark.two_process
@alike
def test_every_layout_draws_the_same_weights(ranks: Any, single: Any) -> None:
    expected, found = renewed([single]), renewed(ranks)
    assert found.keys() == expected.keys()
    for name, mask in single["masks"].items():
        assert torch.equal(found[name][:, mask], expected[name][:, mask])


@pytest.mark.two_process
@alike
def test_every_layout_goes_on_alike(ranks: Any, single: Any) -> None:
    for rank in ranks:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)


@pytest.mark.two_process
def test_weights_masters_and_moments_change_at_dormant_units_alone(ranks: Any) -> None:
    touched = 0
    for rank in ranks:
        where = written(rank)
        for name, after in rank["after"].items():
            before, weights = rank["before"][name], after["weights"]
            mask = where.get(name, torch.zeros(weights.shape, dtype=torch.bool))
            own, flat = mask.reshape(-1)[after["own"]], weights.view(-1)[after["own"]]
            assert torch.equal(weights[~mask], before["weights"][~mask])
            if mask.any():  # in bf16 a new weight may be the old one
                assert (weights[mask] != before["weights"][mask]).float().mean() > 0.95
            assert torch.equal(after["master"][own].to(flat.dtype), flat[own])
            assert torch.equal(after["master"][~own], before["master"][~own])
            for old, new in zip(before["moments"], after["moments"], strict=True):
                assert not new[own].any()
                assert torch.equal(new[~own], old[~own])
                touched += int(old[own].count_nonzero())
        for share in rank["shares"]:
            out = rank["after"][share["out"]]["weights"]
            assert not out[:, rank["masks"][share["mlp"]][share["units"]]].any()
    assert touched > 0
