"""Who reads a setting: the conditions of the correspondence table, in words and as tests."""

from __future__ import annotations

from megacpp_nemo.contract.pattern import BlockFamily
from megacpp_nemo.lowering.plan import Plan
from megacpp_nemo.lowering.roles import Role
from megacpp_nemo.lowering.row import Condition, layers

LATENT = layers(Role.LATENT_ATTENTION, Role.SPARSE_ATTENTION)
GROUPED = layers(Role.ATTENTION)
EXPERTS = layers(Role.EXPERTS)
DENSE = layers(Role.MLP)
MAMBA = layers(Role.MAMBA)
NATIVE_DSA = Condition(
    "sparse attention layers of the release's own",
    lambda plan: plan.has(Role.SPARSE_ATTENTION) and plan.is_native(Role.SPARSE_ATTENTION),
)
OWN_DSA = Condition(
    "sparse attention layers of this package",
    lambda plan: plan.has(Role.SPARSE_ATTENTION) and not plan.is_native(Role.SPARSE_ATTENTION),
)
NATIVE_MTP = Condition("prediction depths of the release's own", lambda plan: plan.native_mtp)
OWN_MTP = Condition(
    "prediction depths of this package",
    lambda plan: bool(plan.recipe.model.mtp.num_layers) and not plan.native_mtp,
)
OWN_MAMBA = Condition(
    "Mamba-2 layers of this package",
    lambda plan: plan.has(Role.MAMBA) and not plan.is_native(Role.MAMBA),
)
DEMANDED_PATH = Condition(
    "Mamba layers of this package, of which a path is demanded",
    lambda plan: (
        plan.recipe.features.mamba_path != "auto"
        and any(
            plan.has(role) and not plan.is_native(role) for role in (Role.MAMBA, Role.AUTHOR_MAMBA)
        )
    ),
)
ANY_PATH = Condition(
    "the fastest path that the machine has", lambda plan: plan.recipe.features.mamba_path == "auto"
)
STOCK_MAMBA = Condition(
    "what Megatron's mixer has; no flag changes it",
    lambda plan: plan.has(Role.MAMBA) and plan.is_native(Role.MAMBA),
)
DOCUMENTS = Condition(
    "layers with a state",
    lambda plan: any(seam.id == "documents" for seam in plan.seams),
)
NGRAM = Condition("n-gram memory", lambda plan: plan.recipe.features.ngram_hash)
STRUCTURE = Condition("structure channels", lambda plan: bool(plan.recipe.features.structure))

OFF_NGRAM = Condition("off, as in Megatron", lambda plan: not plan.recipe.features.ngram_hash)
OFF_STRUCTURE = Condition("off, as in Megatron", lambda plan: not plan.recipe.features.structure)
OFF_DOCUMENTS = Condition("off, as in Megatron", lambda plan: not plan.recipe.features.reset_state)


def _written(*families: BlockFamily) -> Condition:
    """Return the condition that one of these families stands in the pattern or in a depth's."""

    def holds(plan: Plan) -> bool:
        mtp = plan.recipe.model.mtp
        depth = mtp.pattern.layers if mtp.num_layers else ()
        return any(family in (*plan.recipe.layers.layers, *depth) for family in families)

    return Condition(f"{' or '.join(family.letter for family in families)} layers", holds)


A_OR_D_WRITTEN = _written(BlockFamily.ATTENTION, BlockFamily.SPARSE_ATTENTION)
E_WRITTEN = _written(BlockFamily.EXPERTS)
M_WRITTEN = _written(BlockFamily.MAMBA)
RANKS = Condition("A layers", lambda plan: plan.recipe.has(BlockFamily.ATTENTION))
CHOSEN_RANKS = Condition(
    "A layers, with sparse attention on",
    lambda plan: plan.recipe.features.sparse_attention and RANKS.holds(plan),
)
DEPTHS = Condition("prediction depths", lambda plan: plan.recipe.model.mtp.num_layers > 0)
