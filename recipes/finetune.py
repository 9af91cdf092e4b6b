"""Fine-tuning: a recipe that starts from the weights and the tokenizer of a checkpoint.

A run's checkpoint is a folder `step=N`: `weights/`, and `context/` with the model's
configuration (`model.yaml`) and a copy of its tokenizer (`tokenizer/`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nemo_run as run
import yaml
from nemo.collections import llm

from megacpp_nemo.contract import BlockFamily, HybridRecipe, LayerPattern, RecipeError
from megacpp_nemo.host.checkpoint_folder import is_complete, newest_checkpoint
from megacpp_nemo.host.input_parts import INPUT_SETTINGS, InputPart, compare_inputs
from megacpp_nemo.host.warm_start import WarmStart
from megacpp_nemo.lowering.table import CONFIG, ROWS, Row
from megacpp_nemo.recipes.build import to_nemo

# Fields of the model's configuration that its weights do not depend on: a fine-tuned model may
# have others than its checkpoint.
FREE = (
    "pattern",  # compared as it is laid out to the depth, wherever stages begin
    "depth",
    "model.seq_length",
    "model.rotary_base",
    "model.norm_epsilon",
    "model.init_std",
    "model.experts.topk",
    "model.experts.aux_loss_coeff",
    "model.sparse_attention.indexer_topk",
    "model.sparse_attention.indexer_loss_coeff",
    "model.mamba.chunk_size",
    "model.recurrent.state_gradient_clip",
    "model.mtp.loss_scaling_factor",
    "model.embedding.ngram.placement",
    "precision",
    "features.reset_state",
    "features.reset_attention_mask",
    # Compared by the layers that are sparse.
    "features.sparse_attention",
    "model.sparse_attention.a_ranks",
)
# By their names in the configuration: what only indexers depend on.
INDEXERS = ("dsa_indexer_n_heads", "dsa_indexer_head_dim")


def to_finetune(
    recipe: HybridRecipe,
    *,
    checkpoint: str | Path | None,
    tokenizer_dir: str | Path | None = None,
    log_dir: str | Path | None = None,
    fresh_indexers: bool = False,
    drop_inputs: bool = False,
) -> run.Partial:
    """Return a `run.Partial` of `llm.finetune` that starts from a checkpoint.

    The n-gram memory and the structure channels may be new: they change nothing at first. What
    is drawn anew, and what is left out, is named in the log.

    The optimizer and the schedule start anew; a fine-tuning run that is stopped resumes from
    its own checkpoints. The checkpoint is read here, before anything is built, so this is
    called where it can be seen.

    Args:
        recipe: What to train; its model must be the checkpoint's.
        checkpoint: Folder `step=N` of a run.
        tokenizer_dir: Folder of the tokenizer; the copy in the checkpoint if not given.
        log_dir: Folder of this run; `runs/NAME_finetune` if not given.
        fresh_indexers: Let sparse attention (DSA) start from dense: indexers that the checkpoint
            does not have are drawn anew.
        drop_inputs: Leave out the checkpoint's n-gram memory and structure channels if the
            recipe has none.

    Raises:
        RecipeError: If there is no complete checkpoint, it is of another model, or it has no
            tokenizer and none is given.
    """
    folder = _complete(checkpoint)
    _check_same_model(recipe, folder, fresh_indexers, drop_inputs)
    base = to_nemo(recipe, log_dir=str(log_dir or f"runs/{recipe.name}_finetune"))
    base.data.tokenizer_dir = str(tokenizer_dir or _own_tokenizer(folder))
    parts = {part: getattr(base, part) for part in ("model", "trainer", "data", "optim", "log")}
    # The data encodes with the tokenizer; the model takes it from there.
    base.resume.restore_config = run.Config(
        WarmStart,
        path=str(folder),
        load_artifacts=False,
        fresh_indexers=fresh_indexers,
        drop_inputs=drop_inputs,
    )
    return run.Partial(llm.finetune, **parts, resume=base.resume, tokenizer="data")


def _complete(checkpoint: str | Path | None) -> Path:
    """Return the folder of a checkpoint that was written to its end."""
    path = Path(checkpoint).expanduser() if checkpoint else None
    if path is not None and path.name == "weights":
        path = path.parent
    if path is not None and is_complete(path) and (path / "context" / "model.yaml").is_file():
        return path
    newest = path and (newest_checkpoint(path) or newest_checkpoint(path / "checkpoints"))
    raise RecipeError(
        "Fine-tuning starts from a complete checkpoint",
        given="no checkpoint" if path is None else f"checkpoint={str(path)!r}",
        allowed="a folder 'step=N' written by a run, with 'weights' and 'context' in it",
        hint=f"checkpoint={str(newest or 'runs/nam56r_tiny/checkpoints/step=240')!r}",
    )


def _own_tokenizer(checkpoint: Path) -> Path:
    folder = checkpoint / "context" / "tokenizer"
    if not folder.is_dir():
        raise RecipeError(
            "The checkpoint has no copy of its tokenizer",
            given=f"no folder {str(folder)!r}",
            allowed="tokenizer_dir, the folder of the tokenizer that the model was trained with",
            hint="tokenizer_dir='/data/tokenizer'",
        )
    return folder


def _check_same_model(
    recipe: HybridRecipe, checkpoint: Path, fresh_indexers: bool, drop_inputs: bool
) -> None:
    """Refuse a checkpoint whose weights do not fit the recipe's model."""
    text = (checkpoint / "context" / "model.yaml").read_text(encoding="utf-8")
    saved = yaml.safe_load(text)["config"]
    pattern = LayerPattern.parse(saved["hybrid_override_pattern"]).tile(saved["num_layers"])
    ranks = recipe.model.sparse_attention.a_ranks if recipe.features.sparse_attention else ()
    mine, theirs = _sparse(recipe.layers, ranks), _sparse(pattern, saved.get("dsa_a_ranks") or ())
    settings = _model_settings(recipe)
    free = {*INPUT_SETTINGS, *(() if theirs else INDEXERS)}
    other = [
        (row.field, value, saved[name])
        for row, name, value in settings
        if name in saved and name not in free and _plain(value) != _plain(saved[name])
    ]
    inputs = compare_inputs({name: value for _, name, value in settings}, saved)
    field_of = {name: row.field for row, name, _ in settings}
    other += [(field_of[name], *values) for name, *values in inputs.other]
    if _dense(pattern) != _dense(recipe.layers):
        other.append(("layers", str(recipe.layers), str(pattern)))
    elif theirs - mine:
        other.append(("sparse layers", sorted(mine), sorted(theirs)))
    if other:
        raise RecipeError(
            "The checkpoint is of another model",
            given=", ".join(f"{field}={mine!r}" for field, mine, _ in other),
            allowed=", ".join(f"{field}={theirs!r}" for field, _, theirs in other),
            hint="the recipe and the changes that the checkpoint was trained with",
        )
    if mine - theirs and not fresh_indexers:
        raise _lacking_indexers(mine, theirs)
    if inputs.lost and not drop_inputs:
        raise _losing(recipe, inputs.lost, saved)


