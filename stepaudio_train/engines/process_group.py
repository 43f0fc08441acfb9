"""This process's device, and the process group that torchrun's environment variables describe, or a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stepaudio_train.engines.precision import choose_device

_ENVIRONMENT = ("RANK", "WORLD_SIZE")
_worlds: list[World] = []
"""The part of the launched ranks that this process belongs to, where they were parted."""


@dataclass(frozen=True)
class World:
    """Some of the ranks that were launched together, which make process groups among themselves alone."""

    is_apart: bool
    """Whether it is the one of the last ranks."""
    num_apart: int
    """How many ranks that one has."""
    store: dist.Store
    """That all ranks see, of both worlds."""


@contextmanager
def parted(num_apart: int) -> Iterator[World | None]:
    """While it lasts, the last `num_apart` ranks are a world of their own, and so are the others: RANK and WORLD_SIZE
    count the ranks of this process's world, and `join_process_group` joins it. None where `num_apart` is 0.

    LOCAL_RANK stays, since it names the device. Every launched rank enters it, without a process group.

    Raises:
        ValueError: no rank would be left for the other world.
    """
    if num_apart == 0:
        yield None
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    if not 0 < num_apart < world_size:
        raise ValueError(f"{num_apart} of {world_size} ranks apart: must leave some on both sides")
    first_apart = world_size - num_apart
    is_apart = rank >= first_apart
    before = {name: os.environ[name] for name in _ENVIRONMENT}
    own = (rank - first_apart, num_apart) if is_apart else (rank, first_apart)
    os.environ.update({name: str(value) for name, value in zip(_ENVIRONMENT, own, strict=True)})
    _worlds.append(World(is_apart, num_apart, store))
    try:
        yield _worlds[-1]
    finally:
        _worlds.pop()
        os.environ.update(before)


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
    device_id = device if device.type == "cuda" else None
    if _worlds:
        name = "apart" if _worlds[-1].is_apart else "others"
        rank, world_size = (int(os.environ[variable]) for variable in _ENVIRONMENT)
        store = dist.PrefixStore(name, _worlds[-1].store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    elif "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True
