"""The card of a run: what its folder says of it from the first step on."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from nemo.utils.app_state import AppState

from megacpp_nemo.contract.run_card import RunCard

logger = logging.getLogger(__name__)


def write_card(trainer: Any, config: Any) -> None:
    """Write `run.json` into the folder of a run that begins or goes on.

    A folder that cannot be written costs the run nothing but the card.
    """
    data = trainer.datamodule
    folder = AppState().log_dir
    if folder is None or not hasattr(data, "seq_length"):
        return
    card = RunCard(
        pattern=config.hybrid_override_pattern,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        seq_length=data.seq_length,
        global_batch_size=data.global_batch_size,
        max_steps=trainer.max_steps,
        processes=trainer.world_size,
        start_step=trainer.global_step,
        started=time.time(),
    )
    try:
        card.write(Path(folder))
    except OSError as error:
        logger.warning("%s cannot be written: %s", Path(folder), error)
