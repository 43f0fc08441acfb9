"""The loop of the speech decoder's parts: models of their own, small enough for every process to hold whole."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from stepaudio_train.config.learning import LoopConfig
from stepaudio_train.config.paths import complete_checkpoints, latest_checkpoint
from stepaudio_train.engines.process_group import join_process_group, own_device
from stepaudio_train.tokenizers.learning.parallel import all_sum
from stepaudio_train.training.checkpoints import CheckpointError
from stepaudio_train.training.loggers import LoggedConfig, MetricsLogger, log_to_file
from stepaudio_train.training.run_directory import RunDirectory
from stepaudio_train.training.stop_signal import StopOnSignal

log = logging.getLogger(__name__)

Batch = TypeVar("Batch", contravariant=True)


class Learner(Protocol[Batch]):
    """What learns: models, their optimizers, and how they are measured. Every process has one, and all are equal."""

    def step(self, number: int, batch: Batch) -> dict[str, float]:
        """The update with this number, counted from 1; every process calls it with its share of the batch.

        Returns:
            Metrics of the whole batch, `loss` among them.
        """

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of held-out data after `step`. The first process alone calls it."""

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on bit for bit. The first process alone calls it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


class StartedConfig(LoggedConfig, Protocol):
    """The configuration of what is `started`."""

    @property
    def run_dir(self) -> str: ...

    @property
    def device(self) -> str: ...


class LearningConfig(LoggedConfig, Protocol):
    """The configuration of a run of `learn`."""

    @property
    def training(self) -> LoopConfig: ...


@contextmanager
def started(config: StartedConfig) -> Iterator[tuple[RunDirectory, MetricsLogger | None, torch.device]]:
    """Own the run directory, in a process group, for as long as the block lasts; every process enters it.

    Yields:
        the run directory, the first process's logger (None for the others), and this process's device.

    Raises:
        ConfigError: the run directory cannot be had.
    """
    with ExitStack() as leaving:
        run, is_main = RunDirectory(config.run_dir), int(os.environ.get("RANK", "0")) == 0
        leaving.callback(run.release)
        if is_main:
            run.claim(config)
        device = own_device(config.device)
        join_process_group(device)
        leaving.callback(dist.destroy_process_group)
        # The others write into the folder once it is there.
        dist.barrier()
        log_to_file(run.logs, dist.get_rank())
        logger = MetricsLogger(run, config) if is_main else None
        if logger is not None:
            leaving.callback(logger.close)
        yield run, logger, device


def learn(
    config: LearningConfig,
    learner: Learner[Batch],
    batches: Callable[[int], Iterable[Batch]],
    run: RunDirectory,
    logger: MetricsLogger | None,
) -> bool:
    """Train to `training.max_steps`, going on from the run's newest checkpoint if there is one; every process calls it.

    Args:
        batches: number of a step -> this process's batches from that step on.
        logger: the first process's; None for the others.

    Returns:
        False if SIGTERM ended it early: a checkpoint was saved, the same command goes on from it.

    Raises:
        CheckpointError: one cannot be written; earlier ones are untouched.
    """
    training, first = config.training, 1 + _resume(learner, run)
    if logger is not None:
        run.truncate_metrics(first - 1)
    stop, started_s = StopOnSignal(), time.perf_counter()
    show = logger is not None and config.logging.progress_bar
    bar = tqdm(total=training.max_steps, initial=first - 1, unit="step", disable=not show, dynamic_ncols=True)
    try:
        for step, batch in zip(range(first, training.max_steps + 1), batches(first), strict=False):
            metrics = learner.step(step, batch)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update()
            last = step == training.max_steps
            measured = last or step % training.eval_every == 0
            if logger is not None and (measured or step % training.log_every == 0):
                speed = {"steps_per_s": (step - first + 1) / (time.perf_counter() - started_s)}
                logger.write({"step": step, **metrics, **(learner.measure(step) if measured else {}), **speed})
            # Every process learns of a signal that any of them got, so that all leave behind the same step.
            interrupted = bool(all_sum(torch.tensor(float(stop.asked))))
            if last or interrupted or step % training.checkpoint_every == 0:
                if logger is not None:
                    _save(learner, run.checkpoints, step, training.keep_checkpoints)
                dist.barrier()
            if interrupted:
                return last
    finally:
        bar.close()
        stop.restore()
    return True


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, kept: float, number: int) -> None:
    """Move the running average of a model's weights towards them, after the update with this number.

    Args:
        kept: share of the average that stays; less in the first steps, so that it spans a tenth of the steps so far
            and the first weights are soon forgotten.
    """
    kept = min(kept, number / (number + 10))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - kept)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer's state as safetensors; rates and the like come from the configuration."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    save_file({f"{index}/{key}": value for index, fields in state.items() for key, value in fields.items()}, path)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Read what `save_optimizer` wrote for the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in load_file(path).items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _resume(learner: Learner[Any], run: RunDirectory) -> int:
    """Load the newest checkpoint; its step, 0 if there is none."""
    newest = latest_checkpoint(run.checkpoints)
    if newest is None:
        return 0
    learner.load(newest)
    step = int(newest.name.removeprefix("step_"))
    log.info("going on from step %d", step)
    return step


def _save(learner: Learner[Any], folder: Path, step: int, keep: int) -> None:
    target = folder / f"step_{step:08d}"
    partial = target.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        learner.save(partial)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(folder)
        raise CheckpointError(
            f"{target}: could not be written ({error}). The last complete checkpoint is {last or 'none'}. Once there "
            "is space, the same command goes on from there."
        ) from error
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
