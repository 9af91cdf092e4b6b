"""The native M block: the portable mixer against a loop from the equations, and upstream's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.ssm import mamba_mixer as upstream
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model.mamba import FusedMambaMixer
from megacpp_nemo.model.norms import GatedRMSNorm
from megacpp_nemo.model.specs import Backend, hybrid_stack_spec
from tests.model.building import (
    assert_near,
    boundaries_of,
    build_mixer,
    groups,
    shaken,
    small_config,
)
from tests.model.building import mixer_inputs as inputs

pytestmark = pytest.mark.usefixtures("one_process")


def reference(
    mixer: nn.Module, hidden: Tensor, rows: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the block's output `[seq, batch, hidden]` and its leaves by name, all in fp64.

    `rows` holds the lengths of the documents of each row.
    """
    own = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    own["input"] = hidden.detach().double().requires_grad_()
    seq, batch, _ = hidden.shape
    outputs = [[torch.empty(0)] * batch for _ in range(seq)]
    for b, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            document = own["input"][start : start + length, b]
            for t, y in enumerate(document_reference(mixer.config, own, document)):
                outputs[start + t][b] = y
            start += length
    return torch.stack([torch.stack(row) for row in outputs]), own


def document_reference(config, own: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    heads, groups_, N = config.mamba_num_heads, config.mamba_num_groups, config.mamba_state_dim
    P, width = config.mamba_head_dim, config.mamba_conv_width
    inner = heads * P
    z, channels, dt = (x @ own["in_proj.weight"].T).split(
        [inner, inner + 2 * groups_ * N, heads], dim=1
    )
    taps, states, outputs = own["conv1d.weight"][:, 0], {}, []
    for t in range(len(x)):
        mixed = own["conv1d.bias"]
        for back in range(min(width, t + 1)):
            mixed = mixed + taps[:, width - 1 - back] * channels[t - back]
        mixed = mixed / (1 + torch.exp(-mixed))
        inputs_t, B, C = mixed.split([inner, groups_ * N, groups_ * N])
        y = []
        for h in range(heads):
            group = slice(h // (heads // groups_) * N, (h // (heads // groups_) + 1) * N)
            value = inputs_t[h * P : (h + 1) * P]
            step = torch.log(1 + torch.exp(dt[t, h] + own["dt_bias"][h]))
            decay = torch.exp(-step * torch.exp(own["A_log"][h]))
            state = states.get(h, torch.zeros(P, N, dtype=torch.float64))
            states[h] = decay * state + step * torch.outer(value, B[group])
            y.append(states[h] @ C[group] + own["D"][h] * value)
        gated = (torch.cat(y) * z[t] / (1 + torch.exp(-z[t]))).view(groups_, -1)
        normal = gated / torch.sqrt((gated**2).mean(1, keepdim=True) + 1e-5)
        outputs.append(own["out_proj.weight"] @ (normal.flatten() * own["norm.weight"]))
    return outputs


LAYOUTS = {
    "odd_length_over_several_chunks": (19, [[19], [19]]),
    "one_token": (1, [[1], [1]]),
    "documents_across_chunks": (19, [[5, 1, 13], [8, 11]]),
    "documents_of_one_token": (4, [[1, 1, 1, 1], [1, 2, 1]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number_of_groups", [1, 2, 4])
def test_the_portable_mixer_and_its_gradients_are_those_of_the_equations(layout, number_of_groups):
    seq, rows = LAYOUTS[layout]
    config = small_config("M", mamba_num_groups=number_of_groups)
    mixer = build_mixer(config, "mamba")
    hidden, weight = inputs(seq)
    whole = all(len(lengths) == 1 for lengths in rows)
    output, bias = mixer(hidden, packed_seq_params=None if whole else boundaries_of(*rows))
    expected, leaves = reference(mixer, hidden, rows)
    assert bias is None
    assert_near(output, expected)
    (output * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for name, parameter in [*mixer.named_parameters(), ("input", hidden)]:
        assert_near(parameter.grad, leaves[name].grad)


def test_a_packed_row_is_its_documents_run_separately():
    mixer = build_mixer(small_config("M"), "mamba")
    hidden, _ = inputs(19, batch=1)
    packed, _ = mixer(hidden, packed_seq_params=boundaries_of([5, 1, 13]))
    apart = torch.cat([mixer(part)[0] for part in hidden.split([5, 1, 13])])
    assert_near(packed, apart)


def test_keeping_the_state_across_documents_ignores_boundaries():
    mixer = build_mixer(small_config("M", reset_state=False), "mamba")
    hidden, _ = inputs(19)
    packed, _ = mixer(hidden, packed_seq_params=boundaries_of([5, 14], [8, 11]))
    assert torch.equal(packed, mixer(hidden)[0])


def test_another_inference_context_than_ours_is_refused():
    mixer = build_mixer(small_config("M"), "mamba").eval()
    with pytest.raises(RuntimeRefusal, match="a context of their own"):
        mixer(torch.zeros(1, 1, 32), inference_context=object())


# --- against Megatron's own mixer -----------------------------------------------------------
#
# Upstream's class needs a CUDA package at two places: the gated norm it subclasses and the
# kernel it calls. Both get a stand-in here with the signature and parameters of the package;
# everything else, its parameters and its checkpoint layout above all, is upstream's code.


class StandInNorm(GatedRMSNorm):
    """`mamba_ssm`'s gated RMSNorm as upstream calls it: one weight, and no gate of its own."""

    def __init__(self, size, eps, group_size, norm_before_gate, device, dtype):
        from types import SimpleNamespace

        super().__init__(
            SimpleNamespace(params_dtype=dtype), size, tp_group=None, group_size=group_size, eps=eps
        )
        assert not norm_before_gate

    def forward(self, x: Tensor) -> Tensor:
        groups_ = x.unflatten(-1, (-1, self.group_size))
        normal = groups_ / torch.sqrt((groups_**2).mean(-1, keepdim=True) + self.eps)
        return normal.flatten(-2) * self.weight


def stand_in_kernel(
    zxbcdt, conv_weight, conv_bias, dt_bias, A, D, *, chunk_size, activation, headdim, ngroups,
    norm_before_gate, seq_idx,
):  # fmt: skip
    """`mamba_split_conv1d_scan_combined` from our operators; it gates, upstream normalizes."""
    import torch.nn.functional as F

    from megacpp_nemo.model.conv import causal_conv1d
    from megacpp_nemo.model.ssd import ssd_sequential

    assert activation == "silu"
    heads, groups_state = len(A), (len(conv_weight) - len(A) * headdim) // 2
    z, xbc, dt = zxbcdt.split([heads * headdim, len(conv_weight), heads], dim=-1)
    xbc = F.silu(causal_conv1d(xbc, conv_weight, conv_bias, document_ids=seq_idx))
    x, b, c = xbc.split([heads * headdim, groups_state, groups_state], dim=-1)
    y, _ = ssd_sequential(
        x.unflatten(-1, (heads, headdim)),
        F.softplus(dt + dt_bias),
        A,
        b.unflatten(-1, (ngroups, -1)),
        c.unflatten(-1, (ngroups, -1)),
        D=D,
        document_ids=seq_idx,
    )
    return y.flatten(-2) * F.silu(z)


@pytest.fixture
def megatrons_mixer(monkeypatch):
    """Return a function that builds Megatron's mixer, in our subclass or as it is."""
    monkeypatch.setattr(upstream, "HAVE_MAMBA_SSM", True)
    monkeypatch.setattr(upstream, "ExtendedRMSNorm", StandInNorm)
    monkeypatch.setattr(
        upstream, "mamba_split_conv1d_scan_combined", stand_in_kernel, raising=False
    )
    monkeypatch.setattr(
        upstream, "_check_mamba_sequence_packing_support", lambda **kwargs: (True, None)
    )

    def build(config, kind=upstream.MambaMixer):
        backend = Backend(transformer_engine=False, mamba="fused")
        spec = hybrid_stack_spec(config, backend).submodules.mamba_layer.submodules.mixer
        assert spec.module is FusedMambaMixer
        mixer = kind(
            config,
            spec.submodules,
            config.hidden_size,
            layer_number=1,
            pg_collection=groups(),
            **spec.params,
        )
        mixer.norm.tp_group = groups().tp
        return mixer

    return build


def checkpoint_layout(mixer: nn.Module) -> dict[str, tuple]:
    """Return every saved tensor's key, with its shape, place and type."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    layout = {}
    for entry in mixer.sharded_state_dict("mixer.").values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            layout[part.key] = (part.global_shape, part.global_offset, getattr(part, "dtype", None))
    return layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_checkpoint_keys_are_those_of_megatrons_mixer(megatrons_mixer, dtype):
    config = small_config("M", params_dtype=dtype, mamba_conv_width=3)
    portable = build_mixer(config, "mamba")
    theirs = megatrons_mixer(config)
    ours = {name: (p.shape, p.dtype) for name, p in portable.named_parameters()}
    assert ours == {name: (p.shape, p.dtype) for name, p in theirs.named_parameters()}
    assert checkpoint_layout(portable) == checkpoint_layout(theirs)
    # The stand-in norm brings its own layout, so its key is checked against the package's name.
    assert "mixer.norm.weight" in checkpoint_layout(portable)


def test_parameters_are_marked_as_split_like_megatrons(megatrons_mixer):
    config = small_config("M")
    theirs = dict(megatrons_mixer(config).named_parameters())
    for name, parameter in build_mixer(config, "mamba").named_parameters():
        assert parameter.tensor_model_parallel == theirs[name].tensor_model_parallel == True, name  # noqa: E712


def test_the_initial_state_parameters_have_megatrons_distribution(megatrons_mixer):
    config = small_config("M", mamba_num_heads=1024, mamba_num_groups=1)
    ours, theirs = build_mixer(config, "mamba", shake=False), megatrons_mixer(config)
    for name, parameter in theirs.named_parameters():
        own = dict(ours.named_parameters())[name]
        assert own.mean().item() == pytest.approx(parameter.mean().item(), abs=0.15), name
        assert own.std().item() == pytest.approx(parameter.std().item(), rel=0.15), name


def test_the_fused_mixer_gives_its_kernel_the_document_boundaries(megatrons_mixer):
    config = small_config("M")
    portable = build_mixer(config, "mamba")
    fused = shaken(megatrons_mixer(config, FusedMambaMixer))
    fused.load_state_dict(portable.state_dict())
    hidden, _ = inputs(19)
    boundaries = boundaries_of([5, 1, 13], [8, 11])
    assert_near(
        fused(hidden, packed_seq_params=boundaries)[0],
        portable(hidden, packed_seq_params=boundaries)[0],
    )
    assert_near(fused(hidden)[0], portable(hidden)[0])


def test_the_fused_mixer_keeps_the_state_where_the_configuration_says_so(megatrons_mixer):
    fused = megatrons_mixer(small_config("M", reset_state=False), FusedMambaMixer)
    hidden, _ = inputs(19)
    packed, _ = fused(hidden, packed_seq_params=boundaries_of([5, 14], [8, 11]))
    assert torch.equal(packed, fused(hidden)[0])
