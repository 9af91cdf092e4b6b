"""Expert layers that enter FP8 by themselves, in a stack that does not.

Megatron's stack enters FP8 for every layer; Mamba scans and M2RNN must stay out of it.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_layer import MoETransformerLayer


class ExpertsLayer(MoETransformerLayer):
    """Megatron's expert layer, entering FP8 by itself where the configuration asks for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, inside an FP8 context if the configuration has one."""
        fp8 = self.config.fp8
        context = get_fp8_context(self.config, self.layer_number - 1) if fp8 else nullcontext()
        with context:
            return super().forward(*args, **kwargs)


def without_fp8(config: Any) -> Any:
    """Return the configuration with FP8 off; the same object if it is off already."""
    if not config.fp8:
        return config
    plain = copy.copy(config)
    plain.fp8 = None
    return plain
