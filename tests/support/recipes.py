"""Random valid recipes, for tests that say something of every recipe."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from megacpp_nemo.contract import HybridRecipe, MegaCppError, field_paths, with_paths
from megacpp_nemo.contract.parameters import TARGETS
from megacpp_nemo.contract.plasticity import LEVERS

MATRIX_LEVERS = ("fire", "dash", "shrink")
# Mixtures that some release owns whole are as frequent as those with everything in them.
LETTERS = ("A", "AM", "EM", "AEM", "AEMR", "AEMG", "DEM", "ADEMGR")
FLOATS = st.floats(1e-9, 0.5)
RANKS = "model.sparse_attention.a_ranks"
SIZES = st.sampled_from((16, 32, 48, 64, 128))
FOLDERS = st.sampled_from((None, "/data/one", "relative/two words", "/x-y_z.1"))


@functools.lru_cache(maxsize=None, typed=True)
def one_of(*values: Any) -> st.SearchStrategy[Any]:
    """Return the strategy that draws one of these; making each anew takes a fifth of the time."""
    return st.sampled_from(values)


@functools.cache
def _letters(alphabet: str, longest: int) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=1, max_size=longest)


@st.composite
def recipes(draw: st.DrawFn) -> HybridRecipe:
    """Draw a recipe: any pattern with or without stages, sizes that divide, any features."""
    layout = draw(_layouts())
    changes = {
        "name": draw(one_of("mine", "nam56r", "a name")),
        **layout,
        **draw(_patterns(layout)),
        **draw(_shapes()),
        **draw(_runs()),
    }
    changes |= draw(_features(changes))
    if draw(st.booleans()):
        changes |= draw(_levers(changes))
    try:
        return with_paths(HybridRecipe(), changes)
    except MegaCppError:
        assume(False)
        raise


@st.composite
def _layouts(draw: st.DrawFn) -> dict[str, Any]:
    tensor = draw(one_of(1, 1, 2))
    stages = draw(one_of(1, 1, 2, 4))
    distributed = draw(st.booleans())
    reduce = draw(st.booleans())
    return {
        "parallelism.tensor_model_parallel_size": tensor,
        "parallelism.sequence_parallel": tensor > 1,
        "parallelism.pipeline_model_parallel_size": stages,
        "parallelism.virtual_pipeline_model_parallel_size": draw(
            one_of(None, None, 2) if stages > 1 else st.none()
        ),
        "parallelism.context_parallel_size": draw(one_of(1, 1, 1, 2)),
        "parallelism.expert_model_parallel_size": draw(one_of(1, 1, 2)),
        "parallelism.expert_tensor_parallel_size": draw(one_of(None, None, 1)),
        "parallelism.num_nodes": draw(one_of(1, 2, 4)),
        "parallelism.devices_per_node": 16,
        "parallelism.use_distributed_optimizer": distributed,
        "parallelism.overlap_grad_reduce": reduce,
        "parallelism.overlap_param_gather": distributed and reduce and draw(st.booleans()),
        "parallelism.recompute": draw(one_of("none", "none", "full")),
    }


@st.composite
def _patterns(draw: st.DrawFn, layout: dict[str, Any]) -> dict[str, Any]:
    parts = layout["parallelism.pipeline_model_parallel_size"] * (
        layout["parallelism.virtual_pipeline_model_parallel_size"] or 1
    )
    letters = _letters(draw(one_of(*LETTERS)), 5)
    if parts > 1 and draw(st.booleans()):
        pattern = "|".join(draw(st.lists(letters, min_size=parts, max_size=parts)))
        return {"pattern": pattern, "depth": len(pattern.replace("|", ""))}
    return {"pattern": draw(letters), "depth": parts * draw(st.integers(1, 5))}


@st.composite
def _features(draw: st.DrawFn, changes: dict[str, Any]) -> dict[str, Any]:
    text, depth = changes["pattern"], changes["depth"]
    laid = (text.replace("|", "") * depth)[:depth]
    experts = draw(st.booleans()) if "E" in laid else True
    latent = "D" in laid or draw(st.booleans())
    sparse = latent and changes["parallelism.context_parallel_size"] == 1 and draw(st.booleans())
    ranks = st.sets(st.integers(0, max(0, laid.count("A") - 1)), max_size=3)
    precisions = ("bf16", "fp32", "fp8") if "E" in laid and experts else ("bf16", "fp32")
    found = {
        "features.experts": experts,
        "features.latent_attention": latent,
        "features.sparse_attention": sparse,
        "features.mamba": draw(one_of("native", "native", "author")),
        "features.mamba_path": draw(one_of("auto", "auto", "auto", "auto", "fused", "portable")),
        "features.ngram_hash": draw(st.booleans()),
        "features.structure": draw(one_of(None, None, "core", "all")),
        "features.kernels": draw(one_of("required", "available")),
        "features.reset_state": draw(st.booleans()),
        RANKS: sorted(draw(ranks)) if "A" in laid else (),
        "precision": draw(one_of(*precisions)),
    }
    cores = "A" in laid and "D" not in laid and not (sparse and found[RANKS])
    if cores and draw(st.booleans()):
        found["parallelism.recompute"] = draw(one_of("selective", "none"))
    if "E" not in laid or not experts:
        found["parallelism.expert_model_parallel_size"] = 1
    return found


@st.composite
def _levers(draw: st.DrawFn, changes: dict[str, Any]) -> dict[str, Any]:
    """Draw levers, each on as often as off; what a lever that is off says means nothing."""
    depth, last = changes["depth"], changes["schedule.train_steps"]
    steps = st.sets(st.integers(1, last), max_size=3).map(sorted)
    layers = st.lists(st.integers(1, depth), max_size=2)
    boundaries = one_of((), (), ("data",), ("context", "data"))
    letters = sorted(set(changes["pattern"].replace("|", "")[:depth]))
    families = one_of((), (), (letters[0],), tuple(letters))
    targets = one_of("all", "all", *TARGETS)
    found: dict[str, Any] = {}
    for name in ("fire", "dash", "shrink"):
        found[f"{name}.target"], found[f"{name}.families"] = draw(targets), draw(families)
        found[f"{name}.layers"] = draw(layers)
    for name in ("fire", "dash"):
        found[f"{name}.steps"], found[f"{name}.boundaries"] = draw(steps), draw(boundaries)
    stp = changes["parallelism.context_parallel_size"] == 1 and last > 1
    found |= {
        "fire.tolerance": draw(FLOATS),
        "dash.batches": draw(st.integers(1, 99)),
        "shrink.interval": draw(st.integers(0, min(last, 3))),
        "shrink.rate": draw(FLOATS),
        "stp.weight": draw(st.just(0.0) | FLOATS) if stp else 0.0,
        "stp.measure": stp and draw(st.booleans()),
        "stp.start_step": draw(st.integers(0, max(0, last - 1))),
        "stp.layers": draw(layers),
    }
    if "E" in letters:
        found |= {
            "redo.report_interval": draw(st.integers(0, min(last, 3))),
            "redo.steps": draw(steps),
            "redo.decay": draw(FLOATS),
        }
    return {f"plasticity.{path}": value for path, value in found.items()}


@st.composite
def _shapes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(one_of(2, 8, 12, 16, 32))
    experts = draw(one_of(2, 4, 8))
    names = (
        "hidden_size", "ffn_hidden_size", "seq_length", "attention.head_dim", "latent.q_lora_rank",
        "latent.kv_lora_rank", "latent.qk_head_dim", "latent.qk_pos_emb_head_dim",
        "latent.v_head_dim", "experts.ffn_hidden_size", "mamba.num_heads", "mamba.head_dim",
        "mamba.state_dim", "mamba.chunk_size", "author_mamba.num_heads",
        "gated_delta_net.key_head_dim", "recurrent.num_heads", "recurrent.key_dim",
        "recurrent.value_dim", "embedding.vocab_size", "sparse_attention.indexer_topk",
    )  # fmt: skip
    return {
        **{f"model.{name}": draw(SIZES) for name in names},
        "model.attention.num_heads": heads,
        "model.attention.num_query_groups": draw(one_of(heads, heads // 2)),
        "model.mamba.num_groups": draw(one_of(4, 8)),
        "model.mamba.conv_width": draw(one_of(4, 4, 2)),
        "model.latent.layernorm": draw(st.booleans()),
        "model.rotary_base": draw(st.integers(1, 10**7)),
        "model.norm_epsilon": draw(FLOATS),
        "model.experts.num_experts": experts,
        "model.experts.topk": draw(st.integers(1, min(experts, 4))),
        "model.experts.shared_expert_size": draw(one_of(0, 64)),
        "model.experts.activation": draw(one_of("gelu", "squared_relu", "swiglu")),
        "model.experts.aux_loss_coeff": draw(one_of(0.0, 1e-4) | FLOATS),
        "model.recurrent.state_gradient_clip": draw(FLOATS),
        "model.embedding.ngram.orders": draw(one_of((2,), (2, 3))),
        "model.mtp.num_layers": draw(st.integers(0, 2)),
        "model.mtp.pattern": draw(_letters("AEMG", 3)),
        "model.mtp.loss_scaling_factor": draw(FLOATS),
    }


@st.composite
def _runs(draw: st.DrawFn) -> dict[str, Any]:
    corpus = draw(one_of("indexed", "indexed", "sources"))
    paths = one_of((), ("/data/a",), ("30", "/data/a", "70", "b c"))
    return {
        "corpus": corpus,
        "files.data_path": draw(paths) if corpus == "indexed" else (),
        "files.split": draw(one_of("900,50,50", "99,1,0")),
        "files.tokenizer_dir": draw(FOLDERS),
        "files.run_dir": draw(FOLDERS),
        "batch.micro_batch_size": draw(one_of(1, 2)),
        "batch.global_batch_size": 512,
        "schedule.lr": draw(FLOATS),
        "schedule.min_lr": 0.0,
        "schedule.weight_decay": draw(one_of(0.0, 0.01)),
        "schedule.warmup_steps": draw(one_of(0, 10, 2_000)),
        "schedule.decay_steps": draw(one_of(20, 100_000)),
        "schedule.train_steps": draw(st.integers(1, 10**6)),
        "schedule.seed": draw(st.integers(0, 2**31 - 1)),
        "cadence.eval_batches": draw(st.integers(1, 99)),
    }


WORDS: dict[str, tuple[Any, ...]] = {
    "name": ("mine", "yours"),
    "pattern": ("AEM", "M"),
    "corpus": ("sources", "indexed"),
    "precision": ("fp32", "bf16", "fp8_experts"),
    "model.sparse_attention.a_ranks": ((0,), (), (1,)),
    "model.embedding.ngram.orders": ((2, 4), (2, 3)),
    "model.embedding.ngram.placement": ("host", "device"),
    "model.experts.activation": ("swiglu", "gelu", "squared_relu"),
    "model.mtp.pattern": ("AE", "M"),
    "features.mamba": ("author", "native"),
    "features.mamba_path": ("portable", "auto"),
    "features.structure": ("core", None),
    "features.kernels": ("available", "required"),
    "files.data_path": (("/data/other",), ()),
    "files.split": ("98,1,1", "900,50,50"),
    "files.tokenizer_dir": ("/data/tokenizer", None),
    "files.run_dir": ("/elsewhere", None),
    "parallelism.virtual_pipeline_model_parallel_size": (2, None),
    "parallelism.expert_tensor_parallel_size": (1, 2, None),
    "parallelism.recompute": ("full", "selective", "none"),
    **{f"plasticity.{name}.target": ("attention", "experts", "all") for name in MATRIX_LEVERS},
    **{f"plasticity.{name}.families": (("A",), ("M", "E"), ()) for name in MATRIX_LEVERS},
    **{f"plasticity.{name}.layers": ((1,), (2, 1), ()) for name in LEVERS},
    **{f"plasticity.{name}.steps": ((1,), (1, 2), ()) for name in ("fire", "dash", "redo")},
    **{f"plasticity.{name}.boundaries": (("data",), ("context",), ()) for name in ("fire", "dash")},
}


def candidates(field: str, value: Any) -> Iterator[Any]:
    """Yield other values that a field may take."""
    if field in WORDS:
        yield from WORDS[field]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value * 2, value + 1, value - 1, value // 2)
    elif isinstance(value, float):
        yield from (value / 2, value * 2, 0.5)


def changed(base: HybridRecipe, field: str) -> HybridRecipe | None:
    """Return a valid recipe that differs from `base` in this one field; None if there is none."""
    before = field_paths(base)[field]
    for value in candidates(field, before):
        try:
            other = with_paths(base, {field: value})
        except MegaCppError:
            continue
        if field_paths(other)[field] != before:
            return other
    return None
