"""What leads a page: the recipe in a sentence, and the numbers that decide."""

from __future__ import annotations

from megacpp_nemo.contract.errors import MegaCppError
from megacpp_nemo.contract.families import describe
from megacpp_nemo.contract.families import recipe as named
from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.lowering.seams import NEMO_ONLY
from megacpp_nemo.report.numbers import count, size, work
from megacpp_nemo.report.subject import Subject
from megacpp_nemo.report.tables import Figure


def about(subject: Subject) -> str:
    """Return a recipe in a sentence: what it is, where it goes, on how many GPUs."""
    recipe = subject.recipe
    what = _what(recipe)
    return f"{what}. On Megatron-LM {subject.release}, {layout(recipe)}."


def _what(recipe: HybridRecipe) -> str:
    """Return a recipe's description by its name, if its model is still that one."""
    try:
        own, what = named(recipe.name), describe(recipe.name)
    except MegaCppError:
        return recipe.name
    if (recipe.layers.layers, recipe.model) == (own.layers.layers, own.model):
        return what
    return (
        f"{recipe.name} with another model: {len(recipe.layers)} layers, "
        f"hidden {recipe.model.hidden_size}"
    )


def layout(recipe: HybridRecipe) -> str:
    """Return how a recipe is laid over GPUs, in words."""
    own = recipe.parallelism
    sizes = {
        "tensor": own.tensor_model_parallel_size,
        "pipeline": own.pipeline_model_parallel_size,
        "virtual": own.virtual_pipeline_model_parallel_size or 1,
        "context": own.context_parallel_size,
        "expert": own.expert_model_parallel_size,
        "data": own.data_parallel_size,
    }
    split = ", ".join(f"{name} {value}" for name, value in sizes.items() if value > 1)
    gpus = f"{own.world_size} GPU{'s' * (own.world_size > 1)}"
    return (
        f"{gpus} ({split}), {recipe.precision.value}"
        if split
        else f"{gpus}, {recipe.precision.value}"
    )


def figures(subject: Subject) -> list[Figure]:
    """Return the numbers that lead the page."""
    recipe, plan = subject.recipe, subject.plan
    batch, model, whole = recipe.batch, recipe.model, plan.whole
    return [
        Figure(name="Layers", value=str(recipe.depth), note=_owners(subject)),
        Figure(
            name="Parameters",
            value=count(whole.count.total),
            note=f"{count(whole.count.active)} active",
        ),
        Figure(
            name="Training",
            value=work(whole.training_flops),
            note="a token, forward and backward",
        ),
        Figure(
            name="Memory of a GPU",
            value=size(plan.fullest.total_bytes),
            note=f"of {size(plan.gpu.memory_bytes)}, most loaded rank",
        ),
        Figure(
            name="Tokens a step",
            value=count(plan.tokens_per_step),
            note=f"{batch.global_batch_size} rows of {model.seq_length:,}",
        ),
        Figure(name="Seams", **_seams(subject)),
    ]


def _seams(subject: Subject) -> dict[str, str]:
    if subject.lowering is None:
        return {"value": "unknown", "note": "refused for this release"}
    seams = subject.lowering.seams
    missing = sum(not seam.built for seam in seams)
    built = f"{missing} {NEMO_ONLY}" if missing else "all built"
    return {"value": str(len(seams)), "note": built if seams else "the release owns it whole"}


def _owners(subject: Subject) -> str:
    if subject.lowering is None:
        return "refused for this release"
    native = sum(layer.native for layer in subject.lowering.layers)
    return f"{native} native, {len(subject.lowering.layers) - native} custom"
