"""From a recipe to running processes, by NeMo-Run.

- `LoweringPlugin`: what each task of an experiment would be on Megatron-LM's command line
- `to_script`: the `run.Script` that runs it, under any executor
- `document`, `places`: YAML files with a schema, and where they are found
- `profiles`, `executors`: what the files of `configs/` say
- `plan`: hardware, layout, executor and environment, decided and checked before anything starts
- `nemo_run_executors`, `factories`: NeMo-Run's own executors from them, for its command line too
- `experiment`, `shown`, `failures`: a run, what it would be, and why it failed
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacpp_nemo.launch.plugin import LoweringPlugin
    from megacpp_nemo.launch.script import to_script

__all__ = ["LoweringPlugin", "to_script"]
_PLACES = {"LoweringPlugin": "plugin", "to_script": "script"}


def __getattr__(name: str) -> Any:
    """Import what needs NeMo-Run when it is asked for: files are read without it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
