"""Checkpoints that are whole or absent: written beside, renamed when complete."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.paths import complete_checkpoints, latest_checkpoint
from stepaudio_train.data.loader import TrainLoader
from stepaudio_train.engines.base import Engine
from stepaudio_train.models.step1.lora import adapter_shapes
from stepaudio_train.training.early_stop import Best

log = logging.getLogger(__name__)

_STATE_FILE = "state.json"


class CheckpointError(UserError):
    """A checkpoint could not be written or read. Earlier ones are untouched."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, besides weights, optimizer and data."""

    step: int
    tokens: int
    """Tokens seen by the model, padding not counted."""
    elapsed_s: float
    engine: str
    best: Best | None = None
    """With training.early_stop: its checkpoint is there for as long as this one."""


class Checkpoints:
    """`checkpoints/step_XXXXXXXX/{engine/, loader/, state.json}` of one run."""

    def __init__(self, folder: Path, engine: Engine, loader: TrainLoader, keep: int) -> None:
        self._folder, self._engine, self._loader, self._keep = folder, engine, loader, keep
        self._pending: tuple[Path, TrainingState] | None = None

    def save(self, state: TrainingState, background: bool = False) -> None:
        """Write a checkpoint; every rank calls it.

        Raises:
            CheckpointError: the disk is full or a file could not be written.
        """
        self.settle(wait=True)
        target = self._place(state.step)
        if target.is_dir():
            return
        partial = target.with_suffix(".partial")
        try:
            self._make_room(partial)
            self._engine.save(partial / "engine", background)
            if self._engine.is_replica_main:
                self._loader.save(partial / "loader")
            self._pending = (target, state)
            self.settle(wait=not background)
        except Exception as error:
            self._pending = None
            if self._engine.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            last = latest_checkpoint(self._folder)
            raise CheckpointError(
                f"{target}: could not be written ({error}). The last complete checkpoint is {last or 'none'}. Once "
                "there is space, the same command goes on from there."
            ) from error

    def _make_room(self, partial: Path) -> None:
        """An empty folder to write into, made by the main rank; if it cannot, every rank raises."""
        problem: OSError | None = None
        if self._engine.is_main:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                _require_space(self._folder, _num_saved(self._engine))
                (partial / "engine").mkdir(parents=True)
                (partial / "loader").mkdir()
            except OSError as error:
                problem = error
        if self._engine.any_rank(problem is not None):
            raise problem or OSError("the main rank could not make room for it")

    def settle(self, wait: bool) -> None:
        """Put a finished checkpoint in its place. Every rank calls it; with `wait`, it returns when none is open."""
        if self._pending is None or not self._engine.finish_saving(wait):
            return
        self._engine.barrier()
        target, state = self._pending
        self._pending = None
        if self._engine.is_main:
            partial = target.with_suffix(".partial")
            (partial / _STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            partial.rename(target)
            best = self._place(state.best.step) if state.best is not None else None
            for old in complete_checkpoints(self._folder)[: -self._keep]:
                if old != best:
                    shutil.rmtree(old)
            log.info("saved %s", target)
        self._engine.barrier()

    def resume(self) -> TrainingState | None:
        """Load the newest complete checkpoint into engine and loader; None if there is none.

        Raises:
            CheckpointError: it was written by another engine.
        """
        newest = latest_checkpoint(self._folder)
        if newest is None:
            return None
        state = read_state(newest)
        require_same_engine(newest, state, self._engine.config.engine.name)
        self._engine.load(newest / "engine")
        self._loader.load(newest / "loader")
        return state

    def return_to(self, step: int) -> None:
        """Load the engine, not the loader, as it was at `step`; every rank calls it.

        Raises:
            CheckpointError: that checkpoint is gone.
        """
        checkpoint = self._place(step)
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{checkpoint}: held the run's best weights and is gone; put it back, or type training.early_stop=null"
            )
        self._engine.load(checkpoint / "engine")

    def _place(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"


def read_state(checkpoint: Path) -> TrainingState:
    fields = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    best = fields.pop("best", None)
    return TrainingState(**fields, best=Best(**best) if best is not None else None)


def require_same_engine(checkpoint: Path, state: TrainingState, engine: str) -> None:
    """Checkpoints load at any layout of the engine that wrote them, not in another engine.

    Raises:
        CheckpointError: saying what to type.
    """
    if state.engine != engine:
        raise CheckpointError(
            f"{checkpoint}: was written by engine={state.engine}; type engine={state.engine}, or start another run "
            f"from the weights with model.init=RUN_DIR, which reads any engine's checkpoints"
        )


def _num_saved(engine: Engine) -> int:
    """Parameters that a checkpoint holds: with adapters, they alone."""
    lora = engine.config.lora
    if lora is None:
        return engine.num_parameters()
    return sum(math.prod(shape) for shape in adapter_shapes(engine.config.model, lora).values())


def _require_space(folder: Path, num_parameters: int) -> None:
    # fp32 weights and Adam's two moments, on the safe side of what any engine writes.
    needed_bytes = 13 * num_parameters
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OSError(f"disk full: about {needed_bytes / 2**30:.2f} GiB needed, {free_bytes / 2**30:.2f} GiB free")
