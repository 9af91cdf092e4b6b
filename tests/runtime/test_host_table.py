"""N-gram tables in host memory, trained by NeMo: as those on the device, and across a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import RankError, in_process
from tests.support.training import configure, small_recipe, train

SMALL = {
    "pattern": "MM",
    "depth": 2,
    "ngram_hash": True,
    "model.embedding.ngram.table_size": 200,
    # Of NeMo's and Megatron's ways to end a schedule, one whose rate moves at every step.
    "warmup_steps": 4,
}


def run(sources: Path, folder: Path, placement: str, steps: int) -> dict[str, list[float]]:
    partial = configure(small_recipe(**SMALL), sources, folder, steps=steps, save_interval=4)
    partial.model.config.ngram_placement = placement
    partial.optim.config.clip_grad = 0.5
    return train(partial)


def test_the_host_table_trains_as_the_devices_and_resumes_bit_for_bit(
    sources: Path, tmp_path: Path
) -> None:
    device = in_process(run, sources, tmp_path / "device", "device", 8)
    host = in_process(run, sources, tmp_path / "host", "host", 8)
    for name, values in device.items():
        assert host[name] == pytest.approx(values, rel=1e-4)
    first = in_process(run, sources, tmp_path / "stopped", "host", 4)
    second = in_process(run, sources, tmp_path / "stopped", "host", 8)
    assert {name: first[name] + second[name] for name in host} == host
    # The state of the optimizers is another; the refusal names what differs.
    with pytest.raises(RankError, match=r"(?s)RuntimeRefusal.*another place.*ngram_placement"):
        in_process(run, sources, tmp_path / "stopped", "device", 12)
