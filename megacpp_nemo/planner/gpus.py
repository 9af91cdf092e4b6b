"""GPUs as data: memory, peak arithmetic and links, each with what published it.

Peaks are dense, without the factor of two that vendors quote for sparse matrices. Links are in
bytes per second one way, half of what vendors quote for both ways together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megacpp_nemo.contract.errors import MegaCppError, lookup

GIB = 2**30
DEFAULT_GPU = "h200"
TFLOPS = 1e12
GB_PER_SECOND = 1e9


class PlanError(MegaCppError):
    """A plan that cannot be made: an unknown GPU, or more stages than layers."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node of eight.

    Args:
        name: Short name, as `--gpu` takes it.
        title: Its name in full.
        memory_gib: Memory that a process finds, `torch.cuda.mem_get_info`'s total.
        bf16_flops: Peak operations per second in bf16.
        fp8_flops: Peak operations per second in FP8; None where there is none.
        fp32_flops: Peak operations per second in fp32, without TF32.
        nvlink_bytes_per_second: To the other GPUs of its node, one way.
        network_bytes_per_second: To other nodes, one way.
        per_node: GPUs of a node.
        sources: What published each figure, by the field's name.
    """

    name: str
    title: str
    memory_gib: float
    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    nvlink_bytes_per_second: float
    network_bytes_per_second: float
    per_node: int = 8
    sources: Mapping[str, str]

    @property
    def memory_bytes(self) -> int:
        """Memory that a process finds, in bytes."""
        return int(self.memory_gib * GIB)


def _sources(memory: str, peak: str, nvlink: str, network: str) -> Mapping[str, str]:
    return MappingProxyType(
        {
            "memory_gib": memory,
            "bf16_flops": peak,
            "fp8_flops": peak,
            "fp32_flops": peak,
            "nvlink_bytes_per_second": nvlink,
            "network_bytes_per_second": network,
        }
    )


_HOPPER_LINK = "NVIDIA H100 and H200 datasheets: NVLink 900 GB/s both ways together"
_HOPPER_PEAK = "NVIDIA H100 architecture whitepaper, SXM5, dense: 989.4 bf16, 1978.9 FP8, 66.9 fp32"

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu(
                name="h200",
                title="NVIDIA H200 SXM 141 GB",
                memory_gib=139.8,
                bf16_flops=989.4 * TFLOPS,
                fp8_flops=1978.9 * TFLOPS,
                fp32_flops=66.9 * TFLOPS,
                nvlink_bytes_per_second=450 * GB_PER_SECOND,
                network_bytes_per_second=50 * GB_PER_SECOND,
                sources=_sources(
                    "as PyTorch reports it (141 GB on the datasheet)",
                    f"{_HOPPER_PEAK}; the H200 datasheet gives the same",
                    _HOPPER_LINK,
                    "NVIDIA DGX H200 datasheet: one 400 Gb/s port per GPU",
                ),
            ),
            Gpu(
                name="h100",
                title="NVIDIA H100 SXM 80 GB",
                memory_gib=79.1,
                bf16_flops=989.4 * TFLOPS,
                fp8_flops=1978.9 * TFLOPS,
                fp32_flops=66.9 * TFLOPS,
                nvlink_bytes_per_second=450 * GB_PER_SECOND,
                network_bytes_per_second=50 * GB_PER_SECOND,
                sources=_sources(
                    "as PyTorch reports it (80 GB on the datasheet)",
                    _HOPPER_PEAK,
                    _HOPPER_LINK,
                    "NVIDIA DGX H100 datasheet: one 400 Gb/s port per GPU",
                ),
            ),
            Gpu(
                name="b200",
                title="NVIDIA B200 SXM 180 GB",
                memory_gib=178.3,
                bf16_flops=2250 * TFLOPS,
                fp8_flops=4500 * TFLOPS,
                fp32_flops=75 * TFLOPS,
                nvlink_bytes_per_second=900 * GB_PER_SECOND,
                network_bytes_per_second=50 * GB_PER_SECOND,
                sources=_sources(
                    "as the CUDA driver reports it (180 GB on the datasheet)",
                    "NVIDIA HGX B200 datasheet, eight: 36 bf16, 72 FP8 petaFLOPS sparse, 0.6 fp32",
                    "NVIDIA HGX B200 datasheet: NVLink 1.8 TB/s both ways together",
                    "NVIDIA DGX B200 datasheet: one 400 Gb/s port per GPU",
                ),
            ),
            Gpu(
                name="a100",
                title="NVIDIA A100 SXM 80 GB",
                memory_gib=79.2,
                bf16_flops=312 * TFLOPS,
                fp8_flops=None,
                fp32_flops=19.5 * TFLOPS,
                nvlink_bytes_per_second=300 * GB_PER_SECOND,
                network_bytes_per_second=25 * GB_PER_SECOND,
                sources=_sources(
                    "as PyTorch reports it (80 GB on the datasheet)",
                    "NVIDIA A100 datasheet: 312 bf16 dense, no FP8, 19.5 fp32",
                    "NVIDIA A100 datasheet: NVLink 600 GB/s both ways together",
                    "NVIDIA DGX A100 datasheet: one 200 Gb/s port per GPU",
                ),
            ),
        )
    }
)


def gpu_called(name: str | Gpu) -> Gpu:
    """Return the GPU of that name.

    Raises:
        PlanError: If it is not known here.
    """
    if isinstance(name, Gpu):
        return name
    return lookup(GPUS, name, what=f"No GPU is called {name!r} here", field="gpu", error=PlanError)
