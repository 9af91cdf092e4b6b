"""The authored M block against a loop written from its equations, token by token."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megacpp_nemo.contract.errors import RecipeError, RuntimeRefusal
from megacpp_nemo.contract.mixers import AuthorMambaShape
from megacpp_nemo.model import author_mamba, mamba3_kernels
from megacpp_nemo.model.generation_state import GenerationState
from tests.model.building import assert_near, boundaries_of, build_mixer, small_config
from tests.model.building import mixer_inputs as inputs
from tests.model.mamba3_loop import STATE, loop

pytestmark = pytest.mark.usefixtures("one_process")

HEADS, WIDTH, STATE_DIM = 4, 6, 8


def author_config(pattern: str = "M", rank: int = 2, **changes: Any) -> Any:
    settings = {
        "mamba_lane": "author",
        "author_mamba_num_heads": HEADS,
        "author_mamba_head_dim": WIDTH,
        "author_mamba_state_dim": STATE_DIM,
        "author_mamba_mimo_rank": rank,
        "author_mamba_chunk_size": 4,
    }
    return small_config(pattern, **{**settings, **changes})


def author_mixer(rank: int = 2, *, shake: bool = True, **changes: Any) -> nn.Module:
    return build_mixer(author_config(rank=rank, **changes), "mamba", shake=shake)


def reference(
    mixer: nn.Module, hidden: Tensor, rows: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the block's output `[seq, batch, hidden]` and its leaves by name, all in fp64.

    `rows` holds the lengths of the documents of each row.
    """
    own = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    own["input"] = hidden.detach().double().requires_grad_()
    rank = mixer.shape.mimo_rank
    outputs = []
    for b, lengths in enumerate(rows):
        parts = own["input"][:, b].split(lengths)
        outputs.append(torch.cat([document_reference(rank, own, part) for part in parts]))
    return torch.stack(outputs, dim=1), own


