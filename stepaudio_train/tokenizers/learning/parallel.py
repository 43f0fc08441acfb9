"""Sums over the processes that train together; in a process of its own, nothing happens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_NUMBERS = 1 << 23


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; every process gets the same."""
    if dist.is_initialized():
        moved = _where_the_group_works(tensor)
        dist.all_reduce(moved)
        tensor.copy_(moved)
    return tensor


def from_first(tensor: Tensor) -> Tensor:
    """What the first process has, in place."""
    if dist.is_initialized():
        moved = _where_the_group_works(tensor)
        dist.broadcast(moved, 0)
        tensor.copy_(moved)
    return tensor


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of all processes. Each loss is a sum divided by counts over all of them (`combine`), so
    the sum is the gradient of the whole batch."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        # Unused here, perhaps used elsewhere: every process must add up the same tensors.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= _BUCKET_NUMBERS:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _where_the_group_works(tensor: Tensor) -> Tensor:
    """NCCL takes tensors of a device alone."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = all_sum(torch.cat([grad.flatten() for grad in gradients]))
    for grad, part in zip(gradients, flat.split([grad.numel() for grad in gradients]), strict=True):
        grad.copy_(part.view_as(grad))
