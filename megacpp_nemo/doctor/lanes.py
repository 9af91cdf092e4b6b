"""Which ways of running work here: CUDA and its kernels, compiled code, two processes."""

from __future__ import annotations

from megacpp_nemo.doctor.findings import Finding, State
from megacpp_nemo.doctor.machine import compiler, compiler_finding
from megacpp_nemo.doctor.packages import installed, pip, version_of
from megacpp_nemo.doctor.steps import (
    DISTRIBUTIONS,
    Entry,
    Steps,
    finding_of,
    simple,
    unchecked,
    unreached,
)

GPU_EXTRA = "pip install 'megacpp-nemo[gpu]', on a CUDA machine"
# Package by import name: what it is, and what its absence costs.
KERNELS = {
    "transformer_engine": (
        "Transformer Engine",
        "layers are Megatron's plain ones: no FP8, and full-size recipes refuse to start",
    ),
    "mamba_ssm": ("mamba-ssm", "M layers run in plain torch: right, and slow at full size"),
    "causal_conv1d": (
        "causal-conv1d",
        "the fused Mamba path cannot be had; the convolution runs in torch",
    ),
}


def lane_findings(steps: Steps) -> list[Finding]:
    """Return what the imports and trials of each lane came to."""
    return [
        _torch(steps),
        _gloo(steps),
        _cuda(steps),
        _triton(steps),
        *(_kernel(steps, name) for name in KERNELS),
        _compiler(steps),
    ]


def quick_lanes() -> list[Finding]:
    """Return what can be said of the lanes' packages without importing them."""
    kernels = [
        unchecked(f"lane.{name}", KERNELS[name][0], f"{_version(name)}, not imported")
        if installed(name)
        else _absent(name)
        for name in KERNELS
    ]
    return [*kernels, compiler_finding()]


def _torch(steps: Steps) -> Finding:
    says = "everything that trains is built on it"
    return simple(steps, "torch", "lane.torch", lambda e: e["version"], says, "torch")


def _gloo(steps: Steps) -> Finding:
    """Return whether two processes work together; with torch at hand, it is the network's fault."""
    says = "training on a CPU makes a gloo group, of one process too"
    finding = simple(steps, "gloo", "lane.gloo", _processes, says, "torch.distributed")
    if finding.state is State.BROKEN and steps.get("torch", {}).get("ok"):
        fix = 'echo "127.0.0.1 $(hostname)" | sudo tee -a /etc/hosts'
        return finding_of(finding.key, finding.state, finding.found, says, fix)
    return finding


def _processes(step: Entry) -> str:
    return f"{step['processes']} processes added up a number"


def _cuda(steps: Steps) -> Finding:
    key, step = "lane.cuda", steps.get("cuda")
    if step is None:
        return unreached(key)
    if not step["ok"]:
        return finding_of(key, State.LIMITED, step["error"], "models train on the CPU, small ones")
    devices = step["devices"]
    if devices:
        return finding_of(
            key, State.OK, f"{len(devices)} x {devices[0]}, torch for {step['built']}"
        )
    found = f"no device; torch is built for CUDA {step['built']}"
    found = found if step["built"] else "no device; torch is a CPU build"
    return finding_of(
        key, State.LIMITED, found, "the _tiny and _smoke recipes train; others do not"
    )


def _triton(steps: Steps) -> Finding:
    key, step = "lane.triton", steps.get("triton")
    says = "Megatron's Mamba modules import it, on a CPU too: without it no recipe is found"
    if step and step["ok"] and not step["installed"]:
        return finding_of(key, State.BROKEN, "not installed", says, pip("triton"))
    return simple(steps, "triton", key, lambda e: e["version"], says, "triton")


def _kernel(steps: Steps, name: str) -> Finding:
    step = steps.get(name)
    title, cost = KERNELS[name]
    key = f"lane.{name}"
    if step is None:
        return unchecked(key, title, "not reached")
    if not step["ok"]:
        says = f"it is installed and cannot be imported, so {cost}"
        fix = (
            f"pip install --no-build-isolation --force-reinstall --no-deps {DISTRIBUTIONS[name]!r}"
        )
        return Finding(
            key=key, name=title, state=State.LIMITED, found=step["error"], says=says, fix=fix
        )
    if not step["installed"]:
        return _absent(name)
    return Finding(key=key, name=title, state=State.OK, found=step["version"] or "imports")


def _compiler(steps: Steps) -> Finding:
    step = steps.get("compiler")
    if step is None:
        return compiler_finding()
    if not step["ok"]:
        return compiler(False, step["error"])
    return compiler(step["works"], "its code compiles and loads" if step["works"] else step["why"])


def _absent(name: str) -> Finding:
    title, cost = KERNELS[name]
    return Finding(
        key=f"lane.{name}",
        name=title,
        state=State.LIMITED,
        found="not installed",
        says=cost,
        fix=GPU_EXTRA,
    )


def _version(name: str) -> str:
    return version_of(DISTRIBUTIONS[name].partition("[")[0]) or "of unknown version"
