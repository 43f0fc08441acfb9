"""Time several ways to compute the same: in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")

Work = Callable[[], object]

_WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Contender:
    """One way to compute."""

    name: str
    build: Callable[[], Work]
    """Makes what is timed. Built once, and freed before the next one is built where contenders run apart."""


@dataclass(frozen=True)
class Timing:
    """Seconds of every round; empty if the contender ran out of memory."""

    wall_s: tuple[float, ...]
    processor_s: tuple[float, ...]
    """Of all threads of this process: other programs on the machine disturb it less. Threads that wait for each other
    count too."""

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.wall_s) if self.wall_s else None

    @property
    def median_processor_s(self) -> float | None:
        return statistics.median(self.processor_s) if self.processor_s else None

    def against(self, first: Timing) -> float | None:
        """Median over the rounds of this one's time over the other's in the same round."""
        if not self.wall_s or not first.wall_s:
            return None
        return statistics.median(mine / other for mine, other in zip(self.wall_s, first.wall_s, strict=True))


def time_in_turns(contenders: Sequence[Contender], rounds: int, device: torch.device, apart: bool) -> list[Timing]:
    """Time every contender once a round, after two rounds that do not count.

    Args:
        apart: run all rounds of one contender before the next is built, since they do not fit into memory together.
    """
    groups = [[contender] for contender in contenders] if apart else [list(contenders)]
    timings: list[Timing] = []
    for group in groups:
        timings += _time_group(group, rounds, device)
        # After the group's own frame is gone, and with it the last reference. Models hold themselves in cycles.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return timings


def _time_group(contenders: Sequence[Contender], rounds: int, device: torch.device) -> list[Timing]:
    works: list[Work | None] = [_unless_too_large(contender.build) for contender in contenders]
    found: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for number in range(_WARMUP_ROUNDS + rounds):
        for index, work in enumerate(works):
            if work is None:
                continue
            seconds = _unless_too_large(partial(_timed, work, device))
            if seconds is None:
                works[index], found[index] = None, []
            elif number >= _WARMUP_ROUNDS:
                found[index].append(seconds)
    return [Timing(tuple(wall for wall, _ in each), tuple(own for _, own in each)) for each in found]


def _timed(work: Work, device: torch.device) -> tuple[float, float]:
    _wait_for(device)
    wall, own = time.perf_counter(), time.process_time()
    work()
    _wait_for(device)
    return time.perf_counter() - wall, time.process_time() - own


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _unless_too_large(compute: Callable[[], T]) -> T | None:
    """The result, or None where a GPU's memory does not hold it."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        return None
