"""The one training loop: batches in, metrics and checkpoints out, whatever the engine and the objective."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Sequence
from types import FrameType

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
from stepaudio_train.training.checkpoints import Checkpoints, TrainingState
from stepaudio_train.training.loggers import MetricsLogger
from stepaudio_train.training.report import read_metrics, write_run_report
from stepaudio_train.training.run_directory import RunDirectory
from stepaudio_train.training.schedule import learning_rate_at
from stepaudio_train.training.throughput import peak_flops_per_s, sum_of_squared_lengths, training_flops
from stepaudio_train.training.weights import export, initialise

log = logging.getLogger(__name__)


def fit(
    config: RunConfig,
    engine: Engine,
    loader: TrainLoader,
    objective: Objective,
    run: RunDirectory,
    validation: Sequence[TokenBatch] = (),
) -> bool:
    """Train to `training.max_steps`, going on from the run's newest checkpoint if there is one.

    Returns:
        False if SIGTERM ended it early: a checkpoint was saved, the same command goes on from it.

    Raises:
        NonFiniteError: on every rank, after writing the batch to `nonfinite/`.
        CheckpointError: nothing earlier is lost.
    """
    training = config.training
    checkpoints = Checkpoints(run.checkpoints, engine, loader, training.keep_checkpoints)
    if config.lora is not None:
        # Checkpoints of adapters do not hold the weights that they adapt.
        initialise(engine, config)
    state = checkpoints.resume()
    if state is None:
        if config.lora is None:
            initialise(engine, config)
        state = TrainingState(0, 0, 0.0, config.engine.name)
    else:
        log.info("going on from step %d", state.step)
    if engine.is_main:
        run.truncate_metrics(state.step)
    engine.barrier()
    stop = _StopOnSignal()
    meter = _Meter(config, engine, state)
    logger = MetricsLogger(run, config) if engine.is_main else None
    bar = tqdm(
        total=training.max_steps,
        initial=state.step,
        unit="step",
        disable=not (engine.is_main and config.logging.progress_bar),
        dynamic_ncols=True,
    )
    finished = True
    try:
        for step in range(state.step + 1, training.max_steps + 1):
            rate = learning_rate_at(step, training.max_steps, config.optimizer)
            batch = loader.next_batch()
            result = _step_or_report(engine, batch, objective, rate, step, run, training.micro_batch_rows)
            metrics = meter.measure(step, batch, result, rate)
            last = step == training.max_steps
            if validation and (last or (training.eval_every and step % training.eval_every == 0)):
                metrics |= _evaluated(engine, validation, objective, training.micro_batch_rows)
            if logger is not None and (last or step % training.log_every == 0):
                logger.write(metrics)
            bar.update()
            bar.set_postfix_str(f"loss {result.loss:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s", refresh=False)
            checkpoints.settle(wait=False)
            interrupted = engine.any_rank(stop.asked)
            if interrupted or last or (training.checkpoint_every and step % training.checkpoint_every == 0):
                background = training.async_checkpoint and not (interrupted or last)
                checkpoints.save(meter.state(step), background)
            if interrupted:
                finished = last
                break
        checkpoints.settle(wait=True)
    finally:
        bar.close()
        stop.restore()
        if logger is not None:
            logger.close()
    if finished and training.export_hf:
        export(engine, run.export, config.vocabulary.text_tokenizer, _last_losses(run))
    if finished and config.lora is not None:
        adapters = dict(engine.adapters())
        if engine.is_main:
            write_adapters(run.path / "adapters", adapters, config.lora, config.model.init)
    if engine.is_main:
        write_run_report(run.path)
    return finished


def _last_losses(run: RunDirectory) -> dict[str, float]:
    """Losses of the last logged step, held-out ones among them."""
    lines = read_metrics(run.metrics_file)
    last = lines[-1] if lines else {}
    return {name: value for name, value in last.items() if name.removeprefix("val/").startswith("loss")}


class _StopOnSignal:
    """Remembers a SIGTERM (from a scheduler) or SIGINT, so that the step in hand can end and be saved."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Meter:
    """Turns step results into the metrics of a line, and keeps the running totals."""

    def __init__(self, config: RunConfig, engine: Engine, state: TrainingState) -> None:
        self._config, self._engine = config, engine
        self._tokens, self._elapsed_s = state.tokens, state.elapsed_s
        dtype = choose_dtype(config.engine.precision, engine.device)
        self._peak = peak_flops_per_s(engine.device, dtype)
        self._last = time.perf_counter()

    def measure(self, step: int, batch: TokenBatch, result: StepResult, rate: float) -> dict[str, float | int]:
        now = time.perf_counter()
        duration_s, self._last = now - self._last, now
        # Padding is one document at the end of a row; other ranks' rows are taken to be as full as this rank's.
        replicas = self._engine.data_parallel_size
        num_tokens = int((batch.input_ids != 0).sum()) * replicas
        self._tokens += num_tokens
        self._elapsed_s += duration_s
        metrics: dict[str, float | int] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens": self._tokens,
            "tokens_per_s": num_tokens / duration_s,
            "elapsed_s": self._elapsed_s,
        }
        if self._peak is not None:
            flops = training_flops(self._config.model, num_tokens, sum_of_squared_lengths(batch.documents) * replicas)
            metrics["mfu"] = flops / duration_s / (self._peak * self._engine.world_size)
        return metrics | _means(result.metrics)

    def state(self, step: int) -> TrainingState:
        return TrainingState(step, self._tokens, self._elapsed_s, self._config.engine.name)


def _means(metrics: dict[str, tuple[float, float]], prefix: str = "") -> dict[str, float]:
    return {prefix + name: total / weight for name, (total, weight) in metrics.items() if weight > 0}


def _evaluated(
    engine: Engine, batches: Sequence[TokenBatch], objective: Objective, micro_batch_rows: int
) -> dict[str, float]:
    totals: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, (total, weight) in engine.evaluate(batch.split(micro_batch_rows), objective).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + total, before[1] + weight)
    return _means(totals, "val/")


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
            save_file({k: v.contiguous() for k, v in vars(batch).items()}, folder / f"{name}.safetensors")
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
