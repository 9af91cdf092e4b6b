"""FP8 in expert layers only, in Megatron's own stack."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from megatron.core.ssm import mamba_block
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from megacpp_nemo.model import experts
from megacpp_nemo.spec import slots
from tests.spec import release_model
from tests.spec.release_model import RECURRENT
from tests.support.processes import in_process


def entered_contexts(recipe: str) -> dict[str, Any]:
    """Return the FP8 contexts entered in construction and in a forward pass, and by whom."""
    entered: list[tuple[int, bool]] = []

    def enter(config: Any, layer_no: int = -1, is_init: bool = False) -> Any:
        # Upstream asks for every layer, and gets a null context where FP8 is off.
        if config.fp8:
            entered.append((layer_no, is_init))
        return nullcontext()

    for module in (mamba_block, experts, slots):
        module.get_fp8_context = enter
    # An expert's padding for FP8 is Transformer Engine's.
    MoETransformerLayer.forward = lambda self, hidden_states, **kwargs: (hidden_states, None)
    plain = release_model.small_config

    def in_fp8(num_layers: int, **changes: Any) -> Any:
        config = plain(num_layers, **changes)
        # Megatron's own check asks for Transformer Engine's version.
        config.fp8, config.fp8_recipe = "hybrid", recipe
        return config

    release_model.small_config = in_fp8
    release_model.start()
    model = release_model.build(
        "*EMME*",
        f"layers=LemReL,{RECURRENT},precision=fp8_experts",
        moe_shared_expert_intermediate_size=None,
    )
    built, layers = list(entered), list(model.decoder.layers)
    entered.clear()
    release_model.run(model)
    return {
        "built": built,
        "run": list(entered),
        "fp8": [layer.config.fp8 for layer in layers],
        "classes": [type(layer).__name__ for layer in layers],
    }


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_only_expert_layers_enter_fp8(recipe):
    found = in_process(entered_contexts, recipe)
    assert found["built"] == [(1, True), (4, True)]
    assert found["run"] == [(1, False), (4, False)]
    assert found["fp8"] == [None, "hybrid", None, None, "hybrid", None]
    assert found["classes"].count("ExpertsLayer") == 2
