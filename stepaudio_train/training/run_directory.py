"""The run directory: a contract between a run, its later self, and whoever reads it (docs/run_directory.md)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from stepaudio_train.config.compose import read_config, save_config, to_mapping
from stepaudio_train.config.errors import ConfigError

# What may differ when a run goes on: how it is computed, watched and kept, not what is learned from what.
_FREE_TO_CHANGE = (
    "run_dir",
    "engine",
    "logging",
    "validation",
    "data.held_out",
    "training.max_steps",
    "training.micro_batch_rows",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.async_checkpoint",
    "training.eval_every",
    "training.eval_batches",
    "training.early_stop",
    "training.sample_every",
    "training.num_samples",
    "training.export_hf",
    "model.init",
    "init",
    "device",
    "num_workers",
    "release",
)


class RunDirectory:
    """A folder that one run owns while it runs: resolved config, metrics, checkpoints, logs, report.

    Only the main rank opens it for writing (`claim`); the others read paths.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def claim(self, config: Any) -> None:
        """Take the folder for this process, new or to go on with; write the resolved configuration, a dataclass.

        Raises:
            ConfigError: another process runs in it, it holds something else, or another configuration made it.
        """
        existed = self.path.is_dir() and any(self.path.iterdir())
        if existed and not self.config_file.is_file() and not (self.path / ".lock").is_file():
            raise ConfigError(
                [f"run_dir={self.path}: is not empty and is no run directory; type run_dir=ANOTHER_FOLDER"]
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self.config_file.is_file():
            self._refuse_other_settings(config)
        for folder in (self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)
        temporary = self.config_file.with_suffix(".tmp")
        save_config(config, temporary)
        temporary.replace(self.config_file)

    def release(self) -> None:
        """Give the folder back; also happens when the process ends, however it ends."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def truncate_metrics(self, last_step: int) -> None:
        """Forget metrics after `last_step`: a killed run may have logged steps its checkpoint does not hold."""
        if not self.metrics_file.is_file():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError):
                break  # the line a kill cut in half
            if step <= last_step:
                kept.append(line + "\n")
        temporary = self.metrics_file.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.metrics_file)

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self.release()
            raise ConfigError(
                [f"run_dir={self.path}: in use by {owner}; wait for it, stop it, or type run_dir=ANOTHER_FOLDER"]
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _refuse_other_settings(self, config: Any) -> None:
        before = _flat(to_mapping(read_config(type(config), self.config_file)))
        now = _flat(to_mapping(config))
        changed = [
            f"{key}={now.get(key)!r}: this run directory was made with {before.get(key)!r}; type "
            f"{key}={before.get(key)} to go on, or run_dir=ANOTHER_FOLDER to start anew"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not _free(key)
        ]
        if changed:
            self.release()
            raise ConfigError(changed)


def _free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in _FREE_TO_CHANGE)


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
