"""Generation: what one more token costs behind a prefix, carried and by running it all again.

    python benchmarks/generation.py [--prefixes 64 256 ...] [--steps N]

- `carried`: one token, the state of the prefix being kept
- `again`: the whole row through the model, prefix and token, as in training

Each family stands alone in a model of two of its layers with a dense layer between, at a
quarter of NAM56R's width, one row, one thread. Milliseconds are medians of wall-clock time.
Writes `benchmarks/results/generation.json` and `generation.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from megacpp_nemo import __version__
from megacpp_nemo.host.groups import one_process
from megacpp_nemo.model.config import HybridConfig
from megacpp_nemo.model.generation import forward
from megacpp_nemo.model.generation_state import GenerationState

RESULTS = Path(__file__).parent / "results" / "generation.json"
FAMILIES = {"A": "latent attention", "M": "Mamba-2", "R": "M2RNN"}
PREFIXES = (64, 256, 1024, 4096)
AGAIN = 3
WIDTH, VOCABULARY = 896, 256


def model_of(family: str, longest: int) -> nn.Module:
    """Return a model with two layers of a family, in evaluation mode."""
    config = HybridConfig(
        hybrid_override_pattern=f"{family}E{family}",
        num_layers=3,
        experts=False,
        hidden_size=WIDTH,
        ffn_hidden_size=WIDTH,
        num_attention_heads=14,
        mamba_num_heads=14,
        mamba_num_groups=2,
        m2rnn_num_heads=11,
        seq_length=longest,
        mamba_path="portable",
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        bf16=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    return config.configure_model(SimpleNamespace(vocab_size=VOCABULARY)).eval()


def milliseconds(run: Callable[[], Any], repetitions: int) -> list[float]:
    """Return the wall-clock time of each run."""
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        found.append(1000 * (time.perf_counter() - start))
    return found


def again(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return logits of a row, which goes through the model as a whole."""
    logits: Tensor = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
    return logits


def measured(family: str, prefix: int, steps: int) -> dict[str, Any]:
    """Return figures of one more token behind a prefix."""
    model = model_of(family, prefix + steps)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (1, prefix + steps), generator=draw)
    state = GenerationState(batch_size=1, max_tokens=prefix + steps)
    forward(model, tokens[:, :prefix], state)
    following = iter(tokens[:, prefix:].split(1, dim=1))
    carried = milliseconds(lambda: forward(model, next(following), state), steps)
    row = tokens[:, : prefix + 1]
    again(model, row)
    repeated = milliseconds(lambda: again(model, row), AGAIN)
    return {
        "family": family,
        "prefix": prefix,
        "carried_ms": round(statistics.median(carried), 3),
        "again_ms": round(statistics.median(repeated), 2),
        "times": round(statistics.median(repeated) / statistics.median(carried), 1),
        "carried_values_per_layer": state.carried_elements()[1],
    }


def table(report: dict[str, Any]) -> str:
    """Return the figures as a page."""
    lines = [
        "# Generation: one more token",
        "",
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, fp32; "
        f"two layers of a family, width {WIDTH}, one row; medians of {report['steps']} steps and "
        f"{AGAIN} whole rows. Written by `python benchmarks/generation.py`.",
        "",
        "| family | prefix | carried, ms | whole row again, ms | times | values carried a layer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in report["results"]:
        name = f"{found['family']} ({FAMILIES[found['family']]})"
        figures = [found[key] for key in ("prefix", "carried_ms", "again_ms", "times")]
        carried = f"{found['carried_values_per_layer']:,}"
        lines.append(f"| {' | '.join(map(str, [name, *figures, carried]))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefixes", type=int, nargs="+", default=PREFIXES)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    with one_process(), torch.no_grad():
        results = [
            measured(family, prefix, given.steps)
            for family in FAMILIES
            for prefix in given.prefixes
        ]
    cuda = torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": __version__,
        "steps": given.steps,
        "results": results,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
