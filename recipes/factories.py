"""The recipes and their parts as NeMo-Run factories, one per row of the family table.

    nemo llm pretrain --factory nam56r_tiny
    nemo llm pretrain --factory "nam56r(num_nodes=2)" trainer.max_steps=7
    nemo llm finetune --factory "nam56r_tiny(checkpoint='runs/nam56r_tiny/checkpoints/step=240')"
    nemo llm pretrain --factory nam56r_tiny model="nam56r_tiny_model(depth=24)"

The same names are functions here: `nam56r_tiny(depth=24)` returns the `run.Partial`.
"""

# NeMo-Run reads these annotations to parse its command line: it resolves neither annotations
# kept as text nor `X | Y`.
# ruff: noqa: UP045

from collections.abc import Callable
from typing import Any, Optional

import lightning.pytorch as pl
import nemo_run as run
from megacpp_nemo.recipes.build import llm, model_config, nl, to_nemo

from megacpp_nemo.contract import RECIPE_NAMES, HybridRecipe, describe, recipe
from megacpp_nemo.contract.errors import RecipeError


def intent(
    name: str,
    mode: str = "nemo_native",
    num_gpus_per_node: Optional[int] = None,
    **changes: Any,
) -> HybridRecipe:
    """Return a recipe's structured intent with changes; None leaves a field as it is."""
    given = {key: value for key, value in changes.items() if value is not None}
    given = {key.replace("__", "."): value for key, value in given.items()}
    if num_gpus_per_node is not None:
        given["devices_per_node"] = num_gpus_per_node
    return recipe(name, mode=mode, changes=given)


def _pretrain(name: str) -> Callable[..., run.Partial]:
    def factory(
        num_nodes: Optional[int] = None,
        num_gpus_per_node: Optional[int] = None,
        mode: str = "nemo_native",
        precision: Optional[str] = None,
        pattern: Optional[str] = None,
        depth: Optional[int] = None,
        hidden_size: Optional[int] = None,
        seq_length: Optional[int] = None,
        tensor_model_parallel_size: Optional[int] = None,
        pipeline_model_parallel_size: Optional[int] = None,
        expert_model_parallel_size: Optional[int] = None,
        sequence_parallel: Optional[bool] = None,
        micro_batch_size: Optional[int] = None,
        global_batch_size: Optional[int] = None,
        train_steps: Optional[int] = None,
        sparse_attention: Optional[bool] = None,
        ngram_hash: Optional[bool] = None,
        mtp_num_layers: Optional[int] = None,
        log_dir: Optional[str] = None,
    ) -> run.Partial:
        changed = intent(
            name,
            mode,
            num_gpus_per_node,
            num_nodes=num_nodes,
            precision=precision,
            pattern=pattern,
            depth=depth,
            hidden_size=hidden_size,
            seq_length=seq_length,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            sequence_parallel=sequence_parallel,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            train_steps=train_steps,
            sparse_attention=sparse_attention,
            ngram_hash=ngram_hash,
            model__mtp__num_layers=mtp_num_layers,
        )
        return to_nemo(changed, log_dir=log_dir)

    return _named(factory, name, f"{describe(name)}.")


def _finetune(name: str) -> Callable[..., run.Partial]:
    pretrain = _pretrain(name)

    def factory(
        checkpoint: Optional[str] = None,
        mode: str = "nemo_native",
        log_dir: Optional[str] = None,
    ) -> run.Partial:
        if checkpoint is None:
            raise RecipeError(
                "Fine-tuning starts from a checkpoint",
                given="no checkpoint",
                allowed="a checkpoint folder of the same model",
                hint=f"--factory \"{name}(checkpoint='runs/{name}/checkpoints/step=240')\"",
            )
        base = pretrain(mode=mode, log_dir=log_dir or f"runs/{name}_finetune")
        parts = {part: getattr(base, part) for part in ("model", "trainer", "data", "optim", "log")}
        parts["resume"] = base.resume
        parts["resume"].restore_config = run.Config(nl.RestoreConfig, path=checkpoint)
        # The data module trains its tokenizer on its own files; NeMo checks the vocabulary
        # against the restored weights.
        return run.Partial(llm.finetune, **parts, tokenizer="data")

    return _named(factory, name, f"{describe(name)}, fine-tuned from a checkpoint.")


def _component(name: str, part: str, pick: Callable[[run.Partial], Any]) -> Callable[..., Any]:
    pretrain = _pretrain(name)

    def factory(
        mode: str = "nemo_native",
        precision: Optional[str] = None,
        pattern: Optional[str] = None,
        depth: Optional[int] = None,
        hidden_size: Optional[int] = None,
        seq_length: Optional[int] = None,
    ) -> run.Config:
        return pick(
            pretrain(
                mode=mode,
                precision=precision,
                pattern=pattern,
                depth=depth,
                hidden_size=hidden_size,
                seq_length=seq_length,
            )
        )

    return _named(factory, f"{name}_{part}", f"The {part} of {name}.")


def _named(factory: Callable[..., Any], name: str, doc: str) -> Callable[..., Any]:
    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = doc
    return factory


# NeMo's command line looks a part up by the base class that `llm.pretrain` names.
COMPONENTS: dict[str, tuple[type, Callable[[run.Partial], Any]]] = {
    "model": (pl.LightningModule, lambda partial: partial.model),
    "data": (pl.LightningDataModule, lambda partial: partial.data),
    "trainer": (nl.Trainer, lambda partial: partial.trainer),
    "optim": (nl.OptimizerModule, lambda partial: partial.optim),
}


def _register() -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {}
    for name in RECIPE_NAMES:
        functions[name] = run.cli.factory(_pretrain(name), target=llm.pretrain, name=name)
        functions[f"{name}_finetune"] = run.cli.factory(
            _finetune(name), target=llm.finetune, name=name
        )
        for part, (target, pick) in COMPONENTS.items():
            full = f"{name}_{part}"
            functions[full] = run.cli.factory(
                _component(name, part, pick), target=target, name=full
            )
    return functions


FACTORIES = _register()
globals().update(FACTORIES)
__all__ = ["FACTORIES", "intent", "model_config", "to_nemo", *FACTORIES]
