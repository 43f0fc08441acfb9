"""Which device and which number format a run gets."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """`auto`: this process's CUDA device if there is one, else the CPU.

    Raises:
        RuntimeError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("engine.device=cuda, but torch sees no CUDA device; type engine.device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Compute dtype. `auto`: bf16 where the device multiplies it natively, fp32 elsewhere.

    A CPU without bf16 instructions runs bf16 several times slower than fp32.
    """
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
