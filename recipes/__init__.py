"""Recipes for `nemo llm pretrain` and `nemo llm finetune`, and for Python.

    from megacpp_nemo.recipes import nam56r_tiny

    recipe = nam56r_tiny(depth=24)      # a nemo_run.Partial of llm.pretrain
    recipe.trainer.max_steps = 100      # change any part of it

The story, one file a chapter:

- `build`: a structured recipe as NeMo's configuration
- `finetune`: the same, starting from a checkpoint's weights and tokenizer
- `corpora`: data parts for any recipe
- `levers`: FIRE, DASH, periodic shrink, ReDo and STP, callbacks for any recipe
- `factories`: all of it by name, for the command line
- `command_line`, `explain`: what NeMo-Run says of a wrong argument
- `reading`: how it reads a right one
"""

from megacpp_nemo.host import compat

compat.install()  # before NeMo, whose checkpoint module needs one of the adapters

from megacpp_nemo.recipes import command_line  # noqa: E402
from megacpp_nemo.recipes.build import model_config, to_nemo  # noqa: E402
from megacpp_nemo.recipes.corpora import (  # noqa: E402
    corpus_folders,
    cpp_folder,
    cpp_headers,
    indexed_files,
)
from megacpp_nemo.recipes.corpora import use_data as use_data  # noqa: E402
from megacpp_nemo.recipes.factories import FACTORIES  # noqa: E402
from megacpp_nemo.recipes.finetune import to_finetune  # noqa: E402
from megacpp_nemo.recipes.levers import LEVER_FACTORIES, dash, fire, redo, shrink, stp  # noqa: E402

globals().update(FACTORIES)
command_line.install()

__all__ = [
    "FACTORIES",
    "LEVER_FACTORIES",
    "corpus_folders",
    "cpp_folder",
    "cpp_headers",
    "dash",
    "fire",
    "indexed_files",
    "model_config",
    "redo",
    "shrink",
    "stp",
    "to_finetune",
    "to_nemo",
    "use_data",
    *FACTORIES,
]
