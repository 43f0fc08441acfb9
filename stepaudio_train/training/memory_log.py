"""Memory of a run, told in its log: what the plan counts for each part, and what the first steps took."""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import replace

import torch

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.base import Engine
from stepaudio_train.training.plan import StagePlan, plan_run

log = logging.getLogger(__name__)

_STEPS = 2
"""The optimizer's states come with the first step's update: the second one is the first that has everything."""
_PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "models", "runtime", "host")


class MemoryLog:
    """Two lines in the log of the rank that writes logs: the plan before the first step, the peak after the second."""

    def __init__(self, config: RunConfig, engine: Engine) -> None:
        """Tells the plan. The rank that writes logs is of the first pipeline stage."""
        self._engine, self._steps = engine, 0
        if engine.is_main:
            # As it was chosen: `auto` is planned as a GPU.
            config = replace(config, engine=replace(config.engine, device=engine.device.type))
            log.info(
                "memory of rank %d as planned: %s", engine.rank, parts(plan_run(config, engine.world_size).stages[0])
            )

    def after_step(self) -> None:
        """Call it after every step of this process."""
        self._steps += 1
        if self._steps == _STEPS and self._engine.is_main:
            log.info("memory of rank %d after %d steps: %s", self._engine.rank, _STEPS, peak(self._engine.device))


def parts(stage: StagePlan) -> str:
    """What the plan counts, part by part; those that are nothing left out."""
    counted = [(name, getattr(stage, name)) for name in _PARTS]
    told = ", ".join(f"{name} {_gib(count)}" for name, count in counted if count)
    return f"{told}; {_gib(stage.total + stage.host)} GiB in all"


def peak(device: torch.device) -> str:
    """The most that this process has held so far: on a GPU of its memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return f"{_gib(torch.cuda.max_memory_allocated(device))} GiB at most in tensors on the GPU"
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{_gib(held)} GiB at most in the whole process, libraries included"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
