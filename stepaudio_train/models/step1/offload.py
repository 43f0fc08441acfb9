"""What the backward needs again, in host memory until then."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def kept_on_host() -> AbstractContextManager[None]:
    """Within it, activations that autograd keeps go to host memory, and come back when the backward asks for them.

    Both copies are ordered among the computation like any other work of the GPU, and do not hold up the process. Meant
    for layers that are computed again, which keep their inputs alone: those are few enough to copy.
    """
    return torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if not tensor.is_floating_point():
        # Document numbers: all layers have the same ones.
        return tensor.device, tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _to_device(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = kept
    return tensor.to(device, non_blocking=True)
