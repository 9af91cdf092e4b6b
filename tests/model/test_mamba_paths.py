"""Three ways to run a Mamba-2 layer: which is taken, and that they mean the same."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model import mamba_paths
from megacpp_nemo.model.conv import causal_conv1d
from megacpp_nemo.model.generation_state import GenerationState
from megacpp_nemo.model.mamba_paths import choose_path
from megacpp_nemo.model.specs import Backend, hybrid_stack_spec
from megacpp_nemo.model.ssd import ssd_sequential
from tests.model.building import (
    assert_near,
    boundaries_of,
    build_module,
    groups,
    shaken,
    small_config,
)

ROWS = ([5, 7, 1], [13])


@pytest.mark.parametrize(
    ("machine_has", "taps", "path", "reason"),
    [
        ({}, 4, "fused", "its kernels are installed"),
        ({"kernels": ("mamba_ssm",)}, 4, "split", "fused needs causal-conv1d"),
        ({}, 5, "split", "fused needs a convolution of 2 to 4 taps"),
        (
            {"kernels": ("causal_conv1d",)},
            4,
            "portable",
            "fused needs mamba-ssm; split needs mamba-ssm",
        ),
        (
            {"kernels": (), "cuda": False},
            4,
            "portable",
            "fused needs mamba-ssm, causal-conv1d, a CUDA device; "
            "split needs mamba-ssm, a CUDA device",
        ),
    ],
)
def test_the_fastest_path_that_can_run_is_taken_with_its_reason(
    machine, machine_has, taps, path, reason
):
    machine(**machine_has)
    chosen = choose_path(conv_width=taps)
    assert (chosen.name, chosen.reason) == (path, reason)
    assert str(chosen) == f"{path} ({reason})"
    backend = Backend.probe(conv_width=taps)
    assert (backend.mamba, backend.reason) == (path, reason)


@pytest.mark.parametrize("wrong", [(False, "causal-conv1d >= 1.4.0"), ImportError("no symbol")])
def test_documents_take_the_split_path_where_the_fused_kernel_does_not_know_them(
    machine, monkeypatch, wrong
):
    def check(**_: bool) -> tuple[bool, str]:
        if isinstance(wrong, ImportError):
            raise wrong
        return wrong

    machine()
    monkeypatch.setattr(mamba_paths, "_check_mamba_sequence_packing_support", check)
    assert choose_path().name == "fused"
    chosen = choose_path(documents=True)
    assert chosen.name == "split"
    assert ("no symbol" if isinstance(wrong, ImportError) else wrong[1]) in chosen.reason


@pytest.mark.parametrize("path", ["fused", "split", "portable"])
def test_a_path_can_be_demanded_where_all_can_run(machine, path):
    machine()
    assert choose_path(path) == (path, "demanded")


@pytest.mark.parametrize(
    ("path", "machine_has", "taps", "lacks", "instead"),
    [
        ("split", {"kernels": ()}, 4, "mamba-ssm", "'auto' or 'portable'"),
        ("split", {"cuda": False}, 4, "a CUDA device", "'auto' or 'portable'"),
        ("fused", {}, 5, "a convolution of 2 to 4 taps", "'auto' or 'split' or 'portable'"),
    ],
)
def test_a_path_demanded_in_vain_is_refused_by_what_it_lacks(
    machine, path, machine_has, taps, lacks, instead
):
    machine(**machine_has)
    with pytest.raises(RuntimeRefusal, match=f"The {path} Mamba path cannot run here") as refusal:
        choose_path(path, conv_width=taps)
    assert refusal.value.given == f"mamba_path={path!r} without {lacks}"
    assert refusal.value.allowed == instead


def conv_stand_in(x: Tensor, weight: Tensor, bias: Tensor, *, seq_idx: Any, activation: str):
    """`causal_conv1d_fn` on `[batch, channels, seq]`, as strict about memory as it is."""
    assert activation == "silu"
    assert x.stride(1) == 1, "with documents the channels must lie together"
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    mixed = causal_conv1d(x.transpose(1, 2), weight, bias, document_ids=seq_idx)
    return F.silu(mixed).transpose(1, 2)


def scan_stand_in(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, *,
    D: Tensor, dt_bias: Tensor, dt_softplus: bool, initial_states: Any, seq_idx: Any,
    return_final_states: bool,
):  # fmt: skip
    """`mamba_chunk_scan_combined`, token by token."""
    assert dt_softplus
    assert return_final_states
    assert seq_idx is None or seq_idx.dtype == torch.int32
    assert all(t.is_contiguous() for t in (x, dt, B, C))
    return ssd_sequential(
        x, F.softplus(dt.float() + dt_bias), A, B, C, D=D, document_ids=seq_idx,
        initial_state=initial_states,
    )  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch, machine):
    """Kernels by their names, in torch; a function that says which are installed."""
    conv, combined = ModuleType("causal_conv1d"), ModuleType("ssd_combined")
    conv.causal_conv1d_fn = conv_stand_in
    combined.mamba_chunk_scan_combined = scan_stand_in
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", combined)
    return lambda *kernels: machine(kernels=kernels, cuda=False, engine=False)


def mixer_of(path: str, **changes: Any) -> nn.Module:
    """Return a mixer on a path, with the same parameters on each."""
    config = small_config("M", **changes)
    spec = hybrid_stack_spec(config, Backend(transformer_engine=False, mamba=path))
    layer = build_module(
        spec.submodules.mamba_layer, config=config, layer_number=1, pg_collection=groups()
    )
    return shaken(layer.mixer)


def outcome(mixer: nn.Module, hidden: Tensor, boundaries: Any) -> dict[str, Tensor]:
    """Return the output and every gradient, by name."""
    hidden = hidden.clone().requires_grad_()
    mixer.zero_grad()
    y, _ = mixer(hidden, packed_seq_params=boundaries)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weight).sum().backward()
    grads = {name: p.grad for name, p in mixer.named_parameters()}
    return {"y": y.detach(), "input": hidden.grad, **grads}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("boundaries", [None, boundaries_of(*ROWS)])
@pytest.mark.parametrize("kernels", [("causal_conv1d",), ()])
def test_split_hands_its_kernels_what_portable_computes(stand_ins, kernels, boundaries):
    stand_ins(*kernels)
    hidden = torch.randn(13, 2, 32, generator=torch.Generator().manual_seed(2))
    portable, split = (mixer_of(path) for path in ("portable", "split"))
    assert type(split).__name__ == "SplitMambaMixer"
    split.load_state_dict(portable.state_dict())
    expected = outcome(portable, hidden, boundaries)
    actual = outcome(split, hidden, boundaries)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(actual[name], value, 1e-5)


@pytest.mark.usefixtures("one_process")
def test_split_carries_its_state_from_piece_to_piece(stand_ins):
    stand_ins("causal_conv1d")
    mixer = mixer_of("split").eval()
    hidden = torch.randn(13, 2, 32, generator=torch.Generator().manual_seed(2))
    whole, _ = mixer(hidden)
    context, pieces = GenerationState(batch_size=2, max_tokens=13), []
    for start, end in ((0, 6), (6, 7), (7, 13)):
        piece, _ = mixer(hidden[start:end], context)
        context.advance(end - start)
        pieces.append(piece)
    assert_near(torch.cat(pieces), whole, 1e-5)


@pytest.mark.usefixtures("one_process")
@pytest.mark.gpu
@pytest.mark.kernels
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("boundaries", [None, boundaries_of([50, 70, 8], [128])])
def test_the_three_paths_agree_where_the_kernels_are(boundaries):
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed")
    pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    sizes = {"mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_chunk_size": 64}
    hidden = torch.randn(128, 2, 32, device="cuda")
    if boundaries is not None:
        boundaries.document_ids = boundaries.document_ids.cuda()
    portable = mixer_of("portable", **sizes).cuda()
    expected = outcome(portable, hidden, boundaries)
    for path in ("split", "fused"):
        other = mixer_of(path, **sizes).cuda()
        other.load_state_dict(portable.state_dict())
        actual = outcome(other, hidden, boundaries)
        for name, value in expected.items():
            # The kernels multiply fp32 in TF32.
            assert_near(actual[name], value, 5e-3)
