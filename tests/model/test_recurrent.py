"""The R block against a loop written here from its equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.model.building import assert_near, boundaries_of, build_mixer, small_config

pytestmark = pytest.mark.usefixtures("one_process")

UNCLIPPED = 1e9


def reference(
    mixer: nn.Module, hidden: Tensor, rows: list[list[int]], clip: float = UNCLIPPED
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the block's output `[seq, batch, hidden]` and its leaves by name, all in fp64.

    `rows` holds the lengths of the documents of each row.
    """
    config = mixer.config
    own = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    own["input"] = hidden.detach().double().requires_grad_()
    seq, batch, _ = hidden.shape
    outputs = [[torch.empty(0)] * batch for _ in range(seq)]
    for b, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            document = own["input"][start : start + length, b]
            for t, y in enumerate(document_reference(config, own, document, clip)):
                outputs[start + t][b] = y
            start += length
    return torch.stack([torch.stack(row) for row in outputs]), own


def document_reference(config, own: dict[str, Tensor], x: Tensor, clip: float) -> list[Tensor]:
    heads, shared = config.m2rnn_num_heads, config.m2rnn_num_qk_heads
    K, V, width = config.m2rnn_key_dim, config.m2rnn_value_dim, config.m2rnn_conv_width
    sizes = [shared * K, shared * K, heads * V, heads * V, heads]
    q, k, v, g, f = (x @ own["in_proj.weight"].T).split(sizes, dim=1)
    channels, taps = torch.cat([q, k, v], dim=1), own["conv1d.weight"][:, 0]
    states = [torch.zeros(K, V, dtype=torch.float64) for _ in range(heads)]
    outputs = []
    for t in range(len(x)):
        mixed = own["conv1d.bias"]
        for back in range(min(width, t + 1)):
            mixed = mixed + taps[:, width - 1 - back] * channels[t - back]
        mixed = mixed / (1 + torch.exp(-mixed))
        q_t, k_t, v_t = mixed.split(sizes[:3])
        y = []
        for h in range(heads):
            own_qk = slice(h // (heads // shared) * K, (h // (heads // shared) + 1) * K)
            value = v_t[h * V : (h + 1) * V]
            step = torch.log(1 + torch.exp(f[t, h] + own["dt_bias"][h]))
            forget = torch.exp(-torch.exp(own["A_log"][h]) * step)
            candidate = torch.tanh(
                states[h] @ own["transition"][h] + torch.outer(k_t[own_qk], value)
            )
            states[h] = forget * states[h] + (1 - forget) * candidate
            states[h].register_hook(lambda grad: grad.clamp(-clip, clip))
            y.append(q_t[own_qk] @ states[h] + own["D"][h] * value)
        gated = torch.cat(y) * g[t] / (1 + torch.exp(-g[t]))
        normal = gated / torch.sqrt((gated**2).mean() + 1e-5) * own["norm.weight"]
        outputs.append(own["out_proj.weight"] @ normal)
    return outputs


def inputs(mixer: nn.Module, seq: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Return hidden states and a weight for each output, which makes the loss a sum."""
    draw = torch.Generator().manual_seed(seq)
    shape = (seq, batch, mixer.config.hidden_size)
    hidden = torch.randn(shape, generator=draw).requires_grad_()
    return hidden, torch.randn(shape, generator=draw)


def gradients(mixer: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in mixer.named_parameters()}
    return {**found, "input": hidden.grad}


LAYOUTS = {
    "odd_length": (13, [[13], [13]]),
    "one_token": (1, [[1], [1]]),
    "shorter_than_the_convolution": (3, [[3], [3]]),
    "documents": (13, [[5, 1, 7], [2, 11]]),
    "documents_of_one_token": (4, [[1, 1, 1, 1], [1, 2, 1]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared_heads", [1, 2])
def test_the_mixer_and_its_gradients_are_those_of_the_equations(layout, shared_heads):
    seq, rows = LAYOUTS[layout]
    config = small_config("R", m2rnn_num_qk_heads=shared_heads, m2rnn_state_gradient_clip=UNCLIPPED)
    mixer = build_mixer(config, "recurrent")
    hidden, weight = inputs(mixer, seq)
    whole = all(len(lengths) == 1 for lengths in rows)
    output, bias = mixer(hidden, packed_seq_params=None if whole else boundaries_of(*rows))
    expected, leaves = reference(mixer, hidden, rows)
    assert bias is None
    assert_near(output, expected)
    (output * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for name, grad in gradients(mixer, hidden).items():
        # A sequence of one token never reads the transition: its gradient is exactly zero.
        assert_near(grad, leaves[name].grad)


def test_the_state_gradient_is_clipped_elementwise_at_every_token():
    mixer = build_mixer(small_config("R", m2rnn_state_gradient_clip=0.5), "recurrent")
    hidden, weight = inputs(mixer, 13)
    rows = [[13], [13]]
    (mixer(hidden)[0] * weight).sum().backward()
    clipped, leaves = reference(mixer, hidden, rows, clip=0.5)
    (clipped * weight.double()).sum().backward()
    free, free_leaves = reference(mixer, hidden, rows)
    (free * weight.double()).sum().backward()
    for name, grad in gradients(mixer, hidden).items():
        assert_near(grad, leaves[name].grad)
    changed = (leaves["transition"].grad - free_leaves["transition"].grad).abs().max()
    assert changed > 0.1 * free_leaves["transition"].grad.abs().max()


def test_keeping_the_state_across_documents_ignores_boundaries():
    mixer = build_mixer(small_config("R", reset_state=False), "recurrent")
    hidden, _ = inputs(mixer, 13)
    packed, _ = mixer(hidden, packed_seq_params=boundaries_of([5, 8], [3, 10]))
    whole, _ = mixer(hidden)
    assert torch.equal(packed, whole)


def test_the_state_starts_as_the_paper_says():
    config = small_config("R", m2rnn_num_heads=1024)
    mixer = build_mixer(config, "recurrent", shake=False)
    identity = torch.eye(config.m2rnn_value_dim)
    assert torch.equal(mixer.transition, identity.expand_as(mixer.transition))
    assert torch.equal(mixer.D, torch.ones(1024))

    decay = mixer.A_log.exp()  # uniform in (0, 16)
    assert 0 < decay.min() < 0.1
    assert 15.9 < decay.max() <= 16
    assert decay.mean().item() == pytest.approx(8, abs=0.6)  # 4 standard errors of 16 / sqrt(12)

    step = torch.nn.functional.softplus(mixer.dt_bias)  # log-uniform in [1e-3, 1e-1]
    assert 1e-3 * (1 - 1e-3) <= step.min() < 1.1e-3
    assert 0.09 < step.max() <= 0.1 * (1 + 1e-3)
    middle = (math.log(1e-3) + math.log(1e-1)) / 2
    assert step.log().mean().item() == pytest.approx(middle, abs=0.17)


def test_another_inference_context_than_ours_is_refused():
    from megacpp_nemo.contract.errors import RuntimeRefusal

    mixer = build_mixer(small_config("R"), "recurrent").eval()
    with pytest.raises(RuntimeRefusal, match="a context of their own"):
        mixer(torch.zeros(1, 1, 32), inference_context=object())


def test_the_state_of_one_sequence_has_the_announced_shape():
    config = small_config("R", m2rnn_num_qk_heads=2)
    channels = 2 * 2 * config.m2rnn_key_dim + 4 * config.m2rnn_value_dim
    mixer = build_mixer(config, "recurrent")
    assert mixer.mamba_state_shapes_per_request() == ((channels, 4), (4, 6, 4))
    assert mixer.conv1d.weight.shape == (channels, 1, 4)
