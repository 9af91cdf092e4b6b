"""A program: Megatron-LM's own parser, validator and configuration, on argument vectors.

Runs with a Megatron-LM tree first on its path. Reads a JSON list of `{"argv": [...],
"world_size": N}` and prints, for each, `{"config": {field: repr}}` or `{"error": text}`. The
machine is described as eight Hopper GPUs with a current Transformer Engine, so that only the
arguments are judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import types
import typing
from typing import Any


def describe_machine() -> None:
    """Make this process look like a GPU machine to whoever only asks."""
    if not hasattr(typing, "override"):  # newer trees import it; Python 3.11 has none
        typing.override = lambda function: function  # type: ignore[attr-defined]
    import torch

    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.device_count = lambda: 8
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.get_device_properties = lambda *device: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )


def pretend_transformer_engine() -> None:
    """Make this process believe in a current Transformer Engine."""
    import megatron.core.transformer.transformer_config as transformer_config
    import megatron.core.utils as utils
    from packaging.version import Version

    transformer_config.is_te_min_version = utils.is_te_min_version = lambda *version, **more: True
    utils.get_te_version = lambda: Version("2.10.0")


def configured(argv: list[str], world_size: int) -> dict[str, Any]:
    """Return what Megatron makes of one argument vector."""
    from megatron.training import arguments

    sys.argv = ["pretrain", *argv]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = arguments.parse_args()
            arguments.validate_args(args)
            config = arguments.core_transformer_config_from_args(args)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}\n{said.getvalue()[-500:]}"}
    fields = dataclasses.fields(config)
    return {"config": {field.name: repr(getattr(config, field.name)) for field in fields}}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # trees print as they are imported
    describe_machine()
    pretend_transformer_engine()
    json.dump([configured(**job) for job in json.load(sys.stdin)], answers)
