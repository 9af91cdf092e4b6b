"""What each parameter of a hybrid model is, by its name in Megatron-Core.

- `classify`: a parameter's kind, layer, family and, for a fused matrix, its logical parts
- `Selection`: which of them a lever acts on, and why it leaves the others alone

A fused matrix is a stack of matrices that happen to be multiplied at once (queries on keys on
values, gate on up); whatever is said of a matrix holds for its parts, never for the stack. A name
that no rule knows is an error: nothing is touched, or spared, by accident.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megacpp_nemo.contract.errors import RecipeError, lookup
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.contract.shapes import ModelShape


class ParameterKind(str, enum.Enum):
    """What a parameter does."""

    PROJECTION = "projection"
    FUSED_PROJECTION = "fused projection"
    EXPERT_BANK = "expert bank"
    EMBEDDING = "embedding"
    HEAD = "output head"
    NORM = "norm"
    BIAS = "bias"
    STATE = "state parameter"
    CONVOLUTION = "convolution"
    ROUTER = "router"
    TRANSITION = "recurrent state matrix"

    @property
    def is_matrix(self) -> bool:
        """Whether parameters of this kind are projections, the matrices that levers act on."""
        return self in (self.PROJECTION, self.FUSED_PROJECTION, self.EXPERT_BANK)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One logical matrix of a parameter.

    Args:
        name: What it is: `q`, `k`, `v`, `gate`, `up`, `dt`; empty for a whole parameter.
        rows: Its rows in the parameter, as half-open ranges in order; empty if they are all on
            other ranks.
        query_key: Whether it makes queries or keys of attention, and nothing else.
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    query_key: bool = False

    @property
    def height(self) -> int:
        """Number of rows."""
        return sum(end - begin for begin, end in self.rows)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What one parameter is.

    Args:
        name: Name in the whole model, `decoder.layers.2.mixer.in_proj.weight`, layers from 0;
            in a multi-token prediction depth `mtp.layers.0.mtp_model_layer.layers.1.` and so on.
        shape: Its shape on the rank that was asked, `[out, in]` for a matrix.
        kind: What it does.
        layer: 1-based layer number; None outside the layers of the main pattern.
        family: Block family of its layer; None outside the layers.
        expert: 0-based expert; None if it belongs to none of the routed ones.
        parts: Logical matrices of a projection, in row order; empty for anything else.
    """

    name: str
    shape: tuple[int, ...]
    kind: ParameterKind
    layer: int | None = None
    family: BlockFamily | None = None
    expert: int | None = None
    parts: tuple[Part, ...] = ()

    def part_name(self, part: Part) -> str:
        """Return the name of one of its parts: `decoder.layers.2.mixer.in_proj.weight[z]`."""
        return f"{self.name}[{part.name}]" if part.name else self.name


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_DEPTH = re.compile(r"mtp\.layers\.(\d+)\.(?:mtp_model_layer\.layers\.(\d+)\.)?(.+)")
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<listed>\d+)\.(?P<module>linear_fc[12])\.weight"
    r"|(?P<bank>linear_fc[12])\.weight(?P<grouped>\d+))"
)
# Names outside the layers, and name endings within them, in order.
_OUTSIDE = {
    "embedding.word_embeddings.weight": ParameterKind.EMBEDDING,
    "embedding.position_embeddings.weight": ParameterKind.EMBEDDING,
    # The input side as a whole, projections included: one of them starts from zero.
    "embedding.ngram_hash.table.weight": ParameterKind.EMBEDDING,
    "embedding.ngram_hash.out_proj.weight": ParameterKind.EMBEDDING,
    "embedding.structure.scale": ParameterKind.EMBEDDING,
    "embedding.structure.table.weight": ParameterKind.EMBEDDING,
    "embedding.structure.up_proj.weight": ParameterKind.EMBEDDING,
    "output_layer.weight": ParameterKind.HEAD,
    "decoder.final_norm.weight": ParameterKind.NORM,
    "decoder.final_norm.bias": ParameterKind.NORM,
}
_ENDINGS = (
    (r"(?:.*\.)?(?:[A-Za-z_]*norm|q_layernorm|kv_layernorm)\.(?:weight|bias)", ParameterKind.NORM),
    (r".*\.layer_norm_(?:weight|bias)", ParameterKind.NORM),
    (r"(?:mixer|self_attention)\.conv1d\.(?:weight|bias)", ParameterKind.CONVOLUTION),
    (r"mixer\.(?:A_log|D|dt_bias|[BC]_bias|mimo_[xzo])", ParameterKind.STATE),
    (r"self_attention\.(?:A_log|dt_bias)", ParameterKind.STATE),
    (r"mixer\.transition", ParameterKind.TRANSITION),
    (r"mlp\.router\.(?:weight|bias|expert_bias)", ParameterKind.ROUTER),
    (r"mlp\.shared_experts\.gate_weight", ParameterKind.ROUTER),
    # The indexer of sparse attention weighs its heads by the token, as a router its experts.
    (
        r"self_attention\.core_attention\.indexer\.linear_weights_proj\.weight",
        ParameterKind.ROUTER,
    ),
    (r".*\.bias", ParameterKind.BIAS),
)
_QUERY_KEY = ("q", "k", "k_rotary")


