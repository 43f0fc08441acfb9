"""This process's device, and the process group that torchrun's environment variables describe."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from stepaudio_train.engines.precision import choose_device


def own_device(name: str) -> torch.device:
    """This rank's device: on CUDA, the one of its number on this machine."""
    if name != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return choose_device(name)


def join_process_group(device: torch.device) -> bool:
    """Join the group, a group of one without torchrun; False if this process is in one already."""
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True
