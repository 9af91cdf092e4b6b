"""Megatron-LM's own entry scripts, training on a spec of this package."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

from megacpp_nemo.contract.families import recipe
from megacpp_nemo.lowering.lower import lower
from megacpp_nemo.lowering.releases import load_release

RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.0", "main-2026-08")
ITERATION = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?number of nan iterations: +(\d+)")
# Small enough for two steps on a CPU; what Megatron's command line cannot carry yet is off.
SMALL = {
    "model.mtp.num_layers": 0,
    "features.reset_state": False,
    "model.hidden_size": 64,
    "model.seq_length": 32,
    "model.mamba.chunk_size": 16,
    "batch.micro_batch_size": 2,
    "batch.global_batch_size": 2,
    "schedule.train_steps": 2,
    "schedule.decay_steps": 2,
    "schedule.warmup_steps": 0,
    "cadence.log_interval": 1,
    "cadence.eval_interval": 100,
    "cadence.eval_batches": 1,
    "cadence.save_interval": 100,
}
# What a launch decides, and what a machine without CUDA lacks.
LAUNCH = [
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "255",
    "--split",
    "100,0,0",
    "--distributed-backend",
    "gloo",
    "--transformer-impl",
    "local",
    "--num-workers",
    "0",
    "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-swiglu-fusion",
    "--no-persist-layer-norm",
    "--no-create-attention-mask-in-dataloader",
]


def argv(release: str, tmp_path: Any, **changes: Any) -> list[str]:
    """Return the lowered command line of a small recipe, with mock data and no checkpoint.

    Some releases write checkpoints from another process, which has CUDA's own calls again.
    """
    subject = recipe("nam56r_tiny", changes={**SMALL, "files.run_dir": str(tmp_path), **changes})
    lowered = list(lower(subject, release=release).argv)
    for flag in ("--split", "--save", "--load"):
        if flag in lowered:
            at = lowered.index(flag)
            del lowered[at : at + 2]
    return lowered


def losses(output: str) -> list[float]:
    """Return the loss of every iteration; none may be without a number."""
    found = ITERATION.findall(output)
    assert [int(number) for number, _, _ in found] == [1, 2], output[-3000:]
    assert all(bad == "0" for _, _, bad in found)
    return [float(loss) for _, loss, _ in found]


@pytest.fixture
def trained(on_release, tree, tmp_path, monkeypatch):
    """Return a function that runs a release's entry script and returns its losses."""

    def run(release: str, **changes: Any) -> list[float]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        for name, value in settings.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        script = str(tree(release) / load_release(release).entry_script)
        words = [script, *argv(release, tmp_path, **changes), *LAUNCH]
        return losses(on_release(release, "tests.spec.entry_script", *words))

    return run


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", RELEASES)
def test_a_lowered_recipe_trains_under_the_releases_own_script(trained, release):
    first, second = trained(release)
    # Untrained, a model is near the uniform guess over 256 tokens.
    assert first == pytest.approx(5.55, abs=0.2)
    assert second < first


@pytest.mark.megatron_source
@pytest.mark.parametrize("release", RELEASES[1:])
def test_a_recipe_with_predictions_trains_where_the_release_has_them(trained, release):
    # The newest release counts a depth's expert layer by its place in the depth, and has room in
    # its table of losses for as many places as there are depths.
    pattern = "EA" if release == "main-2026-08" else "AE"
    first, second = trained(release, **{"model.mtp.num_layers": 1, "model.mtp.pattern": pattern})
    assert first == pytest.approx(5.55, abs=0.2)
    assert second < first