def document_reference(rank: int, own: dict[str, Tensor], x: Tensor) -> Tensor:
    inner, shared, seq = HEADS * WIDTH, rank * STATE_DIM, len(x)
    z, x, B, C, dt, A, trap, angles = (x @ own["in_proj.weight"].T).split(
        [inner, inner, shared, shared, HEADS, HEADS, HEADS, STATE_DIM // 4], dim=1
    )
    B, C = (
        part / torch.sqrt((part**2).mean(-1, keepdim=True) + 1e-5) * own[f"{name}_norm.weight"]
        for name, part in (("B", B.view(seq, rank, 1, -1)), ("C", C.view(seq, rank, 1, -1)))
    )
    inputs = {
        "x": x.view(1, seq, HEADS, WIDTH),
        "z": z.view(1, seq, HEADS, WIDTH),
        "dt": torch.log(1 + torch.exp(dt + own["dt_bias"]))[None],
        "A": -torch.log(1 + torch.exp(A)).clamp(min=1e-4)[None],
        "trap": trap[None],
        "B": B[None],
        "C": C[None],
        "angles": angles[None],
    }
    inputs |= {name: own[name] for name in ("B_bias", "C_bias", "D")}
    inputs |= {name: own[name] for name in ("mimo_x", "mimo_z", "mimo_o") if rank > 1}
    sizes = ((WIDTH, STATE_DIM), (rank, STATE_DIM), (WIDTH,), (STATE_DIM // 4,))
    inputs |= {
        name: torch.zeros(1, HEADS, *size, dtype=torch.float64)
        for name, size in zip(STATE, sizes, strict=True)
    }
    y, _ = loop(inputs)
    return y[0].flatten(1) @ own["out_proj.weight"].T


LAYOUTS = {
    "odd_length_over_several_chunks": (13, [[13], [13]]),
    "one_token": (1, [[1], [1]]),
    "documents_across_chunks": (13, [[5, 1, 7], [2, 11]]),
    "documents_of_one_token": (4, [[1, 1, 1, 1], [1, 2, 1]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_mixer_and_its_gradients_are_those_of_the_equations(layout, rank):
    seq, rows = LAYOUTS[layout]
    mixer = author_mixer(rank)
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


def test_keeping_the_state_across_documents_ignores_boundaries():
    mixer = author_mixer(reset_state=False)
    hidden, _ = inputs(13)
    packed, _ = mixer(hidden, packed_seq_params=boundaries_of([5, 8], [3, 10]))
    assert torch.equal(packed, mixer(hidden)[0])


@pytest.mark.parametrize("rank", [1, 2])
def test_parameters_have_mamba_ssms_names_and_shapes(rank):
    shapes = {name: tuple(p.shape) for name, p in author_mixer(rank).named_parameters()}
    inner = HEADS * WIDTH
    expected = {
        "dt_bias": (HEADS,),
        "D": (HEADS,),
        "B_bias": (HEADS, rank, STATE_DIM),
        "C_bias": (HEADS, rank, STATE_DIM),
        "B_norm.weight": (STATE_DIM,),
        "C_norm.weight": (STATE_DIM,),
        "in_proj.weight": (2 * inner + 2 * STATE_DIM * rank + 3 * HEADS + STATE_DIM // 4, 32),
        "out_proj.weight": (32, inner),
    }
    if rank > 1:
        expected |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (HEADS, rank, WIDTH))
    assert shapes == expected


def test_the_mixer_starts_as_its_source_does():
    mixer = author_mixer(4, shake=False, author_mamba_num_heads=1024)
    for name, value in (("B_bias", 1), ("C_bias", 1), ("D", 1), ("mimo_z", 1)):
        assert (getattr(mixer, name) == value).all(), name
    assert (mixer.mimo_x == 0.25).all()
    assert (mixer.mimo_o == 0.25).all()
    assert (mixer.B_norm.weight == 1).all()
    step = torch.nn.functional.softplus(mixer.dt_bias)  # log-uniform in [1e-3, 1e-1]
    assert 1e-3 * (1 - 1e-3) <= step.min() < 1.1e-3
    assert 0.09 < step.max() <= 0.1 * (1 + 1e-3)
    middle = (math.log(1e-3) + math.log(1e-1)) / 2
    assert step.log().mean().item() == pytest.approx(middle, abs=0.17)


def test_only_parameters_that_ranks_share_are_not_split():
    for name, parameter in author_mixer().named_parameters():
        shared = name in ("B_norm.weight", "C_norm.weight")
        assert getattr(parameter, "tensor_model_parallel", False) == (not shared), name
        if shared:
            assert not parameter.sequence_parallel


@pytest.mark.parametrize("rank", [1, 2])
def test_a_row_fed_in_pieces_equals_the_whole_row(rank):
    mixer = author_mixer(rank).eval()
    hidden, _ = inputs(40)
    with torch.no_grad():
        whole, _ = mixer(hidden)
        for lengths in ([17, 23], [9, *[1] * 31]):
            context = GenerationState(batch_size=2, max_tokens=40)
            pieces = []
            for piece in hidden.split(lengths):
                pieces.append(mixer(piece, context)[0])
                context.advance(len(piece))
            assert_near(torch.cat(pieces), whole)
            # What is carried does not grow with the row.
            carried = HEADS * (WIDTH * STATE_DIM + rank * STATE_DIM + WIDTH + STATE_DIM // 4)
            assert sum(context.carried_elements().values()) == 2 * carried


def test_another_inference_context_is_refused():
    with pytest.raises(RuntimeRefusal, match="a context of their own"):
        author_mixer().eval()(torch.zeros(1, 1, 32), inference_context=object())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_has_an_fp32_state_whatever_the_weights(dtype):
    mixer = author_mixer(params_dtype=dtype)
    projected = torch.randn(2, 5, mixer.in_proj.weight.size(0)).to(dtype)
    y, state = mixer.mix(projected)
    assert y.dtype == dtype
    assert state.ssm.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"author_mamba_state_dim": 10}, "turns half of its state in pairs"),
        ({"author_mamba_num_heads": 3, "tensor_model_parallel_size": 2}, "author_mamba.num_heads"),
        ({"author_mamba_state_dim": 4, "tensor_model_parallel_size": 2}, "state_dim / 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes, named):
    with pytest.raises(RecipeError, match=named):
        author_config(**changes)


# --- which path ------------------------------------------------------------------------------

FULL = AuthorMambaShape()
SINGLE = AuthorMambaShape(mimo_rank=1)


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this machine look like one with a GPU and these packages."""

    def pretend(version: str = "2.3.2", *, tilelang: bool = True, cuda=True, capability=(9, 0)):
        installed = {"mamba_ssm": True, "tilelang": tilelang}
        mamba3_kernels._machine.cache_clear()
        mamba3_kernels.state_once.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        find = mamba3_kernels.importlib.util.find_spec
        monkeypatch.setattr(
            mamba3_kernels.importlib.util,
            "find_spec",
            lambda name, *rest: installed[name] or None if name in installed else find(name, *rest),
        )
        monkeypatch.setattr(mamba3_kernels.importlib.metadata, "version", lambda name: version)

    yield pretend
    mamba3_kernels._machine.cache_clear()
    mamba3_kernels.state_once.cache_clear()


@pytest.mark.parametrize(
    ("shape", "seen", "reason"),
    [
        (FULL, {}, None),
        (SINGLE, {"tilelang": False}, None),
        (SINGLE, {"version": "2.4.0", "capability": (10, 0)}, None),
        (FULL, {"cuda": False}, "no CUDA device"),
        (FULL, {"tilelang": False}, "tilelang is not installed"),
        (FULL, {"version": "2.3.1"}, "has no Mamba-3"),
        (SINGLE, {"capability": (10, 0)}, "wrong values on Blackwell"),
        (AuthorMambaShape(mimo_rank=1, head_dim=48), {}, "not powers of two"),
        (AuthorMambaShape(head_dim=16), {}, "not made for state and head widths"),
        (AuthorMambaShape(mimo_rank=3), {}, "not made for rank 3"),
        (AuthorMambaShape(chunk_size=64), {}, "rank 4 in chunks of 64"),
    ],
)
def test_kernels_are_chosen_by_machine_and_shape(machine, shape, seen, reason):
    machine(**seen)
    found = mamba3_kernels.machine_obstacle(shape)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"documents": True}, "several documents"),
        ({"carries_state": True}, "carries its state"),
        ({"x": torch.zeros(1, 32, 2, 2)}, "torch.float32"),
        ({"x": torch.zeros(1, 33, 2, 2, dtype=torch.bfloat16)}, "33 tokens are no multiple"),
    ],
)
def test_kernels_are_left_where_a_call_needs_what_they_lack(changes, reason):
    needs: dict[str, Any] = {
        "x": torch.zeros(1, 32, 2, 2, dtype=torch.bfloat16),
        "documents": False,
        "carries_state": False,
        **changes,
    }
    found = mamba3_kernels.call_obstacle(needs.pop("x"), rank=4, chunk_size=16, **needs)
    assert found is None if reason is None else reason in found


def test_the_choice_and_its_reason_are_in_the_log_once(machine, caplog):
    machine(cuda=False)
    mixer = author_mixer()
    name = "megacpp_nemo.model.mamba3_kernels"
    with caplog.at_level(logging.INFO, logger=name):
        for _ in range(2):
            mixer(torch.zeros(3, 1, 32))
    said = [record.message for record in caplog.records if record.name == name]
    assert said == ["Mamba-3 layers run in plain torch: there is no CUDA device"]


def test_kernels_demanded_in_vain_are_refused(machine):
    machine(cuda=False)
    with pytest.raises(RuntimeRefusal, match=r"(?s)no CUDA device.*mamba_path='auto'"):
        author_mamba.AuthorMambaMixer(
            author_config(), None, 32, FULL, path="fused", pg_collection=_Groups
        )


def test_kernels_demanded_for_rows_of_several_documents_are_refused(monkeypatch):
    monkeypatch.setattr(author_mamba, "machine_obstacle", lambda shape: None)
    with pytest.raises(RuntimeRefusal, match="its rows hold several documents"):
        author_mamba.AuthorMambaMixer(
            author_config(reset_state=True), None, 32, FULL, path="fused", pg_collection=_Groups
        )


class _Groups:
    class tp:  # noqa: N801
        @staticmethod
        def size() -> int:
            return 1


def test_kernels_get_the_scans_arguments_and_their_result_is_taken(monkeypatch):
    mixer = author_mixer(params_dtype=torch.bfloat16)
    mixer.obstacle, given = None, {}

    def kernels(**arguments: Any) -> Tensor:
        given.update(arguments)
        return arguments["x"] * 0 + 3

    monkeypatch.setattr(author_mamba, "mamba3_kernels", kernels)
    projected = torch.randn(2, 8, mixer.in_proj.weight.size(0)).bfloat16()
    y, state = mixer.mix(projected, carries_state=False)
    assert (y == 3).all()
    assert state is None
    chunk_size = given.pop("chunk_size")
    assert chunk_size == 4
    assert author_mamba.mamba3_chunked(**given)[0].shape == (2, 8, HEADS, WIDTH)
    # A call that they cannot run goes the other way.
    _, state = mixer.mix(projected)
    assert state is not None


@pytest.mark.gpu
@pytest.mark.skipif(
    mamba3_kernels.machine_obstacle(SINGLE) is not None,
    reason=f"mamba-ssm's Mamba-3 kernels: {mamba3_kernels.machine_obstacle(SINGLE)}",
)
@pytest.mark.parametrize("rank", [1, 4])
def test_kernels_equal_the_plain_scan(rank):
    shape = AuthorMambaShape(mimo_rank=rank, chunk_size=64 // rank, num_heads=8)
    if reason := mamba3_kernels.machine_obstacle(shape):
        pytest.skip(f"mamba-ssm's Mamba-3 kernels: {reason}")
    mixer = build_mixer(
        author_config(
            rank=rank,
            params_dtype=torch.bfloat16,
            author_mamba_num_heads=8,
            author_mamba_head_dim=64,
            author_mamba_state_dim=128,
            author_mamba_chunk_size=64 // rank,
        ),
        "mamba",
    ).cuda()
    projected = torch.randn(2, 256, mixer.in_proj.weight.size(0), device="cuda").bfloat16()
    leaves = [projected.requires_grad_(), *mixer.parameters(recurse=False)]
    found = []
    for carries_state in (False, True):
        y, _ = mixer.mix(projected, carries_state=carries_state)
        found.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
    for kernel, plain in zip(*found, strict=True):
        assert_near(kernel.float().cpu(), plain.float().cpu(), 2e-2)
