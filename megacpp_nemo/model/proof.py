"""Proof of ownership: what a lowered command line really builds, layer by layer.

    print(prove(recipe("nam56r")))

An accepted argument proves nothing. The model that the command line describes is built by the
installed Megatron-Core, as its entry script would build it, and the class that stands at every
depth is held against the lowering's claim.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.model.blocks import MAMBA_MIXERS
from megacpp_nemo.model.experts import ExpertsLayer
from megacpp_nemo.spec.local import STAND_INS
from megacpp_nemo.spec.upstream import SLOT_OF_ROLE, stock_stack_spec

NATIVE = "native"
# Class here -> class of the release whose place it may take without changing who owns a layer.
FORMS: dict[type, type] = {**STAND_INS, ExpertsLayer: ExpertsLayer.__mro__[1]}
_ATTENTION = (
    Role.ATTENTION,
    Role.LATENT_ATTENTION,
    Role.SPARSE_ATTENTION,
    Role.GATED_DELTA_NET,
)
_OWN_MAMBA = tuple(MAMBA_MIXERS.values())


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a lowering says of one layer.

    Args:
        number: 1-based number.
        role: What it is.
        custom: Whether this package builds it.
        owner: `native`, or the module or class of this package that builds it.
        sizes: Attributes of the layer's inner module, by name.
    """

    number: int
    role: Role
    custom: bool
    owner: str = NATIVE
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ProvenLayer:
    """One layer whose claim holds.

    Args:
        number: 1-based number.
        role: What it is.
        owner: Who builds it.
        built: Classes of the layer and its inner module.
        slot: Symbol of the slot it was built in.
    """

    number: int
    role: Role
    owner: str
    built: tuple[str, str]
    slot: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A model whose every layer is what the lowering says.

    Args:
        layers: The main pattern.
        prediction: Every prediction depth.
        parameters: Shape by name of every parameter, on the release's own layout.
    """

    layers: tuple[ProvenLayer, ...]
    prediction: tuple[tuple[ProvenLayer, ...], ...] = ()
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.layers, *self.prediction]
        return "\n".join(
            f"{layer.number:4} {layer.slot} {layer.role.words:24} "
            f"{'.'.join(layer.built):44} {layer.owner}"
            for part in parts
            for layer in part
        )


def compare(claims: Sequence[Claim], stack: Any) -> Proof:
    """Return the proof that a stack's layers are what is claimed of them.

    Args:
        claims: One claim for every layer, in order.
        stack: The stack as Megatron built it.

    Raises:
        LoweringError: Naming the layers, the claims and what was built instead.
    """
    layers, symbols = list(stack.layers), list(stack.layer_type_list)
    wrong = []
    if len(layers) != len(claims):
        wrong.append(f"{len(claims)} layers are claimed and {len(layers)} were built")
    pairs = list(zip(claims, layers, strict=False))
    for claim, layer in pairs:
        if difference := _difference(claim, layer):
            wrong.append(f"layer {claim.number} ({_claimed(claim)}): {difference}")
    if wrong:
        raise LoweringError(
            "What Megatron builds is not what the lowering claims:\n    " + "\n    ".join(wrong),
            given="the model of this command line, built by the installed Megatron-Core",
            allowed="for a native layer the release's own class, for a seam its owner's",
            hint="the command and the spec of one lowering, for the installed release",
        )
    return Proof(
        layers=tuple(
            ProvenLayer(
                number=claim.number,
                role=claim.role,
                owner=claim.owner,
                built=(type(layer).__name__, type(_inner(claim.role, layer)).__name__),
                slot=symbol,
            )
            for (claim, layer), symbol in zip(pairs, symbols, strict=True)
        )
    )


def _claimed(claim: Claim) -> str:
    return f"{claim.role.words}, {claim.owner}"


def _difference(claim: Claim, layer: Any) -> str | None:
    """Return in words what was built instead, or None if the claim holds."""
    if layer.layer_number != claim.number:
        return f"has the number {layer.layer_number}"
    inner = _inner(claim.role, layer)
    if inner is None:
        return f"{type(layer).__name__} was built, which is no layer of {claim.role.words}"
    if not (_is_owned(claim, inner) if claim.custom else _is_native(claim.role, layer, inner)):
        return f"{_path(layer)} with {_path(inner)} was built"
    for name, value in claim.sizes.items():
        if getattr(inner, name, None) != value:
            return f"{name} is {getattr(inner, name, None)}, not {value}"
    return None


def _inner(role: Role, layer: Any) -> Any:
    """Return the module that makes a layer what it is."""
    if role in _ATTENTION:
        return getattr(layer, "self_attention", None)
    return getattr(layer, "mlp" if role in (Role.EXPERTS, Role.MLP) else "mixer", None)


def _is_owned(claim: Claim, inner: Any) -> bool:
    if claim.role is Role.MAMBA:
        return type(inner) in _OWN_MAMBA
    return _path(inner) == claim.owner


def _is_native(role: Role, layer: Any, inner: Any) -> bool:
    """Whether a layer is of the classes that the release's stock spec has in the role's slot."""
    slot = getattr(stock_stack_spec().submodules, SLOT_OF_ROLE.get(role, ""), None)
    if slot is None:
        return False
    wanted = _inner(role, slot.submodules)
    if not (_has_form(layer, slot.module) and _has_form(inner, _class_of(wanted))):
        return False
    core = getattr(getattr(wanted, "submodules", None), "core_attention", None)
    # A core with parts of its own, as DSA's, is what the layer is; plain ones differ by machine.
    return not hasattr(core, "submodules") or _has_form(inner.core_attention, _class_of(core))


def _class_of(builder: Any) -> Any:
    """Return the class that a spec, a partial or a class builds."""
    if hasattr(builder, "module"):
        return builder.module
    function = getattr(builder, "func", builder)
    return function if inspect.isclass(function) else getattr(function, "__self__", function)


def _has_form(module: Any, wanted: Any) -> bool:
    return type(module) is wanted or FORMS.get(type(module)) is wanted


def _path(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def prove(recipe: Any, *, release: str = "0.16.1", meta: bool | None = None) -> Proof:
    """Prove a lowering by building its model on the installed Megatron-Core.

    The model is built whole, on one process: pipeline stages and tensor ranks are left out.

    Args:
        recipe: A `HybridRecipe`, or a NeMo recipe of this package.
        release: The release lowered to, which must be the installed one.
        meta: Build without memory for the weights; by default, if the model is not small.

    Raises:
        LoweringError: If a layer is not what the lowering says, a flag that says what the model
            is has no place in its configuration, or another release is installed.
        RuntimeRefusal: If the spec asks for what is not built.
    """
    from megacpp_nemo.lowering.lower import lower
    from megacpp_nemo.model.lowered import LoweredModel

    described = LoweredModel.of(lower(recipe, release=release), release)
    with described.built(meta=meta) as model:
        proof = compare(described.claims, model.decoder)
        depths: Any = getattr(getattr(model, "mtp", None), "layers", ())
        return replace(
            proof,
            prediction=tuple(
                compare(described.prediction_claims, depth.mtp_model_layer).layers
                for depth in depths
            ),
            parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        )
