"""Activity measured on several ranks, and by Transformer Engine's grouped experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megacpp_nemo.callbacks.activity import ActivityMeter
from tests.callbacks.experts import LEVER, RECYCLED, batch, expert_model, metered
from tests.callbacks.runs import configured, on_ranks, train_with
from tests.model.building import megatron, run_model


@pytest.mark.two_process
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tokens_that_two_tensor_ranks_see_count_once(sequence_parallel: bool) -> None:
    """Of dense MLPs, which may be split with and without sequence parallelism."""

    def mean() -> tuple[Tensor, Tensor, int]:
        with megatron(tensor_model_parallel_size=2):
            model = expert_model(
                experts=False,
                multi_latent_attention=False,
                tensor_model_parallel_size=2,
                sequence_parallel=sequence_parallel,
            )
            meter, taken = ActivityMeter(model, LEVER), []
            fc2 = model.decoder.layers[1].mlp.linear_fc2
            fc2.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
            run_model(model, batch(1))
            meter.step()
            return meter.means[:64], taken[0].abs().mean((0, 1)), taken[0][..., 0].numel()

    results = on_ranks(mean, ranks=2)
    whole = torch.cat([own for _, own, _ in results]).double()
    for means, _, tokens in results:
        assert tokens == 32
        torch.testing.assert_close(means, whole, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_transformer_engines_grouped_experts_measure_as_its_sequential_ones(
    sources: Path, tmp_path: Path
) -> None:
    """On one device, in bf16, from one checkpoint."""
    pytest.importorskip("transformer_engine")

    def means(folder: Path, start: Path | None, steps: int, grouped: bool) -> Tensor | None:
        import nemo_run
        from nemo.lightning import RestoreConfig

        changes = {"precision": "bf16", "pattern": "AEME"}
        partial = configured(sources, folder, steps=steps, save_interval=steps, **changes)
        partial.model.config.moe_grouped_gemm = grouped
        if start is not None:
            partial.resume.restore_config = nemo_run.Config(RestoreConfig, path=str(start))
        found: list[Tensor] = []
        train_with(partial, *metered(lambda trainer, meter: found.append(meter.means.cpu())))
        return found[0] if found else None

    on_ranks(means, tmp_path / "start", None, 2, False)
    start = tmp_path / "start" / "checkpoints" / "step=2"
    ((one,), (other,)) = (
        on_ranks(means, tmp_path / str(grouped), start, RECYCLED, grouped)
        for grouped in (False, True)
    )
    torch.testing.assert_close(other, one, rtol=5e-2, atol=1e-5)
