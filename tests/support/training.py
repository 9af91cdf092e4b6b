"""Runs of small recipes, and what they gave. Run them with `support.processes`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from megacpp_nemo.contract import HybridRecipe, recipe

WORDS = ("int", "float", "return", "struct", "const", "auto", "template", "void", "size", "index")


def small_recipe(name: str = "nam56r_tiny", **changes: Any) -> HybridRecipe:
    """Return a recipe that takes a fraction of a second per step."""
    small = {
        "hidden_size": 32,
        "model.ffn_hidden_size": 64,
        "seq_length": 32,
        "model.attention.head_dim": 16,
        "model.latent.q_lora_rank": 16,
        "model.latent.kv_lora_rank": 16,
        "model.latent.qk_head_dim": 16,
        "model.latent.qk_pos_emb_head_dim": 8,
        "model.latent.v_head_dim": 16,
        "model.experts.ffn_hidden_size": 32,
        "model.experts.shared_expert_size": 32,
        "model.mamba.head_dim": 16,
        "model.mamba.chunk_size": 16,
        "model.embedding.vocab_size": 512,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "warmup_steps": 2,
        "decay_steps": 40,
        "train_steps": 3,
    }
    return recipe(name, changes={**small, **changes})


def write_sources(folder: Path, files: int = 40, seed: int = 0) -> Path:
    """Write C++ headers of random statements, enough for every small run."""
    chosen = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [
            f"{chosen.choice(WORDS)} {chosen.choice(WORDS)}_{chosen.randrange(50)}"
            f"({chosen.choice(WORDS)} a{chosen.randrange(9)}) {{ return {chosen.randrange(999)}; }}"
            for _ in range(60)
        ]
        (folder / f"file_{number}.h").write_text("\n".join(lines))
    return folder


def configure(
    intent: HybridRecipe,
    sources: Path,
    log_dir: Path,
    *,
    steps: int,
    callbacks: Any = (),
    save_interval: int | None = 10_000,
) -> Any:
    """Return the NeMo recipe of a small run, reading `sources` and writing to `log_dir`.

    A checkpoint is written every `save_interval` steps and at the end. None writes none, which
    spares the time of two steps; such a run cannot resume either.
    """
    from megacpp_nemo.recipes import to_nemo

    partial = to_nemo(intent, log_dir=str(log_dir))
    partial.data.root = str(sources)
    partial.data.cache_dir = str(sources.parent / "cache")
    partial.trainer.max_steps = steps
    partial.trainer.log_every_n_steps = 1
    partial.trainer.limit_val_batches = partial.trainer.num_sanity_val_steps = 0
    partial.trainer.callbacks = list(callbacks)
    partial.log.tensorboard = None
    if save_interval is None:
        partial.log.ckpt, partial.trainer.enable_checkpointing = None, False
    else:
        partial.log.ckpt.save_interval = save_interval
    return partial


def train(partial: Any) -> dict[str, list[float]]:
    """Run a NeMo recipe and return its losses and gradient norms, a value a step."""
    import fiddle as fdl

    recorder = make_recorder()
    run = fdl.build(partial)
    run.keywords["trainer"].callbacks.append(recorder)
    run()
    return recorder.values


def make_recorder() -> Any:
    """Return a callback that keeps the loss and gradient norm of every step."""
    import lightning.pytorch as pl

    class Recorder(pl.Callback):
        def __init__(self) -> None:
            self.values: dict[str, list[float]] = {"loss": [], "grad_norm": []}

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            metrics = trainer.callback_metrics
            self.values["loss"].append(float(metrics["reduced_train_loss"]))
            self.values["grad_norm"].append(float(metrics["grad_norm"]))

    return Recorder()
