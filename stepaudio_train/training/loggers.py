"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and W&B if wanted."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from stepaudio_train.config.compose import to_mapping
from stepaudio_train.config.schema import LoggingConfig
from stepaudio_train.training.run_directory import RunDirectory


class LoggedConfig(Protocol):
    """The configuration of a run, a dataclass."""

    @property
    def logging(self) -> LoggingConfig: ...


class MetricsLogger:
    """Writes one JSON line a step, and mirrors it. Only the main rank has one."""

    def __init__(self, run: RunDirectory, config: LoggedConfig) -> None:
        self._metrics_file = run.metrics_file
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run.path / "tensorboard"))
        if config.logging.wandb != "disabled":
            self._wandb = _start_wandb(run, config)

    def write(self, metrics: dict[str, float | int]) -> None:
        """`metrics` has `step`; a value that is not finite becomes null, which is what JSON has for it."""
        clean = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in metrics.items()}
        # Opened anew: a run that goes on puts a shorter file in its place.
        with self._metrics_file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(clean) + "\n")
        step = int(metrics["step"])
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def write_audio(self, name: str, waveform: Tensor, sample_rate_hz: int, step: int) -> None:
        """Let TensorBoard play [samples] float32."""
        if self._tensorboard is not None:
            self._tensorboard.add_audio(name, waveform.clamp(-1, 1)[None], step, sample_rate_hz)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def log_to_file(folder: Path, rank: int) -> None:
    """Send this rank's log records to `logs/rank<rank>.log`, and the main rank's to stderr as well."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    line = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank{rank}.log", encoding="utf-8")]
    if rank == 0:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(line)
        root.addHandler(handler)


def _start_wandb(run: RunDirectory, config: LoggedConfig) -> Any:
    import wandb

    mode = config.logging.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
    return wandb.init(
        project=config.logging.wandb_project,
        name=run.path.name,
        # The same name on resume continues the same curve.
        id=run.path.resolve().name,
        resume="allow" if mode == "online" else None,
        dir=str(run.path),
        config=to_mapping(config),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off"),
    )
