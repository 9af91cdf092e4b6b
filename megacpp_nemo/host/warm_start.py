"""Starting from a checkpoint of a model that is not quite the same.

- The input side may be new: the n-gram memory and the structure channels add nothing at first.
- Sparse attention (DSA) may start from dense, as it is trained (DeepSeek-V3.2): its layers have
  every weight of a dense one under the same names, and an indexer besides. If asked for.
- The checkpoint's input side may be left out. If asked for.

What the checkpoint does not have stays as it is drawn. A run that goes on from its own
checkpoint has to have what that has.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from megatron.core import dist_checkpointing
from nemo import lightning as nl
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import Tensor

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.host.input_parts import INPUT_SETTINGS, InputPart, compare_inputs

logger = logging.getLogger(__name__)

INDEXER = ".core_attention.indexer."


@dataclass(kw_only=True)
class WarmStart(nl.RestoreConfig):
    """NeMo's choice of what to restore, of a checkpoint of not quite the same model.

    Args:
        fresh_indexers: Indexers that the checkpoint does not have are drawn anew.
        drop_inputs: Parts of the checkpoint's input side that the model does not have are left
            out.
    """

    fresh_indexers: bool = False
    drop_inputs: bool = False


@contextlib.contextmanager
def warm_start(
    model: Any, config: Any, checkpoint: Any, asked_for: nl.RestoreConfig | None
) -> Iterator[dict[str, Tensor | None]]:
    """Keep `model` from asking a checkpoint for what it does not have and need not have.

    Anything else that is missing is still asked for, and refused by who loads.

    Args:
        model: NeMo's `MegatronParallel`.
        config: Hybrid model configuration.
        checkpoint: Folder of the checkpoint.
        asked_for: What to start from it; None if a run goes on from its own checkpoint.

    Yields:
        The weights that were not asked for, by their names in the model's state; filled as the
        model is asked for its sharded state. They are named in the log, and so are those of the
        checkpoint that are left out.

    Raises:
        RuntimeRefusal: If the input side is not the checkpoint's, and is not to start anew or be
            left out.
    """
    folder = Path(ckpt_to_weights_subdir(checkpoint, is_saving=False))
    saved, ask = dist_checkpointing.load_tensors_metadata(str(folder)), model.sharded_state_dict
    new, lost = _changed_inputs(config, folder.parent, asked_for)
    indexers = isinstance(asked_for, WarmStart) and asked_for.fresh_indexers
    # None is the extra state of a layer that has none.
    fresh: dict[str, Tensor | None] = {}

    def may_lack(name: str) -> bool:
        return (indexers and INDEXER in name) or any(part.owns(name) for part in new)

    def asked(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = ask(*args, **kwargs)
        lacking = [name for name, part in state.items() if may_lack(name) and _lacks(saved, part)]
        fresh.update((name, state.pop(name).data) for name in lacking)
        return state

    model.sharded_state_dict = asked
    try:
        yield fresh
    finally:
        del model.sharded_state_dict
    if indexers or new:
        drawn = sorted(name for name, weight in fresh.items() if weight is not None)
        logger.info("drawn anew, not in the checkpoint: %s", ", ".join(drawn) or "nothing")
    if lost:
        left = [name for name in sorted(saved) if _is_weight(name, lost)]
        logger.info("left out, in the checkpoint: %s", ", ".join(left))


def _lacks(saved: dict[str, Any], part: Any) -> bool:
    return getattr(part, "key", None) not in saved


def _is_weight(name: str, parts: tuple[InputPart, ...]) -> bool:
    return not name.startswith("optimizer.") and any(part.owns(name) for part in parts)


def _changed_inputs(
    config: Any, checkpoint: Path, asked_for: nl.RestoreConfig | None
) -> tuple[tuple[InputPart, ...], tuple[InputPart, ...]]:
    """Return the parts of the input side that are new, and those that are left out."""
    context = checkpoint / "context" / "model.yaml"
    if not context.is_file():
        # What it says could not be compared; loading tells by the weights.
        return (), ()
    saved = yaml.safe_load(context.read_text(encoding="utf-8"))["config"]
    mine = {name: getattr(config, name, None) for name in INPUT_SETTINGS}
    change = compare_inputs(mine, saved)
    if change.other:
        raise RuntimeRefusal(
            "The checkpoint has another input side than the model",
            given=", ".join(f"{name}={mine!r}" for name, mine, _ in change.other),
            allowed=", ".join(f"{name}={saved!r}" for name, _, saved in change.other),
            hint="the settings that the checkpoint was trained with",
        )
    drop = isinstance(asked_for, WarmStart) and asked_for.drop_inputs
    with_state = asked_for is None or asked_for.load_optim_state
    if change.new and with_state:
        raise _lacking(checkpoint, change.new)
    if change.lost and (with_state or not drop):
        raise _losing(checkpoint, change.lost)
    return change.new, change.lost


def _lacking(checkpoint: Path, parts: tuple[InputPart, ...]) -> RuntimeRefusal:
    names = _listed(parts)
    return RuntimeRefusal(
        f"The checkpoint to go on from has no {names}, nor its optimizer a state of it",
        given=f"{', '.join(part.name for part in parts)} on, {checkpoint}",
        allowed="the input side that the run was begun with",
        hint=f"a new run that starts from its weights, where the {names} may be new: "
        f"checkpoint={str(checkpoint)!r} of a fine-tuning recipe",
    )


def _losing(checkpoint: Path, parts: tuple[InputPart, ...]) -> RuntimeRefusal:
    names = _listed(parts)
    return RuntimeRefusal(
        f"The model has no {names}, and the checkpoint has: what it learned would be lost",
        given=f"{', '.join(part.name for part in parts)} off, {checkpoint}",
        allowed=f"a model with the {names}, or a new run that leaves them out if asked to",
        hint=f"{', '.join(part.name for part in parts)} as trained; or drop_inputs=True of a "
        "fine-tuning recipe",
    )


def _listed(parts: tuple[InputPart, ...]) -> str:
    return " and ".join(part.what for part in parts)
