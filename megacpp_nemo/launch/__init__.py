"""Lowered recipes in NeMo-Run: as files beside an experiment, and as a script of its own.

- `LoweringPlugin`: what each task of an experiment would be on Megatron-LM's command line
- `to_script`: the `run.Script` that runs it, under any executor
"""

from megacpp_nemo.launch.plugin import LoweringPlugin
from megacpp_nemo.launch.script import to_script

__all__ = ["LoweringPlugin", "to_script"]
