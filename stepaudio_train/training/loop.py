"""The one training loop: batches in, metrics and checkpoints out, whatever the engine and the objective."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.data.batch import TASKS, TokenBatch
from stepaudio_train.data.loader import TrainLoader
from stepaudio_train.engines.base import Engine, NonFiniteError, StepResult
from stepaudio_train.engines.precision import choose_dtype
from stepaudio_train.models.step1.lora import write_adapters
from stepaudio_train.objectives.base import Objective
from stepaudio_train.training.balance import BatchLoad, balanced
from stepaudio_train.training.checkpoints import Checkpoints, TrainingState
from stepaudio_train.training.early_stop import Best, EarlyStop
from stepaudio_train.training.loggers import MetricsLogger
from stepaudio_train.training.memory_log import MemoryLog
from stepaudio_train.training.report import read_metrics, write_run_report
from stepaudio_train.training.run_directory import RunDirectory
from stepaudio_train.training.schedule import learning_rate_at
from stepaudio_train.training.stop_signal import StopOnSignal
from stepaudio_train.training.throughput import peak_flops_per_s, training_flops
from stepaudio_train.training.weights import export, initialise

log = logging.getLogger(__name__)

Sums = Mapping[str, tuple[float, float]]
"""Name of a metric -> (sum, weight) over a global batch, or over several."""


class Sampler(Protocol):
    """Shows what the model says while it learns."""

    @property
    def every_steps(self) -> int: ...

    def __call__(self, engine: Engine, step: int) -> None:
        """Every rank calls it, with the weights as they are after `step`."""


def means(sums: Sums) -> dict[str, float]:
    """Every sum over its weight; what has no weight is left out."""
    return {name: total / weight for name, (total, weight) in sums.items() if weight > 0}


def fit(
    config: RunConfig,
    engine: Engine,
    loader: TrainLoader,
    objective: Objective,
    run: RunDirectory,
    validation: Sequence[TokenBatch] = (),
    sampler: Sampler | None = None,
    summarise: Callable[[Sums], dict[str, float]] = means,
    report: Callable[[Path], Path] = write_run_report,
    rate_at: Callable[[int], float] | None = None,
) -> bool:
    """Train to `training.max_steps`, or until `training.early_stop` ends it, going on from the run's newest checkpoint
    if there is one.

    Args:
        summarise: from the objective's sums to the metrics that are logged.
        report: writes report.html of a run directory.
        rate_at: learning rate of a step, counted from 1; None: as `optimizer` has it over all steps.

    Returns:
        False if SIGTERM ended it early: a checkpoint was saved, the same command goes on from it.

    Raises:
        NonFiniteError: on every rank, after writing the batch to `nonfinite/`.
        CheckpointError: nothing earlier is lost.
    """
    training = config.training
    checkpoints = Checkpoints(run.checkpoints, engine, loader, training.keep_checkpoints)
    state = _begin(config, engine, checkpoints)
    if engine.is_main:
        run.truncate_metrics(state.step)
    engine.barrier()
    early_stop = EarlyStop(training.early_stop, state.best)
    stop = StopOnSignal()
    memory = MemoryLog(config, engine)
    meter = _Meter(config, engine, state, summarise)
    display = _Display(config, engine, run, state.step)
    if rate_at is None:
        rate_at = partial(learning_rate_at, max_steps=training.max_steps, config=config.optimizer)
    finished, step = True, state.step
    try:
        for step in range(state.step + 1, (state.step if early_stop.reached else training.max_steps) + 1):
            rate = rate_at(step)
            batch, load = balanced(loader.next_batch(), engine)
            result = _step_or_report(engine, batch, objective, rate, step, run, training.micro_batch_rows)
            metrics = meter.measure(step, load, result, rate)
            memory.after_step()
            last = step == training.max_steps
            evaluated = bool(validation) and (last or _every(training.eval_every, step))
            if evaluated:
                found = summarise(_evaluated(engine, validation, objective, training.micro_batch_rows))
                metrics |= {f"val/{name}": value for name, value in found.items()}
                early_stop.judge(step, metrics)
                last = last or early_stop.reached
            display.show(metrics, write=last or evaluated or step % training.log_every == 0)
            if sampler is not None and not last and _every(sampler.every_steps, step):
                sampler(engine, step)
            checkpoints.settle(wait=False)
            interrupted = engine.any_rank(stop.asked)
            is_best = early_stop.best is not None and early_stop.best.step == step
            if interrupted or last or is_best or _every(training.checkpoint_every, step):
                background = training.async_checkpoint and not (interrupted or last)
                checkpoints.save(meter.state(step, early_stop.best), background)
            if interrupted or last:
                finished = last
                break
        checkpoints.settle(wait=True)
    finally:
        display.close()
        stop.restore()
    if finished:
        _write_result(config, engine, run, _best_step(step, early_stop, checkpoints), sampler)
    if engine.is_main:
        report(run.path)
    return finished


def _begin(config: RunConfig, engine: Engine, checkpoints: Checkpoints) -> TrainingState:
    """Load the newest checkpoint, or the first weights where there is none."""
    if config.lora is not None:
        # Checkpoints of adapters do not hold the weights that they adapt.
        initialise(engine, config)
    state = checkpoints.resume()
    if state is not None:
        log.info("going on from step %d", state.step)
        return state
    if config.lora is None:
        initialise(engine, config)
    return TrainingState(0, 0, 0.0, config.engine.name)


def _best_step(step: int, early_stop: EarlyStop, checkpoints: Checkpoints) -> int:
    """The step whose weights are the result, which the engine has then: the last, or an earlier one that was better."""
    best = early_stop.best
    if best is None or best.step == step:
        return step
    checkpoints.return_to(best.step)
    log.info("the best weights, of step %d, are the result", best.step)
    return best.step


def _write_result(config: RunConfig, engine: Engine, run: RunDirectory, step: int, sampler: Sampler | None) -> None:
    """Samples, export and adapters of the engine's weights, those of `step`."""
    if sampler is not None:
        sampler(engine, step)
    if config.training.export_hf:
        export(engine, run.export, config.vocabulary.text_tokenizer, _card_metrics(step, run))
    if config.lora is not None:
        adapters = dict(engine.adapters())
        if engine.is_main:
            write_adapters(run.path / "adapters", adapters, config.lora, config.model.init)


