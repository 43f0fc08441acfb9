"""RMSNorm and SwiGLU by liger-kernel's Triton kernels, where it is installed: each reads and writes memory once, and
keeps less for its backward."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor, nn

from stepaudio_train.config.errors import UserError


def takes_liger(choice: Literal["auto", "liger", "none"], device: torch.device) -> bool:
    """Whether `engine.fused_kernels` means liger-kernel's kernels on `device`.

    Raises:
        UserError: they are asked for, and cannot be had.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if choice == "liger" and device.type != "cuda":
        raise UserError(f"engine.fused_kernels=liger: runs on CUDA, the device is {device.type}; type auto or none")
    if choice == "liger" and not installed:
        raise UserError("engine.fused_kernels=liger: is not installed; type pip install 'stepaudio-train[gpu]'")
    return choice != "none" and installed and device.type == "cuda"


def fuse(model: nn.Module) -> None:
    """Let every module of `model` that can use the kernels use them: those with an attribute `fused`."""
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32. x [..., h], weight [h] -> [..., h] of x's dtype."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" is its word for float32 throughout. Not in place: others may want the output's gradient.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape. Its backward writes over `gate` and `up`: nothing else may want them."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)  # type: ignore[no-any-return]
