"""The seams: everything in a recipe that Megatron does not own, by name.

A seam says which layers it covers, who owns them here, why they are custom, since which
release Megatron has them itself, and what would have to hold for the seam to go. `SEAMS` is
the whole list; a lowering picks those a recipe needs on a release (`Plan.seams`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megacpp_nemo.contract.pattern import FULL_NAM52_PATTERN


class Kind(str, enum.Enum):
    """Where a seam attaches."""

    LAYER = "layer"
    STACK = "stack"
    HEAD = "head"
    INPUT = "input"
    CALLBACK = "callback"


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One thing that is ours.

    Args:
        id: Name, as reports and errors use it.
        kind: Where it attaches.
        what: What it is, in words.
        owner: Module or class of this package that builds it on Megatron's command line, or
            refuses to.
        built: Whether Megatron's command line gets it today. What is not built is carried by
            name only: the spec refuses to start with it, and a NeMo run has it.
        reason: Why Megatron does not own it, and why the spec cannot bring it.
        native_since: First release that has it, or None.
        graduates: What would have to hold for the seam to go.
        evidence: Where it is shown.
        off: What turns it off in a recipe.
        layers: 1-based numbers of the layers it covers.
        slot: Symbol of the release on whose slot its layers ride; empty if it has none.
        nemo_owner: Module or class of this package that builds it in a NeMo run, where Megatron's
            command line does not get it; empty where it does.
    """

    id: str
    kind: Kind
    what: str
    owner: str
    built: bool
    reason: str
    native_since: str | None
    graduates: str
    evidence: str
    off: str
    layers: tuple[int, ...] = ()
    slot: str = ""
    nemo_owner: str = ""

    def at(self, layers: Iterable[int] = (), slot: str = "") -> Seam:
        """Return the seam as it stands in one model."""
        return replace(self, layers=tuple(layers), slot=slot)


REFUSES = "megacpp_nemo.spec"
NEMO_ONLY = "in a NeMo run only"

