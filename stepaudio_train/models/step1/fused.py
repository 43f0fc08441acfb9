"""RMSNorm and SwiGLU by liger-kernel's Triton kernels, where it is installed: each reads and writes memory once, and
keeps less for its backward."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor, nn

from stepaudio_train.config.errors import UserError

MIN_NORM_WIDTH = 8192
"""`auto` leaves narrower norms to PyTorch, which is faster there: in liger-kernel's own benchmark in Megatron
(linkedin/Liger-Kernel at ead96b61, H100) a norm of 4096 takes 0.195 ms by PyTorch and 0.309 by its kernel."""


def liger_parts(choice: Literal["auto", "liger", "none"], device: torch.device, hidden_size: int) -> frozenset[str]:
    """What `engine.fused_kernels` leaves to liger-kernel on `device`: attributes for `fuse`.

    Raises:
        UserError: they are asked for, and cannot be had.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if choice == "liger" and device.type != "cuda":
        raise UserError(f"engine.fused_kernels=liger: runs on CUDA, the device is {device.type}; type auto or none")
    if choice == "liger" and not installed:
        raise UserError("engine.fused_kernels=liger: is not installed; type pip install 'stepaudio-train[gpu]'")
    if choice == "none" or not installed or device.type != "cuda":
        return frozenset()
    norms = choice == "liger" or hidden_size >= MIN_NORM_WIDTH
    return frozenset({"fused_norm", "fused_swiglu"} if norms else {"fused_swiglu"})


def fuse(model: nn.Module, parts: frozenset[str]) -> None:
    """Set the attributes that `parts` names on every module of `model` that has them."""
    for module in model.modules():
        for part in parts:
            if hasattr(module, part):
                setattr(module, part, True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in float32. x [..., h], weight [h] -> [..., h] of x's dtype."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "gemma" is its word for float32 throughout. Not in place: others may want the output's gradient.
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)  # type: ignore[no-any-return]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all of one shape. Its backward writes over `gate` and `up`: nothing else may want them."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)  # type: ignore[no-any-return]
