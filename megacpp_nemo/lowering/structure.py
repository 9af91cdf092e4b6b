"""What a hybrid pattern and its spec say together: the layers of a lifted command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megacpp_nemo.contract.errors import LoweringError
from megacpp_nemo.contract.pattern import BlockFamily, LayerPattern
from megacpp_nemo.lowering.ownership import MEANING
from megacpp_nemo.lowering.releases import Release
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.spec_name import SPEC_MODULE, NamedLayer, SpecName

FAMILY = {
    Role.ATTENTION: BlockFamily.ATTENTION,
    Role.LATENT_ATTENTION: BlockFamily.ATTENTION,
    Role.SPARSE_ATTENTION: BlockFamily.ATTENTION,
    Role.EXPERTS: BlockFamily.EXPERTS,
    Role.MLP: BlockFamily.EXPERTS,
    Role.MAMBA: BlockFamily.MAMBA,
    Role.AUTHOR_MAMBA: BlockFamily.MAMBA,
    Role.GATED_DELTA_NET: BlockFamily.GATED_DELTA_NET,
    Role.RECURRENT: BlockFamily.RECURRENT,
}


def structure_of(values: Mapping[str, Any], release: Release) -> dict[str, Any]:
    """Return the fields that the pattern and the spec say together."""
    text = values.get(release.pattern_flag)
    if not text:
        raise LoweringError(
            "The command line has no hybrid layer pattern",
            given=f"no {release.pattern_flag}",
            allowed="the command line of a hybrid model",
            hint=f"{release.pattern_flag} 'M*ME'",
        )
    main, *depths = str(text).split(release.mtp_separator or "\n")
    segments = main.split(release.stage_separator or "\n")
    _check_pattern(str(text), segments, depths)
    spec = _spec(values, release)
    letters = [list(segment) for segment in segments]
    flat = [symbol for segment in letters for symbol in segment]
    roles = _roles(flat, spec.layers if spec else None, release)
    families = iter(FAMILY[role] for role in roles)
    pattern = LayerPattern(tuple(tuple(next(families) for _ in part) for part in letters))
    stages = int(values.get("--pipeline-model-parallel-size", 1))
    if len(segments) == 1 and stages > 1:
        pattern = _cut(pattern, values, stages)
    a_layers = [role for role, f in zip(roles, pattern, strict=True) if f.letter == "A"]
    sparse = [rank for rank, role in enumerate(a_layers) if role is Role.SPARSE_ATTENTION]
    inner = _roles(list(depths[0]), spec.mtp if spec else None, release) if depths else []
    every = [*roles, *inner]
    _refuse_mixed(every)
    fields: dict[str, Any] = {
        "name": "lifted",
        "pattern": pattern if pattern.is_segmented else _unit(pattern),
        "depth": len(pattern),
        "features.ngram_hash": False,
        "features.latent_attention": Role.ATTENTION not in every,
        "features.sparse_attention": bool(sparse),
        "features.experts": Role.MLP not in every,
        "features.mamba": "author" if Role.AUTHOR_MAMBA in every else "native",
        "model.mtp.num_layers": len(depths),
        "parallelism.virtual_pipeline_model_parallel_size": _chunks(len(segments), stages),
    }
    if sparse:
        fields["model.sparse_attention.a_ranks"] = tuple(sparse)
    if inner:
        fields["model.mtp.pattern"] = LayerPattern.of(FAMILY[role] for role in inner)
    return fields | (dict(spec.settings) if spec else {})


def _check_pattern(text: str, segments: Sequence[str], depths: Sequence[str]) -> None:
    """Refuse what upstream's parser lets through: empty parts, and unlike depths."""
    if not all(segments) or not all(depths) or len(set(depths)) > 1:
        raise LoweringError(
            "The hybrid layer pattern has an empty part, or prediction depths that differ",
            given=repr(text),
            allowed="non-empty stages with single '|', then the same /PART once per depth",
            hint="'M*ME|M*ME/*E'",
        )


def _refuse_mixed(roles: Sequence[Role]) -> None:
    for one, other in (
        (Role.ATTENTION, Role.LATENT_ATTENTION),
        (Role.EXPERTS, Role.MLP),
        (Role.MAMBA, Role.AUTHOR_MAMBA),
    ):
        if one in roles and other in roles:
            raise LoweringError(
                f"A recipe has {one.words} or {other.words} layers, not both",
                given=f"{roles.count(one)} and {roles.count(other)} of them",
                allowed="one of the two",
                hint="a pattern with only one of them",
            )


def _spec(values: Mapping[str, Any], release: Release) -> SpecName | None:
    spec = tuple(values.get("--spec") or ())
    if spec == release.stock_spec:
        return None
    if len(spec) == 2 and spec[0] == SPEC_MODULE:
        return SpecName.parse(spec[1])
    raise LoweringError(
        "Only the stock spec and this package's can be lifted",
        given=f"--spec {' '.join(spec)}" if spec else "no --spec",
        allowed=f"{' '.join(release.stock_spec)}, or {SPEC_MODULE} NAME",
        hint=f"--spec {' '.join(release.stock_spec)}",
    )


def _roles(
    symbols: Sequence[str], named: Sequence[NamedLayer] | None, release: Release
) -> list[Role]:
    """Return what each symbol means, or what the spec's name says it is."""
    meanings = {symbol: meaning for meaning, symbol in release.symbols.items()}
    unknown = [symbol for symbol in symbols if symbol not in meanings]
    if unknown:
        raise LoweringError(
            f"Megatron {release.name} has no layer {unknown[0]!r}",
            given="".join(symbols),
            allowed=", ".join(f"{s} ({m})" for m, s in release.symbols.items()),
            hint="a later release, or another symbol",
        )
    if named is not None:
        if len(named) != len(symbols):
            raise LoweringError(
                "The pattern and the name of the spec disagree on the number of layers",
                given=f"{len(symbols)} symbols, {len(named)} layers in the spec",
                allowed="as many in both",
                hint="the command that megacpp lower prints",
            )
        return [layer.role for layer in named]
    roles = {meaning: role for role, meaning in MEANING.items()}
    return [roles[meanings[symbol]] for symbol in symbols]


def _unit(pattern: LayerPattern) -> LayerPattern:
    """Return the shortest pattern that tiles to this one."""
    whole = pattern.layers
    for length in range(1, len(whole)):
        unit = LayerPattern.of(whole[:length])
        if unit.tile(len(whole)).layers == whole:
            return unit
    return pattern


def _cut(pattern: LayerPattern, values: Mapping[str, Any], stages: int) -> LayerPattern:
    """Return the pattern cut where first and last stage counts say; uncut if they do not."""
    first = values.get("--decoder-first-pipeline-num-layers")
    last = values.get("--decoder-last-pipeline-num-layers")
    if first is None or last is None or stages < 2:
        return pattern
    middle, rest = len(pattern) - first - last, stages - 2
    sizes = [first, *([middle // rest] * rest if rest else []), last]
    if sum(sizes) != len(pattern) or min(sizes) < 1:
        raise LoweringError(
            "The pipeline stages do not add up to the pattern",
            given=f"stages of {sizes} layers for {len(pattern)}",
            allowed="counts that leave the same number of layers for each middle stage",
            hint="another --decoder-first-pipeline-num-layers",
        )
    layers = iter(pattern.layers)
    return LayerPattern(tuple(tuple(next(layers) for _ in range(size)) for size in sizes))


def _chunks(segments: int, stages: int) -> int | None:
    """Return the model chunks per stage that a pattern's segments make."""
    virtual = stages > 1 and segments > stages and segments % stages == 0
    return segments // stages if virtual else None
