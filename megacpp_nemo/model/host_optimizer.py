"""The optimizer of n-gram tables in host memory, beside Megatron's own.

- `with_host_tables`: Megatron's optimizer, and one more for a model's host tables.
- `refuse_host_tables`: settings that such tables cannot be trained with.

Rows that a step touched come with their gradients from all data-parallel ranks; the update is
AdamW over the whole table, as on the device, where momentum and weight decay move rows that were
not touched. Every rank makes the same update of its own copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.optimizer import _get_param_groups
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.initial import parameter_device
from megacpp_nemo.model.ngram_table import HOST, HostNgramTable


def with_host_tables(
    optimizer: Any, config: Any, model_chunks: Sequence[nn.Module], overrides: Any = None
) -> Any:
    """Return Megatron's optimizer, and with it one for the model's tables in host memory.

    Args:
        optimizer: Megatron's, for everything else.
        config: Megatron's `OptimizerConfig`.
        model_chunks: What the optimizer was built for.
        overrides: Its `config_overrides`, by which learning rate and weight decay differ.

    Raises:
        RuntimeRefusal: If the configuration is one that such tables cannot be trained with.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    # Whoever asks NeMo's adapter for the optimizer has it already.
    trained = [part.table for part in chained if isinstance(part, HostTableOptimizer)]
    found = [
        (name, module)
        for chunk in model_chunks
        for name, module in chunk.named_modules()
        if isinstance(module, HostNgramTable) and not any(module is each for each in trained)
    ]
    if not found:
        return optimizer
    _refuse_optimizer(config)
    tables = [
        HostTableOptimizer(table, f"{name}.weight", config, overrides) for name, table in found
    ]
    return ChainedOptimizer([*chained, *tables])


class HostTableOptimizer(FP32Optimizer):
    """AdamW of one table in host memory, as a part of Megatron's chained optimizer.

    Megatron measures and clips gradients on the device. One number stands there for the table's
    gradient: its norm. Whatever clipping does to that, is then done to the gradient.

    Args:
        table: The table.
        name: Of its weight, which overrides may tell it by.
        config: Megatron's `OptimizerConfig`.
        overrides: Its `config_overrides`.
    """

    def __init__(self, table: HostNgramTable, name: str, config: Any, overrides: Any) -> None:
        self.table = table
        kind = torch.optim.AdamW if config.decoupled_weight_decay else torch.optim.Adam
        inner = kind(
            _groups(table.weight, name, config, overrides),
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        super().__init__(inner, config, _first_state)
        self.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
        self._norm = nn.Parameter(torch.zeros(1, device=parameter_device()))
        self._norm.tensor_model_parallel = True  # type: ignore[attr-defined]
        self._measured = 0.0
        self._touched: Tensor | None = None
        table.trained = True

    def get_parameters(self) -> list[nn.Parameter]:
        """Return what Megatron measures and clips: the norm, in the place of the gradient."""
        return [self._norm]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that came back."""
        self.table.take_gradients()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Put the gradient's mean over data-parallel ranks in host memory, and measure it."""
        weight = self.table.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        elif self._touched is not None:
            weight.grad.index_fill_(0, self._touched, 0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        rows, gradients = _gathered(*self.table.take_gradients(), group)
        rows, places = rows.unique(return_inverse=True)
        summed = torch.zeros(len(rows), weight.size(1)).index_add_(0, places, gradients)
        summed /= group.size()
        self._touched = rows
        weight.grad.index_copy_(0, rows, summed)
        self._measured = summed.norm().item()
        self._norm.grad = torch.full_like(self._norm, self._measured)
        return False

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Clip the gradient as its norm was clipped, and update the table."""
        assert self._norm.grad is not None
        assert self._touched is not None
        gradient = self.table.weight.grad
        assert gradient is not None
        clipped = self._norm.grad.item()
        if clipped != self._measured:
            part = gradient.index_select(0, self._touched) * (clipped / self._measured)
            gradient.index_copy_(0, self._touched, part)
        self.optimizer.step()
        return True

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Return the moments as Megatron saves them, split and replicated as the table is."""
        if is_loading:
            self.init_state_fn(self.optimizer, self.config)
        state: dict[str, Any] = self.state_dict()
        step = self._extract_common_per_param_step(state)
        shards = get_param_id_to_sharded_param_map(model_sharded_state_dict, [self.table.weight])
        optim_state_to_sharding_state(state, shards, exclude_keys="step")
        if step:
            state["state"]["common_step"] = step
        return state


def refuse_host_tables(config: Any) -> None:
    """Refuse n-gram tables in host memory where they would not be trained right.

    Args:
        config: Hybrid model configuration.

    Raises:
        RuntimeRefusal: Naming every such setting.
    """
    if not config.ngram_hash or config.ngram_placement != HOST:
        return
    _refuse(config, {"calculate_per_token_loss": False, "fp16": False})


def _refuse_optimizer(config: Any) -> None:
    settings = {
        "optimizer": "adam",
        "fp16": False,
        "optimizer_cpu_offload": False,
        "use_precision_aware_optimizer": False,
        "overlap_param_gather_with_optimizer_step": False,
    }
    _refuse(config, settings)


def _refuse(config: Any, settings: dict[str, Any]) -> None:
    wrong = {
        name: allowed for name, allowed in settings.items() if getattr(config, name) != allowed
    }
    if wrong:
        allowed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise RuntimeRefusal(
            "N-gram tables in host memory are not trained with these settings",
            given=", ".join(f"{name}={getattr(config, name)!r}" for name in wrong),
            allowed=allowed,
            hint=f"{allowed}, or ngram_placement='device'",
        )


def _groups(weight: Tensor, name: str, config: Any, overrides: Any) -> list[dict[str, Any]]:
    """Return the parameter groups that Megatron would make for a weight of this name."""
    # Of the same shape, by which Megatron leaves vectors out of weight decay.
    stand_in = nn.Parameter(torch.empty(weight.shape, device="meta"))
    alone = SimpleNamespace(named_parameters=lambda: [(name, stand_in)])
    groups = _get_param_groups([alone], config, overrides)
    return [{**group, "params": [weight]} for group in groups if group["params"]]


def _first_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Make the state that a checkpoint is read into."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not optimizer.state[weight]:
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[weight][moment] = torch.zeros_like(weight)


def _gathered(rows: Tensor, gradients: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return rows `[n]` and gradients `[n, part]` of all ranks of a group, in host memory.

    Ranks bring different numbers of rows: each sends as many as the one with most.
    """
    if group.size() == 1:
        return rows, gradients.to(rows.device)
    here = gradients.device
    counts = torch.zeros(group.size(), dtype=torch.long, device=here)
    counts[group.rank()] = len(rows)
    torch.distributed.all_reduce(counts, group=group)
    most = int(counts.max())
    found = []
    for mine in (rows.to(here), gradients):
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        every = [torch.empty_like(padded) for _ in range(group.size())]
        torch.distributed.all_gather(every, padded, group=group)
        parts = [part[:count] for part, count in zip(every, counts.tolist(), strict=True)]
        found.append(torch.cat(parts).to(rows.device))
    return found[0], found[1]
