"""Recipes for `nemo llm pretrain` and `nemo llm finetune`, and for Python.

from megacpp_nemo.recipes import nam56r_tiny

recipe = nam56r_tiny(depth=24)      # a nemo_run.Partial of llm.pretrain
recipe.trainer.max_steps = 100      # change any part of it
"""

from megacpp_nemo.recipes.factories import *  # noqa: F403
from megacpp_nemo.recipes.factories import FACTORIES, __all__  # noqa: F401
