"""M2RNN's paths: each against the plain loop, which one is taken, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megacpp_nemo.contract.errors import RuntimeRefusal
from megacpp_nemo.model import m2rnn_build, m2rnn_compiled, m2rnn_paths
from megacpp_nemo.model.m2rnn import m2rnn_scan
from tests.model.m2rnn_cases import CASES, Case, errors_of, inputs_of, results_of
from tests.model.scans import difference
from tests.support.processes import in_process

ROOT = Path(__file__).parents[2]
UNBUILT = m2rnn_build.library(5)
needs_compiler = pytest.mark.skipif(
    isinstance(UNBUILT, m2rnn_build.BuildError), reason=f"C code cannot be built: {UNBUILT}"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of all cases in Triton's interpreter, from one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.m2rnn_cases", "triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_small(errors: dict[str, float], case: Case) -> None:
    # Not `max`: a NaN compares false with everything and must not pass.
    assert all(error <= case.tolerance for error in errors.values()), errors


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_loop_in_tritons_interpreter(
    interpreted: dict[str, dict[str, float]], name: str
) -> None:
    assert_small(interpreted[name], CASES[name])


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_loop_on_a_gpu(name: str) -> None:
    assert_small(errors_of(CASES[name], "cuda", "triton"), CASES[name])


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_the_kernels_repeat_themselves_bit_by_bit() -> None:
    once, again = (results_of(CASES["bf16"], "cuda", "triton") for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(once, again, strict=True))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_c_code_equals_the_loop(name: str) -> None:
    assert_small(errors_of(CASES[name], "cpu", "compiled"), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_torch_code_equals_the_loop(name: str) -> None:
    assert_small(errors_of(CASES[name], "cpu", "torch"), CASES[name])


def test_the_cases_of_a_clip_tell_it_from_none() -> None:
    clipped, free = (results_of(CASES[name], "cpu", None) for name in ("clip_binds", "no_clip"))
    names = ("q", "k", "v", "f", "W", "initial_state")
    changed = difference(clipped, free, inputs=names)
    assert all(changed[name] > 0.1 for name in ("k", "v", "f", "W", "initial_state"))


@needs_compiler
def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=4, documents=True)
    alone = results_of(case, "cpu", "compiled")
    counts: list[int] = []
    share_out = m2rnn_compiled._side_by_side
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(
        m2rnn_compiled, "_side_by_side", lambda work, n: (counts.append(n), share_out(work, n))
    )
    shared = results_of(case, "cpu", "compiled")
    assert counts == [3, 3]
    assert all(torch.equal(left, right) for left, right in zip(alone, shared, strict=True))


@needs_compiler
def test_a_forked_process_runs_the_c_code_that_its_parent_loaded() -> None:
    assert_small(in_process(errors_of, CASES["documents"], "cpu", "compiled"), CASES["documents"])


@needs_compiler
def test_tanh_keeps_its_relative_precision_everywhere() -> None:
    x = torch.cat([torch.logspace(-30, 2, 4000), torch.zeros(1)])
    x = torch.cat([x, -x])
    ones = {"q": torch.ones(1, len(x), 1, 1), "v": torch.ones(1, len(x), 1, 1)}
    # With nothing kept from token to token, y is tanh(k).
    y, _ = m2rnn_scan(
        **ones, k=x.view(1, -1, 1, 1), f=torch.zeros(1, len(x), 1), W=torch.zeros(1, 1, 1),
        path="compiled",
    )  # fmt: skip
    torch.testing.assert_close(y.flatten().double(), x.double().tanh(), rtol=3e-7, atol=0)


@needs_compiler
@pytest.mark.parametrize("name", ["k", "f", "initial_state"])
def test_the_c_code_passes_nan_on(name: str) -> None:
    inputs = inputs_of(Case())
    with torch.no_grad():
        inputs[name].fill_(float("nan"))
    y, final = m2rnn_scan(**inputs, path="compiled")
    assert y.isnan().all()
    assert final.isnan().all()


@pytest.fixture
def announced(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    m2rnn_paths._announce.cache_clear()
    caplog.set_level(logging.INFO, logger="megacpp_nemo.model.m2rnn_paths")
    return caplog


@needs_compiler
def test_the_choice_and_its_reason_are_logged_once(announced: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        m2rnn_scan(**inputs_of(Case()))
    m2rnn_scan(**inputs_of(Case()), path="torch")
    assert announced.messages == [
        "M2RNN runs by its compiled path (tensors on cpu)",
        "M2RNN runs by its torch path (demanded)",
    ]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([], "no C compiler"),
        (["false"], "returned non-zero exit status"),
        (["cc", "broken"], "error"),
    ],
)
def test_without_a_working_compiler_torch_runs_and_the_log_says_why(
    found: list[str],
    reason: str,
    announced: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(m2rnn_build, "COMPILERS", found[:1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if "broken" in found:
        (tmp_path / "broken.c").write_text("this is no C")
        monkeypatch.setattr(m2rnn_build, "SOURCE", tmp_path / "broken.c")
    m2rnn_build.library.cache_clear()
    try:
        inputs = inputs_of(Case())
        y, _ = m2rnn_scan(**inputs)
        assert torch.equal(y, m2rnn_scan(**inputs, path="torch")[0])
        assert announced.messages[0].startswith("M2RNN runs by its torch path (not compiled: ")
        assert reason in announced.messages[0]
        with pytest.raises(RuntimeRefusal, match=r"compiled path cannot run"):
            m2rnn_scan(**inputs, path="compiled")
    finally:
        m2rnn_build.library.cache_clear()
    assert not list(tmp_path.rglob("*.so*"))


@needs_compiler
def test_a_library_is_built_once_and_a_damaged_one_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = m2rnn_build.library.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    assert not isinstance(build(3), m2rnn_build.BuildError)
    (path,) = tmp_path.rglob("*.so")
    built = path.stat().st_mtime_ns
    build(3)
    assert path.stat().st_mtime_ns == built
    # Elsewhere, because the loader knows by its name what it has loaded.
    damaged = tmp_path / "second" / path.relative_to(tmp_path / "first")
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"torn")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert not isinstance(build(3), m2rnn_build.BuildError)
    assert "which cannot be loaded" in caplog.text
    assert [found.name for found in damaged.parent.iterdir()] == [path.name]


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "megacpp_nemo").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not isinstance(m2rnn_build.library.__wrapped__(3), m2rnn_build.BuildError)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("fused", {}, "No way to run M2RNN is called 'fused'"),
        ("compiled", {"v": torch.float64}, "computes in fp32"),
        ("triton", {"v": torch.float64}, "computes in fp32"),
        ("triton", {}, "the tensors are on cpu|triton is not installed"),
    ],
)
def test_a_demanded_path_that_cannot_run_is_refused(
    path: str, change: dict[str, torch.dtype], message: str
) -> None:
    inputs: dict[str, Any] = inputs_of(Case())
    for name, dtype in change.items():
        inputs[name] = inputs[name].to(dtype)
    with pytest.raises(RuntimeRefusal, match=message):
        m2rnn_scan(**inputs, path=path)


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m2rnn_paths, "_triton_installed", lambda: False)
    with pytest.raises(RuntimeRefusal, match="triton is not installed"):
        m2rnn_scan(**inputs_of(Case()), path="triton")


@pytest.mark.parametrize(("key_dim", "value_dim"), [(257, 16), (16, 65)])
@needs_triton
def test_a_state_too_large_for_a_gpus_registers_is_refused(key_dim: int, value_dim: int) -> None:
    reason = m2rnn_paths._missing_for_triton("cuda", torch.float32, key_dim, value_dim)
    assert reason is not None
    assert "exceeds 4096 values or 64 columns" in reason


def test_inputs_on_different_devices_are_refused() -> None:
    inputs = {**inputs_of(Case()), "W": torch.empty(2, 5, 5, device="meta")}
    with pytest.raises(RuntimeRefusal, match="different devices"):
        m2rnn_scan(**inputs)


def test_importing_the_scan_imports_neither_triton_nor_a_compiler() -> None:
    check = (
        "import sys, megacpp_nemo.model.m2rnn; "
        "print([m for m in ('triton', 'megacpp_nemo.model.m2rnn_build') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