def _lacking_indexers(mine: set[int], theirs: set[int]) -> RecipeError:
    return RecipeError(
        "The checkpoint has no indexers for some layers of sparse attention",
        given=f"sparse layers {sorted(mine)}, of which it has {sorted(theirs)}",
        allowed="the sparse layers of the checkpoint, or indexers that are drawn anew",
        hint="fresh_indexers=True",
    )


def _losing(
    recipe: HybridRecipe, parts: tuple[InputPart, ...], saved: dict[str, Any]
) -> RecipeError:
    names = [part.name for part in parts]
    return RecipeError(
        f"The recipe has no {' and no '.join(part.what for part in parts)}, and the checkpoint "
        "has: what it learned would be lost",
        given=", ".join(f"features.{name}={getattr(recipe.features, name)!r}" for name in names),
        allowed=", ".join(f"features.{name}={saved[name]!r}" for name in names),
        hint="the input side that the checkpoint was trained with, or drop_inputs=True",
    )


def _sparse(layers: LayerPattern, ranks: Iterable[int]) -> set[int]:
    """Return the 1-based numbers of the sparse layers: those written D, and A of these ranks."""
    by_rank = layers.a_ranks()
    return {*layers.layer_numbers(BlockFamily.SPARSE_ATTENTION), *(by_rank[r] for r in ranks)}


def _dense(layers: LayerPattern) -> tuple[BlockFamily, ...]:
    """Return the families with sparse attention as what it has its weights' names from."""
    sparse, dense = BlockFamily.SPARSE_ATTENTION, BlockFamily.ATTENTION
    return tuple(dense if family is sparse else family for family in layers.layers)


def _model_settings(recipe: HybridRecipe) -> list[tuple[Row, str, Any]]:
    """Return row, Megatron's name and value of the settings that the weights depend on."""
    return [
        (row, path.removeprefix(f"{CONFIG}."), row.spell(row.value(recipe), recipe))
        for row in ROWS
        if row.field not in FREE and not row.field.startswith("parallelism.") and row.when(recipe)
        for path in row.nemo
        if path.startswith(f"{CONFIG}.")
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