_ALL = (
    Seam(
        id="mla",
        kind=Kind.LAYER,
        what="multi-latent attention",
        owner="megacpp_nemo.model.attention.LatentAttention",
        built=True,
        reason="the stock spec builds plain attention for *, whatever the MLA flags say",
        native_since="0.19",
        graduates="a symbol of the release that builds multi-latent attention",
        evidence="tests/spec, tests/model/test_specs.py",
        off="features.latent_attention=false, features.sparse_attention=false",
    ),
    Seam(
        id="dsa",
        kind=Kind.LAYER,
        what="sparse attention (DSA)",
        owner="megacpp_nemo.model.sparse_attention.SparseLatentAttention",
        built=True,
        reason="no symbol of the release builds it; its flags are read by no hybrid layer",
        native_since="0.18",
        graduates="a symbol of the release that builds DSA",
        evidence="tests/spec, tests/model/test_sparse_attention.py",
        off="features.sparse_attention=false",
    ),
    Seam(
        id="mamba-kernel-shape",
        kind=Kind.LAYER,
        what="Megatron's Mamba mixer with another convolution width or chunk size",
        owner="megacpp_nemo.spec",
        built=True,
        reason="the stock spec fixes 4 taps and chunks of 128, and no flag changes them",
        native_since=None,
        graduates="flags for the mixer's d_conv and chunk_size",
        evidence="tests/spec",
        off="model.mamba.conv_width=4, model.mamba.chunk_size=128",
    ),
    Seam(
        id="mamba-path",
        kind=Kind.LAYER,
        what="Megatron's Mamba mixer on another path than its fused kernel",
        owner="megacpp_nemo.spec",
        built=True,
        reason="the stock spec builds the mixer on its fused kernel only",
        native_since=None,
        graduates="a flag for the mixer's path, and a mixer that runs without kernels",
        evidence="tests/spec, tests/model/test_mamba_paths.py",
        off="features.mamba_path=auto",
    ),
    Seam(
        id="author-mamba",
        kind=Kind.LAYER,
        what="the authored Mamba-3 mixer",
        owner="megacpp_nemo.model.author_mamba.AuthorMambaMixer",
        built=True,
        reason="Megatron's M is Mamba-2",
        native_since=None,
        graduates="a Mamba-3 mixer in Megatron",
        evidence="tests/spec, tests/model/test_author_mamba.py, tests/model/test_mamba3.py",
        off="features.mamba=native",
    ),
    Seam(
        id="m2rnn",
        kind=Kind.LAYER,
        what="M2RNN, the recurrent matrix-state block",
        owner="megacpp_nemo.model.recurrent.RecurrentMixer",
        built=True,
        reason="no release has a symbol for it",
        native_since=None,
        graduates="a recurrent matrix-state mixer and a symbol for it in Megatron",
        evidence="tests/spec, tests/model/test_recurrent.py",
        off=f"pattern={FULL_NAM52_PATTERN}",
    ),
    Seam(
        id="fp8-experts",
        kind=Kind.STACK,
        what="FP8 in expert layers only",
        owner="megacpp_nemo.spec",
        built=True,
        reason="Megatron's stack enters FP8 for every layer",
        native_since=None,
        graduates="a choice of the layers that enter FP8, by family",
        evidence="tests/spec",
        off="precision=bf16",
    ),
    Seam(
        id="recompute",
        kind=Kind.STACK,
        what="every layer computed again in the backward pass",
        owner="megacpp_nemo.model.recompute",
        built=True,
        reason="the release's hybrid stack takes the flags and keeps everything, or, in 0.18, "
        "its prediction depths fail with them",
        native_since="0.18",
        graduates="a hybrid stack that recomputes its layers",
        evidence="tests/spec, tests/model/test_recompute.py",
        off="parallelism.recompute=none",
    ),
    Seam(
        id="mtp",
        kind=Kind.HEAD,
        what="multi-token prediction",
        owner=REFUSES,
        built=False,
        reason="--mtp-num-layers is accepted, and a hybrid model builds nothing for it",
        native_since="0.17",
        graduates="a release whose hybrid pattern takes / suffixes",
        evidence="tests/spec/test_nemo_owners.py, tests/model/test_prediction.py, of the NeMo "
        "recipe",
        off="model.mtp.num_layers=0",
        nemo_owner="megacpp_nemo.model.prediction.PredictionBlock",
    ),
    Seam(
        id="ngram-hash",
        kind=Kind.INPUT,
        what="the hashed n-gram memory",
        owner=REFUSES,
        built=False,
        reason="Megatron's embedding takes tokens and positions only, and its hybrid model builds "
        "it without a spec: what --spec names is the stack, which gets no tokens",
        native_since=None,
        graduates="an embedding spec in Megatron's hybrid model",
        evidence="tests/spec/test_nemo_owners.py, tests/model/test_ngram.py, of the NeMo recipe",
        off="features.ngram_hash=false",
        nemo_owner="megacpp_nemo.model.ngram.NgramMemory",
    ),
    Seam(
        id="structure",
        kind=Kind.INPUT,
        what="the code-structure channels",
        owner=REFUSES,
        built=False,
        reason="Megatron's data and embedding know no such channels, and its hybrid model builds "
        "the embedding without a spec",
        native_since=None,
        graduates="extra input channels in Megatron's data and hybrid model",
        evidence="tests/spec/test_nemo_owners.py, tests/model/test_structure.py, of the NeMo "
        "recipe",
        off="features.structure=null",
        nemo_owner="megacpp_nemo.model.structure.StructureEmbedding",
    ),
    Seam(
        id="documents",
        kind=Kind.STACK,
        what="a zero state at each document of a packed row",
        owner=REFUSES,
        built=False,
        reason="Megatron's pretraining hands its layers no document boundaries",
        native_since=None,
        graduates="boundaries that reach every layer: 0.19.0 has "
        "--dataloader-inter-document-masking, which M2RNN cannot read yet",
        evidence="tests/model/test_documents.py, of the NeMo recipe",
        off="features.reset_state=false",
        nemo_owner="megacpp_nemo.model.documents.DocumentBoundaries",
    ),
)


def _lever(name: str, what: str, off: str) -> Seam:
    """Return the seam of a lever on a run in progress: a NeMo run pulls it, nothing else does."""
    return Seam(
        id=name,
        kind=Kind.CALLBACK,
        what=what,
        owner=REFUSES,
        built=False,
        reason="no flag turns it on, and Megatron's own script runs no NeMo callbacks",
        native_since=None,
        graduates="a flag for it, or a hook for callbacks in Megatron's pretraining loop",
        evidence="tests/callbacks, of the NeMo recipe",
        off=off,
        nemo_owner=f"megacpp_nemo.callbacks.{name}",
    )


# In the order in which reports list them.
_LEVERS = (
    _lever(
        "fire",
        "FIRE (Frobenius-isometry reinitialization)",
        "plasticity.fire.steps=[], plasticity.fire.boundaries=[]",
    ),
    _lever(
        "dash",
        "DASH (direction-aware shrinking)",
        "plasticity.dash.steps=[], plasticity.dash.boundaries=[]",
    ),
    _lever(
        "shrink",
        "the periodic shrink of rows",
        "plasticity.shrink.interval=0",
    ),
    _lever(
        "redo",
        "ReDo (recycling of dormant units)",
        "plasticity.redo.report_interval=0, plasticity.redo.steps=[]",
    ),
    _lever(
        "stp",
        "STP (semantic tube prediction)",
        "plasticity.stp.weight=0, plasticity.stp.measure=false",
    ),
)
SEAMS: dict[str, Seam] = {seam.id: seam for seam in (*_ALL, *_LEVERS)}
