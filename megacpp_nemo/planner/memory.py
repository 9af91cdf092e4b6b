"""Bytes that a rank holds: weights, gradients, optimizer, activations and the loss's workspace.

- `rank_memory`: of a rank of one pipeline stage
- `most_loaded`: of the rank that holds most

Weights are in the model's precision. Gradients are accumulated and reduced in fp32, as the recipes
set it. In bf16 the optimizer has fp32 masters beside Adam's two fp32 moments; in fp32 the weights
are the masters. The distributed optimizer splits masters and moments over the ranks that share a
buffer, and pads the buffers (`buffers`). Not counted: the CUDA context, the allocator's
fragmentation, buffers of collectives, and what a layer needs only while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacpp_nemo.contract.recipe import HybridRecipe
from megacpp_nemo.planner.activations import stage_activations
from megacpp_nemo.planner.buffers import Buffer, buffers_of, piece_sizes
from megacpp_nemo.planner.pieces import Piece
from megacpp_nemo.planner.pipeline import micro_batches
from megacpp_nemo.planner.saved import element_bytes, host_rows
from megacpp_nemo.planner.sharding import stage_pieces

GRADIENT_BYTES = MASTER_BYTES = 4
MOMENTS_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one rank of a pipeline stage holds.

    Args:
        stage: 0-based pipeline stage.
        weights_bytes: Parameters, padding of their buffers included.
        gradients_bytes: Gradient buffers; and, of n-gram tables in host memory, the gradients of
            the rows that a step reads, at most.
        optimizer_bytes: Masters and moments; under the distributed optimizer at most so much, as
            the padding between parameters, which needs none, may lie in another rank's part.
        activations_bytes: What is kept for backward passes, of all micro-batches held at once.
        logits_bytes: Logits and loss over the vocabulary, of the last stage.
        tables_bytes: N-gram tables' part of the weights.
        host_bytes: Of host memory, n-gram tables that lie and are trained there: fp32 weights,
            gradients and moments, whole on every data-parallel rank.
    """

    stage: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    tables_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it on the device; the tables are among the weights."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
        )

    def to_dict(self) -> dict[str, int]:
        """Return the figures as plain data."""
        return {
            "stage": self.stage,
            "weights_bytes": self.weights_bytes,
            "gradients_bytes": self.gradients_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "activations_bytes": self.activations_bytes,
            "logits_bytes": self.logits_bytes,
            "tables_bytes": self.tables_bytes,
            "host_bytes": self.host_bytes,
            "total_bytes": self.total_bytes,
        }


def rank_memory(
    recipe: HybridRecipe,
    stage: int = 0,
    *,
    recompute: str | None = None,
    kernels: str = "fused",
) -> RankMemory:
    """Return what a rank of a pipeline stage holds.

    Args:
        recipe: What is trained, and how it is laid out.
        stage: 0-based pipeline stage.
        recompute: `none`, `selective` or `full`, as in `activations.saved_bytes`; the recipe's if
            not given.
        kernels: `fused` or `portable`, as there.

    Raises:
        RecipeError: If there is no such stage, policy or kernels, or no rule says what
            parameters a part has or what it keeps.
    """
    return _memory(recipe, stage, stage_pieces(recipe, stage), recompute, kernels)


def most_loaded(
    recipe: HybridRecipe, *, recompute: str | None = None, kernels: str = "fused"
) -> RankMemory:
    """Return what a rank of the fullest pipeline stage holds.

    Arguments and errors are those of `rank_memory`.
    """
    stages = range(recipe.parallelism.pipeline_model_parallel_size)
    return max(
        (rank_memory(recipe, stage, recompute=recompute, kernels=kernels) for stage in stages),
        key=lambda memory: memory.total_bytes,
    )


def _memory(
    recipe: HybridRecipe, stage: int, held: Sequence[Piece], recompute: str | None, kernels: str
) -> RankMemory:
    buffers, width = buffers_of(recipe, stage, held), element_bytes(recipe)
    elements = sum(buffer.padded for buffer in buffers)
    tables = sum(piece_sizes(recipe, piece).tables for piece in held if piece.family is None)
    kept = stage_activations(recipe, stage, recompute=recompute, kernels=kernels, held=held)
    return RankMemory(
        stage=stage,
        weights_bytes=elements * width,
        gradients_bytes=elements * GRADIENT_BYTES + _gradients_of_rows(recipe),
        optimizer_bytes=sum(optimizer_bytes(recipe, buffer) for buffer in buffers),
        activations_bytes=kept.layers + kept.working,
        logits_bytes=kept.logits,
        tables_bytes=tables * width,
        host_bytes=_host_bytes(recipe),
    )


def _host_bytes(recipe: HybridRecipe) -> int:
    """Return what n-gram tables in host memory take there, on one rank of the first stage."""
    ngram = recipe.model.embedding.ngram
    if not recipe.features.ngram_hash or ngram.placement != "host":
        return 0
    part = ngram.dim // recipe.parallelism.tensor_model_parallel_size
    return sum(ngram.table_sizes) * part * (MASTER_BYTES + GRADIENT_BYTES + MOMENTS_BYTES)


def _gradients_of_rows(recipe: HybridRecipe) -> int:
    """Return what the gradients of rows in host memory take on the device till a step, at most."""
    part = recipe.model.embedding.ngram.dim // recipe.parallelism.tensor_model_parallel_size
    return micro_batches(recipe) * host_rows(recipe) * part * element_bytes(recipe)


def optimizer_bytes(recipe: HybridRecipe, buffer: Buffer) -> int:
    """Return the bytes of masters and moments of a buffer's parameters on one rank, at most."""
    masters = 0 if element_bytes(recipe) == MASTER_BYTES else MASTER_BYTES
    if not recipe.parallelism.use_distributed_optimizer:
        return buffer.elements * (masters + MOMENTS_BYTES)
    return buffer.padded // buffer.ranks * (masters + MOMENTS_BYTES)