def classify(
    name: str,
    shape: Sequence[int],
    *,
    layers: LayerPattern,
    model: ModelShape,
    mamba: str = "native",
    tensor_ranks: int = 1,
    tensor_rank: int = 0,
    first_layer: int = 0,
    first_expert: int = 0,
) -> Parameter:
    """Return what a parameter is.

    Args:
        name: Name in Megatron-Core's model, without wrappers' prefixes.
        shape: Shape on this rank.
        layers: Families by depth, of the whole model.
        model: Widths and heads of the whole model.
        mamba: Which mixer M layers have: `native` (Mamba-2) or `author` (Mamba-3).
        tensor_ranks: Ranks that split its matrices.
        tensor_rank: This rank among them.
        first_layer: Layers before this rank's pipeline stage.
        first_expert: Experts before this rank's.

    Raises:
        RecipeError: If no rule knows the name, or the parts do not fill a fused matrix.
    """
    if name in _OUTSIDE:
        return Parameter(name=name, shape=tuple(shape), kind=_OUTSIDE[name])
    place = _place(name, layers, model, first_layer)
    if place is None:
        raise _unknown(name, shape)
    prefix, number, family, ending = place
    whole = f"{prefix}.{ending}"
    expert: int | None = None
    if matched := _EXPERT.fullmatch(ending):
        expert = int(matched["listed"] or matched["grouped"] or 0) + first_expert
        linear = matched["module"] or matched["bank"]
        module = f"mlp.experts.{linear}"
        whole = f"{prefix}.mlp.experts.{expert}.{linear}.weight"
    else:
        for pattern, kind in _ENDINGS:
            if re.fullmatch(pattern, ending):
                return Parameter(
                    name=whole, shape=tuple(shape), kind=kind, layer=number, family=family
                )
        module, _, weight = ending.rpartition(".")
        if weight != "weight":
            raise _unknown(name, shape)
    if module not in (_PROJECTIONS if family else _OF_DEPTHS) or len(shape) != 2:
        raise _unknown(name, shape)
    rows: _Rows = (("", shape[0]),)
    if family:
        authored = family is BlockFamily.MAMBA and mamba == "author"
        rule = _AUTHORED.get(module) if authored else None
        rows = (rule or _PROJECTIONS[module])(model, family, tensor_ranks, shape[0])
    period = sum(height for _, height in rows)
    if shape[0] % period and not (module in _SPLIT_AS_ONE and period % shape[0] == 0):
        raise RecipeError(
            f"The parts of {name} do not fill it",
            given=f"shape {tuple(shape)}",
            allowed="rows in multiples of "
            + " + ".join(f"{height} ({part or 'whole'})" for part, height in rows),
            hint="the configuration that this model was built from",
        )
    parts = _parts(module, rows, shape[0], tensor_rank)
    kind = ParameterKind.FUSED_PROJECTION if len(parts) > 1 else ParameterKind.PROJECTION
    if expert is not None:
        kind = ParameterKind.EXPERT_BANK
    return Parameter(
        name=whole,
        shape=tuple(shape),
        kind=kind,
        layer=number,
        family=family,
        expert=expert,
        parts=parts,
    )


class _Place(NamedTuple):
    """Where a parameter stands: its module's name, layer, family, and the rest of its name."""

    prefix: str
    number: int | None
    family: BlockFamily | None
    ending: str


def _place(name: str, layers: LayerPattern, model: ModelShape, first: int) -> _Place | None:
    """Return where a parameter stands among the layers and prediction depths."""
    if found := _LAYER.fullmatch(name):
        index = int(found[1]) + first
        return _Place(f"decoder.layers.{index}", index + 1, layers.layers[index], found[2])
    if not (found := _DEPTH.fullmatch(name)):
        return None
    depth, inner, ending = found.groups()
    if inner is None:
        return _Place(f"mtp.layers.{depth}", None, None, ending)
    families = model.mtp.pattern.layers
    if int(inner) >= len(families):
        return None
    prefix = f"mtp.layers.{depth}.mtp_model_layer.layers.{inner}"
    return _Place(prefix, None, families[int(inner)], ending)


