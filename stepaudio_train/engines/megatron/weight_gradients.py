"""Gradients of weights, added up by the product that makes them.

Megatron-Core adds a micro-batch's gradient of a matrix to its fp32 buffer within the product, without making it first,
where APEX has an extension for that. PyTorch has products that do the same, and they are offered in its place.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

log = logging.getLogger(__name__)

_HAS_APEX = layers._grad_accum_fusion_available


def fuse_accumulation(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this process's Megatron-Core can fuse for weights of `dtype` on `device`; makes it able to if need be.

    On a CPU in fp32 alone; on a GPU in bf16 where PyTorch's product adds to fp32, which has not always been so.
    """
    if _HAS_APEX:
        return device.type == "cuda"
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        _add_product(ones, ones, torch.zeros(16, 16, device=device))
    except RuntimeError as error:
        log.info("gradients are made before they are added up: %s", str(error).splitlines()[0])
        return False
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add_product)
    layers._grad_accum_fusion_available = True
    return True


def _add_product(inputs: Tensor, grad_outputs: Tensor, buffer: Tensor) -> None:
    """buffer [O, I] float32 += grad_outputs [T, O]^T inputs [T, I]."""
    if inputs.dtype == buffer.dtype:
        buffer.addmm_(grad_outputs.t(), inputs)
    else:
        torch.addmm(buffer, grad_outputs.t(), inputs, out_dtype=buffer.dtype, out=buffer)
