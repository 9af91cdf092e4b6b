"""Small hybrid models on Megatron's parallel groups, for the tests of this folder."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megacpp_nemo.host.cpu import RUNTIME
from megacpp_nemo.model.config import HybridConfig
from megacpp_nemo.model.documents import DocumentBoundaries
from megacpp_nemo.model.specs import hybrid_stack_spec

VOCABULARY = 64
TOKENIZER = SimpleNamespace(vocab_size=VOCABULARY)


def small_config(pattern: str = "AEMR", **changes: Any) -> HybridConfig:
    """Return a configuration of a model that takes milliseconds, in fp32."""
    settings: dict[str, Any] = {
        "hybrid_override_pattern": pattern,
        "num_layers": len(pattern.replace("|", "")),
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 12,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        # Several heads per group: the norm over a group makes the gradient by the skip D of its
        # only head nearly cancel, and what is left has the rounding of what was not.
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
        "mamba_state_dim": 8,
        "mamba_num_groups": 2,
        "mamba_chunk_size": 8,
        "m2rnn_num_heads": 4,
        "m2rnn_key_dim": 6,
        "m2rnn_value_dim": 4,
        "seq_length": 16,
        "reset_state": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "cross_entropy_loss_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "make_vocab_size_divisible_by": 16,
    }
    return HybridConfig(**{**settings, **changes})


@contextlib.contextmanager
def megatron(**sizes: int) -> Iterator[None]:
    """Make Megatron's parallel groups of these sizes on a CPU, and undo it all afterwards.

    A process of `tests.support.processes` finds its peers over gloo; any other stands alone.
    """
    threads, alone = torch.get_num_threads(), "RANK" not in os.environ
    environment = dict(os.environ)
    if alone:
        # Groups with threads of their own must not be left to a process forked later, which
        # would wait for ever to destroy them; and Megatron keeps some in its own modules.
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    else:
        torch.distributed.init_process_group("gloo")
    RUNTIME.install()
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    try:
        # Compiling the router takes seconds, in every process anew.
        with torch.compiler.set_stance("force_eager"):
            parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=not alone)
            tensor_parallel.model_parallel_cuda_manual_seed(1234)
            yield
    finally:
        # What Megatron keeps of a run outside the state it destroys.
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        RUNTIME.uninstall()
        torch.set_num_threads(threads)
        # A model writes its attention kernels there, and another kind of model refuses them.
        os.environ.clear()
        os.environ.update(environment)


def build_model(config: HybridConfig, *, shake: bool = True) -> nn.Module:
    """Return this pipeline stage of the model; shaken, no parameter is at a special value."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    model = config.configure_model(TOKENIZER)
    return shaken(model) if shake else model


def build_layer(config: HybridConfig, family: str) -> nn.Module:
    """Return one layer of a family, such as `recurrent`; the same for the same configuration."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    spec = getattr(hybrid_stack_spec(config).submodules, f"{family}_layer")
    return build_module(spec, config=config, layer_number=1, pg_collection=groups())


def build_mixer(config: HybridConfig, family: str, *, shake: bool = True) -> nn.Module:
    """Return the mixer of a `mamba` or `recurrent` layer."""
    mixer = build_layer(config, family).mixer
    return shaken(mixer) if shake else mixer


def groups() -> ProcessGroupCollection:
    """Return Megatron's process groups as its layers take them."""
    return ProcessGroupCollection.use_mpu_process_groups()


def shaken(module: nn.Module) -> nn.Module:
    """Return the module with noise on its parameters, the same on every copy of one.

    Ones, zeros and identities would hide a parameter that is swapped, dropped or applied twice.
    """
    for name, parameter in module.named_parameters():
        part = 0
        if not getattr(parameter, "allreduce", True):
            part = torch.distributed.get_rank()
        elif getattr(parameter, "tensor_model_parallel", False):
            part = parallel_state.get_tensor_model_parallel_rank()
        own = zlib.crc32(f"{name} {part}".encode())
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(own))
        # Projections stay small, so that nothing saturates.
        scale = 0.5 / parameter.size(1) ** 0.5 if parameter.dim() == 2 else 0.2
        parameter.data.add_(noise * scale)
    return module


def random_tokens(batch: int, seq: int, seed: int = 0) -> Tensor:
    """Return tokens `[batch, seq]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, seq), generator=draw)


def boundaries_of(*rows: list[int]) -> DocumentBoundaries:
    """Return boundaries from the lengths of the documents of each row."""
    return DocumentBoundaries.from_ids(torch.tensor([ids_of(row) for row in rows]))


def ids_of(lengths: list[int]) -> list[int]:
    """Return document ids of one row; they change at boundaries, and one comes back."""
    return [number % 2 for number, length in enumerate(lengths) for _ in range(length)]


def run_model(
    model: nn.Module,
    tokens: Tensor,
    boundaries: DocumentBoundaries | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return logits `[batch, seq, vocabulary]`, or losses `[batch, seq]` with labels."""
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    return model(tokens, positions, None, labels=labels, packed_seq_params=boundaries)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that no entry differs by more than `tolerance` of the largest expected one."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item()
    worst = (actual.to(expected.dtype) - expected).abs().max().item()
    assert worst <= tolerance * scale, f"differs by {worst / scale:.1e} of the largest entry"


def mixer_inputs(seq: int, batch: int = 2, hidden: int = 32) -> tuple[Tensor, Tensor]:
    """Return hidden states and a weight for each output, which makes the loss a sum."""
    draw = torch.Generator().manual_seed(seq)
    states = torch.randn((seq, batch, hidden), generator=draw).requires_grad_()
    return states, torch.randn((seq, batch, hidden), generator=draw)