def _unknown(name: str, shape: Sequence[int]) -> RecipeError:
    return RecipeError(
        "No rule says what this parameter is",
        given=f"{name} of shape {tuple(shape)}",
        allowed="the parameters of A, D, E, G, M and R layers, the embedding, the head and their "
        "norms",
        hint="a rule for it in megacpp_nemo.contract.parameters",
    )


# Rows of a matrix as (part, height), repeated in turn until the matrix is full.
_Rows = tuple[tuple[str, int], ...]
# (model, family, tensor ranks, rows on this rank) -> rows.
_Rule = Callable[[ModelShape, BlockFamily, int, int], _Rows]


def _whole(name: str = "") -> _Rule:
    return lambda model, family, ranks, height: ((name, height),)


def _qkv(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    """One query group after another, each its query heads, key and value."""
    shape = model.attention
    heads = shape.num_heads // shape.num_query_groups
    width = shape.head_dim
    return (("q", heads * width), ("k", width), ("v", width))


def _latent_down(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    shape = model.latent
    return (("latent", shape.kv_lora_rank), ("k_rotary", shape.qk_pos_emb_head_dim))


def _latent_up(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    """One head after another, each its key without position and its value."""
    return (("k", model.latent.qk_head_dim), ("v", model.latent.v_head_dim))


def _first_linear(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    if model.experts.activation == "swiglu":
        return (("gate", height // 2), ("up", height // 2))
    return (("", height),)


def _mixer_in(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    if family is BlockFamily.RECURRENT:
        recurrent = model.recurrent
        keys = recurrent.num_qk_heads * recurrent.key_dim // ranks
        values = recurrent.num_heads * recurrent.value_dim // ranks
        forget = recurrent.num_heads // ranks
        return (("q", keys), ("k", keys), ("v", values), ("g", values), ("f", forget))
    mamba = model.mamba
    inner = mamba.num_heads * mamba.head_dim // ranks
    state = mamba.num_groups * mamba.state_dim // ranks
    heads = mamba.num_heads // ranks
    return (("z", inner), ("x", inner), ("B", state), ("C", state), ("dt", heads))


def _author_in(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    mamba = model.author_mamba
    inner = mamba.num_heads * mamba.head_dim // ranks
    shared = mamba.mimo_rank * mamba.state_dim // ranks
    heads, angles = mamba.num_heads // ranks, mamba.num_angles // ranks
    by_head = tuple((name, heads) for name in ("dt", "A", "trap"))
    return (("z", inner), ("x", inner), ("B", shared), ("C", shared), *by_head, ("angle", angles))


def _delta_in(model: ModelShape, family: BlockFamily, ranks: int, height: int) -> _Rows:
    shape = model.gated_delta_net
    keys = shape.num_key_heads * shape.key_head_dim // ranks
    values = shape.num_value_heads * shape.value_head_dim // ranks
    heads = shape.num_value_heads // ranks
    by_head = (("beta", heads), ("alpha", heads))
    return (("q", keys), ("k", keys), ("v", values), ("gate", values), *by_head)


_PROJECTIONS: dict[str, _Rule] = {
    "self_attention.linear_qkv": _qkv,
    "self_attention.linear_q_proj": _whole("q"),
    "self_attention.linear_q_down_proj": _whole("q"),
    "self_attention.linear_q_up_proj": _whole("q"),
    "self_attention.linear_kv_down_proj": _latent_down,
    "self_attention.linear_kv_up_proj": _latent_up,
    "self_attention.linear_proj": _whole(),
    "self_attention.core_attention.indexer.linear_wq_b": _whole(),
    "self_attention.core_attention.indexer.linear_wk": _whole(),
    "self_attention.in_proj": _delta_in,
    "self_attention.out_proj": _whole(),
    "mlp.linear_fc1": _first_linear,
    "mlp.linear_fc2": _whole(),
    "mlp.shared_experts.linear_fc1": _first_linear,
    "mlp.shared_experts.linear_fc2": _whole(),
    "mlp.experts.linear_fc1": _first_linear,
    "mlp.experts.linear_fc2": _whole(),
    "mixer.in_proj": _mixer_in,
    "mixer.out_proj": _whole(),
}
# Of M layers on the authored lane, where they are not as the native one's.
_AUTHORED: dict[str, _Rule] = {"mixer.in_proj": _author_in}
# Projections of a prediction depth outside its layers.
_OF_DEPTHS = ("eh_proj",)
# Stacked first and split over the ranks afterwards: a rank holds a run of rows of the stack,
# wherever its parts begin and end. Every other fused matrix is split part by part.
_SPLIT_AS_ONE = ("self_attention.linear_kv_down_proj",)


def _parts(module: str, rows: _Rows, height: int, rank: int) -> tuple[Part, ...]:
    """Return the parts of a matrix whose first `height` rows, or run of them, are on this rank."""
    begin = 0
    if module in _SPLIT_AS_ONE and height < sum(count for _, count in rows):
        begin = rank * height
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name, _ in rows}
    at = 0
    for name, count in itertools.cycle(rows):
        if at >= begin + height or count == 0:
            break
        low, high = max(at, begin) - begin, min(at + count - begin, height)
        if low < high:
            ranges[name].append((low, high))
        at += count
    # Not of Gated DeltaNet, whose module stands in the place of attention.
    attention = module.startswith("self_attention.linear_")
    return tuple(
        Part(name=name, rows=tuple(own), query_key=attention and name in _QUERY_KEY)
        for name, own in ranges.items()
    )


TARGETS: dict[str, tuple[str, Callable[[Parameter, Part], bool]]] = {
    "all": ("every projection", lambda parameter, part: True),
    "attention": (
        "projections of attention layers",
        lambda parameter, part: (
            parameter.family in (BlockFamily.ATTENTION, BlockFamily.SPARSE_ATTENTION)
        ),
    ),
    "attention_qk": (
        "projections that make queries or keys of attention, and nothing else",
        lambda parameter, part: part.query_key,
    ),
    "experts": (
        "projections of routed experts",
        lambda parameter, part: parameter.expert is not None,
    ),
    "mlp": (
        "projections of expert layers, shared and dense ones included",
        lambda parameter, part: parameter.family is BlockFamily.EXPERTS,
    ),
    "mamba": (
        "projections of Mamba layers",
        lambda parameter, part: parameter.family is BlockFamily.MAMBA,
    ),
    "recurrent": (
        "projections of recurrent layers",
        lambda parameter, part: parameter.family is BlockFamily.RECURRENT,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which logical matrices a lever acts on: those that pass every one of these.

    Args:
        target: A name of `TARGETS`.
        families: Block families by letter or alias; empty for all.
        layers: 1-based layer numbers; empty for all.

    Raises:
        RecipeError: If there is no such target.
        PatternError: If there is no such family.
    """

    target: str = "all"
    families: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lookup(
            {name: name for name in TARGETS},
            self.target,
            what=f"No target is called {self.target!r}",
            field="target",
        )
        for family in self.families:
            BlockFamily.from_name(family)

    def refusal(self, parameter: Parameter, part: Part | None = None) -> str | None:
        """Return why a parameter, or one part of it, is left alone; None if it is chosen."""
        if not parameter.kind.is_matrix:
            article = "an" if parameter.kind.value[0] in "aeiou" else "a"
            return f"{article} {parameter.kind.value}, not a projection"
        if self.layers and parameter.layer not in self.layers:
            return f"layer {parameter.layer} is not among layers {_listed(self.layers)}"
        chosen = {BlockFamily.from_name(name) for name in self.families}
        if chosen and parameter.family not in chosen:
            return f"not of families {_listed(self.families)}"
        wanted = TARGETS[self.target][1]
        own = parameter.parts if part is None else (part,)
        if not any(wanted(parameter, each) for each in own):
            return f"not in target {self.target}"
        return None

    def parts(self, parameter: Parameter) -> Iterator[Part]:
        """Yield the parts of a parameter that are chosen, in row order."""
        for part in parameter.parts:
            if self.refusal(parameter, part) is None:
                yield part

    def check(self, layers: LayerPattern, found: int) -> None:
        """Refuse a selection that names a layer the model lacks, or selects nothing.

        Args:
            layers: Families by depth.
            found: Matrices that it selects in the whole model.

        Raises:
            RecipeError: In either case.
        """
        beyond = [number for number in self.layers if not 1 <= number <= len(layers)]
        if beyond:
            raise RecipeError(
                "A chosen layer is not on this model",
                given=f"layers {_listed(self.layers)}",
                allowed=f"layers 1 to {len(layers)}",
                hint=f"layers={tuple(n for n in self.layers if n not in beyond) or (1,)}",
            )
        if not found:
            raise RecipeError(
                "Nothing in this model is selected",
                given=f"target={self.target!r}, families={self.families}, layers={self.layers}",
                allowed=f"a target of {', '.join(TARGETS)}, and families and layers that have it; "
                f"the model is {layers}",
                hint="target='all'",
            )


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