def _every(steps: int, step: int) -> bool:
    """Whether something is due at `step` that is done every so many steps; 0: never."""
    return steps > 0 and step % steps == 0


def _card_metrics(step: int, run: RunDirectory) -> dict[str, float]:
    """Losses of a step, and all that was measured on held-out data; none if it was not logged."""
    lines = (line for line in read_metrics(run.metrics_file) if line["step"] == step)
    metrics = next(lines, {})
    return {name: value for name, value in metrics.items() if name.startswith(("loss", "val/"))}


class _Display:
    """The progress bar, and the files and services that metrics go to; silent but on the main rank."""

    def __init__(self, config: RunConfig, engine: Engine, run: RunDirectory, step: int) -> None:
        self._logger = MetricsLogger(run, config) if engine.is_main else None
        self._bar = tqdm(
            total=config.training.max_steps,
            initial=step,
            unit="step",
            disable=not (engine.is_main and config.logging.progress_bar),
            dynamic_ncols=True,
        )

    def show(self, metrics: dict[str, float | int], write: bool) -> None:
        """Count a step; `write` its metrics too."""
        if self._logger is not None and write:
            self._logger.write(metrics)
        self._bar.update()
        told = f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s"
        self._bar.set_postfix_str(told, refresh=False)

    def close(self) -> None:
        self._bar.close()
        if self._logger is not None:
            self._logger.close()


class _Meter:
    """Turns step results into the metrics of a line, and keeps the running totals."""

    def __init__(
        self, config: RunConfig, engine: Engine, state: TrainingState, summarise: Callable[[Sums], dict[str, float]]
    ) -> None:
        self._config, self._engine, self._summarise = config, engine, summarise
        self._tokens, self._elapsed_s = state.tokens, state.elapsed_s
        dtype = choose_dtype(config.engine.precision, engine.device)
        self._peak = peak_flops_per_s(engine.device, dtype)
        self._last = time.perf_counter()

    def measure(self, step: int, load: BatchLoad, result: StepResult, rate: float) -> dict[str, float | int]:
        now = time.perf_counter()
        duration_s, self._last = now - self._last, now
        self._tokens += load.num_tokens
        self._elapsed_s += duration_s
        metrics: dict[str, float | int] = {
            "step": step,
            **self._summarise(result.metrics),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens": self._tokens,
            "tokens_per_s": load.num_tokens / duration_s,
            "elapsed_s": self._elapsed_s,
            "packing/fill": load.fill,
            "packing/cost_max_over_mean": load.cost_max_over_mean,
        }
        if self._peak is not None:
            flops = training_flops(self._config.model, load.num_tokens, load.squared_lengths)
            metrics["mfu"] = flops / duration_s / (self._peak * self._engine.world_size)
        return metrics

    def state(self, step: int, best: Best | None) -> TrainingState:
        return TrainingState(step, self._tokens, self._elapsed_s, self._config.engine.name, best)


def _evaluated(engine: Engine, batches: Sequence[TokenBatch], objective: Objective, micro_batch_rows: int) -> Sums:
    totals: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, (total, weight) in engine.evaluate(batch.split(micro_batch_rows), objective).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + weight)
    return totals


def _step_or_report(
    engine: Engine,
    batch: TokenBatch,
    objective: Objective,
    rate: float,
    step: int,
    run: RunDirectory,
    micro_batch_rows: int,
) -> StepResult:
    try:
        return engine.train_step(batch.split(micro_batch_rows), objective, rate)
    except NonFiniteError as error:
        folder = run.path / "nonfinite"
        if engine.is_replica_main:
            folder.mkdir(exist_ok=True)
            name = f"step_{step:08d}.replica{engine.data_parallel_rank}"
            tensors = {k: v.contiguous() for k, v in batch.named_tensors().items()}
            save_file(tensors, folder / f"{name}.safetensors")
            present = [TASKS[i] for i in torch.unique(batch.tasks).tolist()]
            summary = {
                "step": step,
                "reason": str(error),
                "learning_rate": rate,
                "rows": batch.num_rows,
                "tasks": present,
                "highest_id": int(batch.input_ids.max()),
                "loss_weight": float(batch.loss_weights.sum()),
            }
            (folder / f"{name}.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        raise NonFiniteError(
            f"step {step}: {error}; no weight was changed. The batch is in {folder}, the last checkpoint in "
            f"{run.checkpoints}. A lower optimizer.learning_rate or optimizer.clip_grad_norm often helps."
        ) from error
