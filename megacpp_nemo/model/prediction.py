"""Multi-token prediction (MTP, arXiv 2412.19437) for hybrid models: the depths themselves.

- `prediction_spec`: the spec of the depths of a configuration.
- `PredictionBlock`: Megatron's chain of depths.
- `PredictionDepth`: one depth, whose layers are a small hybrid stack.
- `DepthLosses`, `reduced_losses`: each depth's loss of a training step, to be logged.

Depth d joins the hidden state of depth d - 1 at token t with the embedding of token t + d, and
predicts token t + 1 + d. Megatron 0.16 has such depths for its GPT models only, of one
transformer layer each.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megacpp_nemo.contract.pattern import LayerPattern
from megacpp_nemo.model.backend import Backend
from megacpp_nemo.model.experts import without_fp8
from megacpp_nemo.model.stack import HybridStack, HybridStackSubmodules


def prediction_spec(
    config: Any, backend: Backend, layers: HybridStackSubmodules
) -> MultiTokenPredictionBlockSubmodules:
    """Return the spec of a configuration's prediction depths.

    Args:
        config: Hybrid model configuration; `mtp_num_layers` depths of `mtp_pattern` each.
        backend: What norms and the joining projection are built from.
        layers: Layer specs by family.
    """
    depth = ModuleSpec(
        module=PredictionDepth,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.provider.column_parallel_linear(),
            transformer_layer=ModuleSpec(
                module=PredictionStack,
                params={"pattern": LayerPattern.parse(config.mtp_pattern)},
                submodules=layers,
            ),
            layer_norm=backend.norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[depth] * (config.mtp_num_layers or 0))


class PredictionStack(HybridStack):
    """The layers of one prediction depth.

    Args:
        config: Megatron configuration of the model.
        submodules: Layer specs by family.
        pattern: Families of the layers.
        layer_number: 1-based number that all of them have. Megatron keeps the load-balancing
            loss of a layer by its number, and has one place for each depth.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self,
        config: Any,
        submodules: HybridStackSubmodules,
        pattern: LayerPattern,
        layer_number: int,
        pg_collection: Any = None,
    ) -> None:
        MegatronModule.__init__(self, config=without_fp8(config))
        self.residual_in_fp32, self.post_layer_norm = False, False
        self.pre_process = self.post_process = True
        self.pp_group, self.tp_group = pg_collection.pp, pg_collection.tp
        self.layers = nn.ModuleList(
            self._layer(submodules, family, layer_number, layer_number - 1, config, pg_collection)
            for family in pattern
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the layers' sharded state, each by its place in the depth."""
        layers: Any = self.layers
        return {
            key: value
            for place, layer in enumerate(layers)
            for key, value in layer.sharded_state_dict(
                f"{prefix}layers.{place}.", (), metadata
            ).items()
        }


class PredictionDepth(MultiTokenPredictionLayer):
    """One prediction depth: Megatron's, around a hybrid stack.

    Args:
        config: Megatron configuration of the model.
        submodules: Specs of the norms, the projection and the stack.
        layer_number: 1-based depth.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self,
        config: Any,
        submodules: MultiTokenPredictionLayerSubmodules,
        layer_number: int = 1,
        pg_collection: Any = None,
    ) -> None:
        # Upstream's constructor takes a layer with attention; its ancestor's is called.
        MegatronModule.__init__(self, config=without_fp8(config))
        self.layer_number = layer_number
        self.sequence_parallel = config.sequence_parallel
        self.cp_group, self.tp_group = pg_collection.cp, pg_collection.tp
        for name, norm in (("enorm", submodules.enorm), ("hnorm", submodules.hnorm)):
            setattr(self, name, self._norm(norm))
        self.eh_proj = build_module(
            submodules.eh_proj,
            2 * config.hidden_size,
            config.hidden_size,
            config=self.config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        self.mtp_model_layer = build_module(
            submodules.transformer_layer,
            config=config,
            layer_number=config.num_layers + layer_number,
            pg_collection=pg_collection,
        )
        self.final_layernorm = self._norm(submodules.layer_norm)

    def _norm(self, spec: Any) -> nn.Module:
        size, eps = self.config.hidden_size, self.config.layernorm_epsilon
        return build_module(spec, config=self.config, hidden_size=size, eps=eps)

    @property
    def transformer_layer(self) -> nn.Module:
        """The stack, by the name at which Megatron 0.16 numbers micro-batches.

        Checkpoints have later releases' name, `mtp_model_layer`.
        """
        return self.mtp_model_layer

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        embedding: Any = None,
        **_: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states `[seq, batch, hidden]`, and rolled tokens and positions.

        Those are what was given, `[batch, seq]`, rolled by one for the next depth. Tokens are
        rolled over the whole row, as Megatron rolls rows that are not packed in its own (`thd`)
        way; document boundaries reach the layers only.
        """
        input_ids, position_ids, embedded, hidden_states = self._get_embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            embedding=partial(embedding, ahead=self.layer_number),
            hidden_states=hidden_states,
        )
        with get_cuda_rng_tracker().fork() if self.sequence_parallel else nullcontext():
            hidden_states = self.mtp_model_layer(
                self._concat_embeddings(hidden_states, embedded),
                attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
            )
        return self._postprocess(hidden_states), input_ids, position_ids


class PredictionBlock(MultiTokenPredictionBlock):
    """Megatron's chain of depths, built out of FP8: only expert layers enter it."""

    def _build_layers(self, pg_collection: Any) -> None:
        self.layers = nn.ModuleList(
            build_module(spec, config=self.config, layer_number=depth, pg_collection=pg_collection)
            for depth, spec in enumerate(self.submodules.layer_specs, 1)
        )


class DepthLosses:
    """Each depth's mean loss over the micro-batches of a step, in nats per token."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, losses: Tensor) -> None:
        """Count a micro-batch's losses `[depth]`."""
        self._sum = losses if self._sum is None else self._sum + losses
        self._count += 1

    def take(self) -> Tensor | None:
        """Return the means `[depth]` and start anew; None if nothing was counted."""
        mean = None if self._sum is None else self._sum / self._count
        self._sum, self._count = None, 0
        return mean


def reduced_losses(model: nn.Module) -> Tensor:
    """Return the losses `[depth]` of the step just run, over all data, on every rank.

    Collective over data-parallel and pipeline ranks.

    Args:
        model: One pipeline stage of a model with depths, wrapped or bare.
    """
    stage: Any = get_attr_wrapped_model(model, "depth_losses", return_model_obj=True)
    own = stage.depth_losses.take()
    device = next(stage.parameters()).device
    losses = torch.zeros(stage.config.mtp_num_layers, device=device) if own is None else own
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(losses, group=data)
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(losses, last, group=stages)
    return losses / data.size()
