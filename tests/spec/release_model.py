"""Small models of Megatron's own class on a spec of this package, for any release.

Imports neither NeMo nor a test helper that does: it also runs as a script, with another
release of Megatron-LM first on its path, and prints what it built as one line of JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch
from megatron.core import __version__ as core_version
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.spec_utils import import_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from megacpp_nemo.host.cpu import RUNTIME
from megacpp_nemo.lowering.spec_name import SPEC_MODULE
from megacpp_nemo.spec.upstream import model_class

VOCABULARY, LENGTH = 64, 16
RECURRENT = (
    "recurrent.num_heads=4,recurrent.num_qk_heads=1,recurrent.key_dim=6,"
    "recurrent.value_dim=4,recurrent.conv_width=4,recurrent.state_gradient_clip=1.0"
)
SPARSE = (
    "sparse_attention.indexer_num_heads=2,sparse_attention.indexer_head_dim=16,"
    "sparse_attention.indexer_topk=4,sparse_attention.indexer_loss_coeff=0.01"
)
AUTHOR_MAMBA = (
    "author_mamba.num_heads=4,author_mamba.head_dim=6,author_mamba.state_dim=8,"
    "author_mamba.mimo_rank=2,author_mamba.chunk_size=4"
)
_MARK = "built: "


def small_config(num_layers: int, **changes: Any) -> MLATransformerConfig:
    """Return Megatron's configuration of a model that takes milliseconds, in fp32."""
    settings: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "multi_latent_attention": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 12,
        "rope_type": "rope",
        "apply_rope_fusion": False,
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
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
        "mamba_state_dim": 8,
        "mamba_num_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
    }
    return MLATransformerConfig(**{**settings, **changes})


def start(stage: int = 0, stages: int = 1) -> None:
    """Make Megatron's groups on a CPU, without a network: this is a pipeline stage of several."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=stage, world_size=stages)
    RUNTIME.install()
    logging.disable(logging.WARNING)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=stages, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def build(
    pattern: str, name: str, *, pre_process: bool = True, post_process: bool = True, **changes: Any
) -> torch.nn.Module:
    """Return the release's hybrid model on a spec of this package, as its entry script does.

    Args:
        pattern: Pattern in the release's symbols.
        name: Name of the spec.
        pre_process: Whether this is the first stage.
        post_process: Whether this is the last stage.
        changes: Changed settings of the configuration.
    """
    main = pattern.partition("/")[0].replace("|", "")
    spec = import_module((SPEC_MODULE, name))
    model = model_class()
    later = model.__name__ == "HybridModel"
    arguments: dict[str, Any] = {"hybrid_stack_spec" if later else "mamba_stack_spec": spec}
    taken = model.__init__.__code__.co_varnames
    place = "hybrid_layer_pattern" if "hybrid_layer_pattern" in taken else "hybrid_override_pattern"
    return model(
        config=small_config(len(main), **changes),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="none",
        pre_process=pre_process,
        post_process=post_process,
        **arguments,
        **{place: pattern},
    )


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Return the mean loss of a forward pass."""
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).expand_as(tokens)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    loss: torch.Tensor = model(tokens, positions, mask, labels=tokens).mean()
    return loss


def run(model: torch.nn.Module) -> dict[str, Any]:
    """Return the mean loss of a forward pass, and the parameters its backward pass missed."""
    loss = loss_of(model)
    loss.backward()
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return {"loss": loss.item(), "missed": missed}


def described(stack: torch.nn.Module) -> list[dict[str, Any]]:
    """Return number, class and inner classes of every layer of a stack."""
    parts = ("self_attention", "mlp", "mixer")
    return [
        {
            "number": layer.layer_number,
            "layer": type(layer).__name__,
            "inside": [
                type(getattr(layer, part)).__name__
                for part in parts
                if type(getattr(layer, part, None)).__name__ not in ("NoneType", "IdentityOp")
            ],
        }
        for layer in stack.layers
    ]


def report(
    pattern: str,
    name: str,
    forward: bool = True,
    stage: int = 0,
    stages: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """Return what is built for a pattern and a name, and how it runs."""
    start(stage, stages)
    if stages > 1:
        changes.update(pipeline_model_parallel_size=stages)
        forward = False
    model = build(
        pattern, name, pre_process=stage == 0, post_process=stage == stages - 1, **changes
    )
    found: dict[str, Any] = {"core": core_version, "layers": described(model.decoder)}
    if getattr(model, "mtp_process", False):
        found["mtp"] = [described(depth.mtp_model_layer) for depth in model.mtp.layers]
    return {**found, **(run(model) if forward else {})}


def read(output: str) -> dict[str, Any]:
    """Return the report in the output of this script."""
    (line,) = [line for line in output.splitlines() if line.startswith(_MARK)]
    found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    return found


if __name__ == "__main__":
    print(_MARK + json.dumps(report(**json.loads(sys.argv[1]))))
