"""A stack spec from its name, on the installed Megatron-Core."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.contract.training import Precision
from megacpp_nemo.lowering.spec_name import NamedLayer, SpecName
from megacpp_nemo.model.backend import Backend
from megacpp_nemo.spec.layers import OwnLayers
from megacpp_nemo.spec.local import localized
from megacpp_nemo.spec.refusals import refuse_unbuilt
from megacpp_nemo.spec.slots import Slot
from megacpp_nemo.spec.stacks import has_prediction, stack_class, with_prediction
from megacpp_nemo.spec.upstream import adapt, slots_of, stock_stack_spec

logger = logging.getLogger(__name__)


def stack_spec(name: SpecName, backend: Backend | None = None) -> ModuleSpec:
    """Return the release's stack spec with this package's layers where the name has them.

    Args:
        name: What the spec is called.
        backend: What to build from; probed if not given.

    Raises:
        RuntimeRefusal: If the name asks for what is not built, or what the release lacks.
    """
    refuse_unbuilt(name)
    adapt()
    stock, backend = stock_stack_spec(), backend or Backend.probe()
    logger.info("Layers of spec %s are built from %s", name, backend)
    if name.mtp and not has_prediction(stock.submodules):
        raise RuntimeRefusal(
            "The installed Megatron-Core builds no multi-token prediction in a hybrid model",
            given=f"mtp={''.join(layer.letter for layer in name.mtp)}",
            allowed="releases whose pattern takes '/': 0.17.1 and later",
            hint="model.mtp.num_layers=0",
        )
    fp8_experts = name.settings.get("precision") is Precision.FP8_EXPERTS
    local = localized(stock.submodules, backend)
    own = OwnLayers(name=name, backend=backend)
    submodules = _slots(local, name.layers, "the main pattern", own)
    if name.mtp:
        depth = _slots(local, name.mtp, "a prediction depth", own)
        block = with_prediction(local.mtp_block_spec, depth, fp8_experts=fp8_experts)
        submodules = replace(submodules, mtp_block_spec=block)
    module = stack_class(
        stock.module, local=not backend.transformer_engine, fp8_experts=fp8_experts
    )
    return replace(stock, module=module, submodules=submodules)


def _slots(native: Any, layers: tuple[NamedLayer, ...], part: str, own: OwnLayers) -> Any:
    """Return a stack's submodules with every slot built by the name."""
    slots = {
        slot: Slot(name=slot, native=getattr(native, slot), layers=layers, part=part, own=own).spec
        for slot in slots_of(native)
    }
    return replace(native, **slots)
