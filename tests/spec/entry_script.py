"""Run an entry script of Megatron-LM on a CPU: `entry_script.py SCRIPT ARGS...`.

Only CUDA's own calls are replaced; everything else is the script's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import runpy
import sys
import typing
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import typing_extensions

from megacpp_nemo.host.cpu import RUNTIME


def replace_cuda() -> None:
    """Give the calls a CPU meaning that Megatron's training loop makes besides its model's."""
    RUNTIME.install()
    cuda: Any = torch.cuda
    names = ("max_memory_allocated", "memory_allocated", "memory_reserved", "max_memory_reserved")
    for name in names:
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.get_device_properties = lambda *args: type("Device", (), {"multi_processor_count": 1})()
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.device_count = lambda: 1
    cuda.is_available = lambda: False
    cuda.mem_get_info = lambda *args: (1, 1)
    cuda.memory_stats = lambda *args: {}
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.get_device_name = lambda *args: "CPU"
    cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *args: None
    # What a script makes on the CUDA device by type, not by name.
    for kind in ("Float", "Int", "Long", "Double", "Byte"):
        plain = getattr(torch, f"{kind}Tensor")
        setattr(cuda, f"{kind}Tensor", plain)


def skip_compiling() -> None:
    """Build nothing: the dataset index builder is the installed package's."""
    place = "megatron.core.datasets.helpers_cpp"
    folder = Path(str(distribution("megatron-core").locate_file("megatron/core/datasets")))
    (built,) = folder.glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location(place, built)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[place] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[place])
    importlib.import_module("megatron.core.datasets.utils").compile_helpers = lambda: None
    with contextlib.suppress(ModuleNotFoundError):
        kernels: Any = importlib.import_module("megatron.legacy.fused_kernels")
        kernels.load = lambda args: None


if __name__ == "__main__":
    script, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    replace_cuda()
    if not hasattr(typing, "override"):
        # The later releases' training loops are written for Python 3.12.
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    skip_compiling()
    training: Any = importlib.import_module("megatron.training.training")
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    runpy.run_path(script, run_name="__main__")
