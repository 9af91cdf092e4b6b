"""The logical matrices of a model in training, as this rank holds them.

A projection's parameter may hold several logical matrices, each split over tensor ranks by rows
or by columns. A `Matrix` reads and writes this rank's share of one of them and knows how the rest
is split, so that a lever can act as if it held the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megacpp_nemo.contract.parameters import Parameter, Part, Selection, classify
from megacpp_nemo.model.shape import shape_of

ROWS, COLUMNS = 0, 1
# Projections whose output, not input, is split over tensor ranks when it is split.
_COLUMN_PARALLEL = (
    "linear_fc1",
    "in_proj",
    "linear_qkv",
    "linear_q_proj",
    "_up_proj",
    "_down_proj",
    "eh_proj",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """One logical matrix.

    Args:
        name: Its name in the whole model, the same on every rank and in every layout.
        parameter: What its parameter is, as this rank holds it.
        part: Which rows of the parameter are its own on this rank.
        weight: The parameter, `[rows, columns]` of this rank.
        shape: `[out, in]` of the whole matrix.
        split: Dimension that is split over `group`: 0 by rows, 1 by columns; None if whole.
        group: Ranks that share it; None if this rank has all of it.
    """

    name: str
    parameter: Parameter
    part: Part
    weight: nn.Parameter
    shape: tuple[int, int]
    split: int | None = None
    group: Any = None

    def read(self, source: Tensor | None = None) -> Tensor:
        """Return this rank's share in fp32, `[rows, columns]`, of the weight or of a like tensor.

        The result is a copy.
        """
        whole = self.weight.detach() if source is None else source.view(self.weight.shape)
        values = whole.new_empty(self.part.height, whole.size(1), dtype=torch.float32)
        at = 0
        for begin, end in self.part.rows:
            values[at : at + end - begin] = whole[begin:end]
            at += end - begin
        return values

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set this rank's share of the weight from `values` `[rows, columns]`."""
        at = 0
        for begin, end in self.part.rows:
            self.weight.data[begin:end].copy_(values[at : at + end - begin])
            at += end - begin

    def mask(self, rows: Tensor | None = None) -> Tensor:
        """Return `[rows of the parameter, 1]`, true on the matrix's rows.

        Args:
            rows: `[rows of the matrix]` truths that choose among them; all if not given.
        """
        chosen = torch.zeros(self.weight.size(0), 1, dtype=torch.bool, device=self.weight.device)
        at = 0
        for begin, end in self.part.rows:
            chosen[begin:end] = True if rows is None else rows[at : at + end - begin, None]
            at += end - begin
        return chosen

    def reduce(self, values: Tensor) -> Tensor:
        """Sum `values` over the ranks that share the matrix, in place, and return them."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values

    @property
    def is_reported_here(self) -> bool:
        """Whether this rank speaks for the matrix: one of those that hold or share it does."""
        routed = self.parameter.expert is not None
        copy = (
            parallel_state.get_expert_data_parallel_rank()
            if routed
            else parallel_state.get_data_parallel_rank(with_context_parallel=True)
        )
        share = (
            parallel_state.get_expert_tensor_parallel_rank()
            if routed
            else parallel_state.get_tensor_model_parallel_rank()
        )
        return copy == 0 and share == 0


def hybrid_models(modules: Any) -> list[nn.Module]:
    """Return Megatron's models inside a strategy's, a module's or a list's wrappers.

    Args:
        modules: NeMo's `MegatronParallel`, a wrapped or bare model, or several.
    """
    listed = modules if isinstance(modules, (list, tuple, nn.ModuleList)) else [modules]
    return [_unwrapped(module) for module in listed]


def _unwrapped(module: Any) -> nn.Module:
    while not (hasattr(module, "decoder") and "decoder" in module._modules):
        module = module.module
    inner: nn.Module = module
    return inner


def parameters_of(model: nn.Module) -> Iterator[tuple[Parameter, nn.Parameter]]:
    """Yield what each parameter of this rank's stage is, and the parameter.

    Raises:
        RecipeError: If no rule says what a parameter is.
    """
    config: Any = model.config
    shape, features = shape_of(config)
    first = _first_layer(model)
    for name, weight in model.named_parameters():
        routed = ".mlp.experts." in name
        ranks, rank = (_expert_tensor_ranks() if routed else _tensor_ranks())[:2]
        yield (
            classify(
                name,
                tuple(weight.shape),
                layers=config.layers,
                model=shape,
                mamba=features.mamba,
                tensor_ranks=ranks,
                tensor_rank=rank,
                first_layer=first,
                first_expert=_first_expert(config),
            ),
            weight,
        )


def matrices_of(models: Sequence[nn.Module], selection: Selection) -> list[Matrix]:
    """Return the selected matrices of this rank, in an order that ranks sharing one agree on.

    Frozen parameters are left out.

    Raises:
        RecipeError: If no rule says what a parameter is.
    """
    return [
        _matrix(parameter, part, weight)
        for model in models
        for parameter, weight in parameters_of(model)
        if weight.requires_grad and parameter.kind.is_matrix
        for part in selection.parts(parameter)
    ]


def check_selection(models: Sequence[nn.Module], selection: Selection, found: int) -> None:
    """Refuse a selection that is empty on every rank, or names a layer that no rank has.

    Collective over all ranks.

    Raises:
        RecipeError: In either case.
    """
    total = torch.tensor([found])
    if torch.distributed.is_initialized():
        total = total.to(next(models[0].parameters()).device)
        torch.distributed.all_reduce(total)
    config: Any = models[0].config
    selection.check(config.layers, int(total))


def _matrix(parameter: Parameter, part: Part, weight: nn.Parameter) -> Matrix:
    routed = parameter.expert is not None
    ranks, rank, group = _expert_tensor_ranks() if routed else _tensor_ranks()
    whole = ranks == 1 or not (routed or getattr(weight, "tensor_model_parallel", False))
    module = parameter.name.rpartition(".")[0]
    split = ROWS if module.endswith(_COLUMN_PARALLEL) else COLUMNS
    height, width = part.height, weight.size(1)
    if not whole and split == COLUMNS:
        width *= ranks
    if not whole and split == ROWS:
        height = _whole_height(parameter, part, ranks, rank)
    return Matrix(
        name=parameter.part_name(part),
        parameter=parameter,
        part=part,
        weight=weight,
        shape=(height, width),
        split=None if whole else split,
        group=None if whole else group,
    )


def _whole_height(parameter: Parameter, part: Part, ranks: int, rank: int) -> int:
    """Return the rows of a part over all ranks that share it."""
    if "kv_down_proj" not in parameter.name:
        return part.height * ranks
    # Stacked first and split afterwards: what this rank lacks is on the others.
    total = torch.tensor([part.height], device=_device())
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return int(total)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tensor_ranks() -> tuple[int, int, Any]:
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return size, rank, parallel_state.get_tensor_model_parallel_group()


def _expert_tensor_ranks() -> tuple[int, int, Any]:
    size = parallel_state.get_expert_tensor_parallel_world_size()
    rank = parallel_state.get_expert_tensor_parallel_rank()
    return size, rank, parallel_state.get_expert_tensor_parallel_group()


def _first_layer(model: Any) -> int:
    layers = model.decoder.layers
    return int(layers[0].layer_number) - 1 if len(layers) else 0


def _first_expert(config: Any) -> int:
    if not config.num_moe_experts:
        return 0
    size = parallel_state.get_expert_model_parallel_world_size()
    return int(parallel_state.get_expert_model_parallel_rank() * (config.num_moe_experts // size))
