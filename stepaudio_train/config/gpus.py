"""GPUs that `stepaudio plan --gpu` knows: data sheets, and what links give in practice. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["a100", "h100", "h200", "h800"]


@dataclass(frozen=True)
class Gpu:
    """One GPU in a machine of eight, each with its own network card. Links are of one direction."""

    flops_per_s: float
    """Dense bf16, of the data sheet."""
    memory_gib: float
    memory_bytes_per_s: float
    """Of the data sheet."""
    nvlink_bytes_per_s: float
    """Large messages in practice: 0.82 of the data sheet's."""
    network_bytes_per_s: float
    """Large messages in practice: 0.9 of the card's."""
    multiprocessors: int
    gpus_per_machine: int = 8


# Data sheets. A100: 312 TFLOP/s, 2.04 TB/s, NVLink 600 GB/s (both directions), one 200 Gb/s card a GPU. H100 SXM:
# 989 TFLOP/s, 3.35 TB/s, 900 GB/s, 400 Gb/s. H200: H100 with 4.8 TB/s and 141 GB. H800: H100 with NVLink of 400 GB/s.
# In practice one direction of an H100's NVLink gives 370 to 380 of its 450 GB/s (NVIDIA/nccl issue 1264), that of an
# H800 about 160 of 200 (deepseek-ai/DeepEP docs/legacy.md): 0.82. Memory is what a program finds free, in GiB.
_H100 = Gpu(989e12, 79.1, 3.35e12, 0.82 * 450e9, 0.9 * 50e9, 132)
GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(312e12, 79.1, 2.04e12, 0.82 * 300e9, 0.9 * 25e9, 108),
    "h100": _H100,
    "h200": Gpu(989e12, 139.8, 4.8e12, 0.82 * 450e9, 0.9 * 50e9, 132),
    "h800": Gpu(989e12, 79.1, 3.35e12, 0.82 * 200e9, 0.9 * 50e9, 132),
}
