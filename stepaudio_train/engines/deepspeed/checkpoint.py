"""Checkpoints in DeepSpeed's own format, read by its tools, and at another number of ranks or ZeRO stage too.

At the same layout DeepSpeed reads them itself. For another one they are first converted by DeepSpeed's
`ds_to_universal` into a file for each tensor, which are read one by one.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.deepspeed.zero import ADAM_STATES, ZeroModel
from stepaudio_train.engines.hf_model import OTHER_ADAPTERS

_TAG = "state"
_LAYOUT_FILE = "layout.json"


class CheckpointIO:
    """Reads and writes this rank's part of a `ZeroModel`. Every rank calls every method."""

    def __init__(self, zero: ZeroModel, config: RunConfig, dtype: torch.dtype) -> None:
        self._zero = zero
        # As JSON gives it back.
        self._lora = json.loads(json.dumps(asdict(config.lora))) if config.lora is not None else None
        self._layout = {"zero_stage": zero.stage, "world_size": dist.get_world_size(), "dtype": str(dtype)}

    def save(self, directory: Path) -> None:
        self._zero.engine.save_checkpoint(str(directory), tag=_TAG, exclude_frozen_parameters=True)
        if dist.get_rank() == 0:
            layout = {**self._layout, "lora": self._lora, "adam_steps": self._zero.adam_steps()}
            (directory / _LAYOUT_FILE).write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Weights and optimizer.

        Raises:
            UserError: it holds other adapters than this run trains.
        """
        layout = _layout(directory)
        if layout["lora"] != self._lora:
            raise UserError(OTHER_ADAPTERS.format(directory=directory))
        if {key: layout[key] for key in self._layout} == self._layout:
            # Weights that are not trained are not in the file.
            strict = self._lora is None
            path, _ = self._zero.engine.load_checkpoint(str(directory), tag=_TAG, load_module_strict=strict)
            if path is None:
                raise UserError(f"{directory}: DeepSpeed finds no checkpoint there")
        else:
            self._load_converted(directory, layout["adam_steps"])

    def _load_converted(self, directory: Path, adam_steps: int) -> None:
        is_main = dist.get_rank() == 0
        folder = Path(tempfile.mkdtemp(prefix="converting.", dir=directory.parent)) if is_main else directory
        try:
            if is_main:
                _convert(directory / _TAG, folder / "universal")
            if adam_steps:
                self._zero.start_adam(adam_steps)
            for name, parameter in self._zero.named_trained():
                shape = self._zero.shape(parameter)
                for state in ("fp32", *(ADAM_STATES if adam_steps else ())):
                    file = folder / "universal" / "zero" / name / f"{state}.pt"
                    value = _read_converted(file).view(shape) if is_main else torch.empty(0)
                    value = self._zero.broadcast(value, shape)
                    if state == "fp32":
                        self._zero.assign(parameter, value)
                    else:
                        self._zero.assign_state(parameter, state, value)
        finally:
            if is_main:
                shutil.rmtree(folder)


def _layout(directory: Path) -> dict[str, Any]:
    return json.loads((directory / _LAYOUT_FILE).read_text(encoding="utf-8"))


def _read_converted(file: Path) -> Tensor:
    saved = torch.load(file, weights_only=True)
    # ZeRO-3's converter writes tensors bare, the others' puts what it knows of them beside.
    return saved if isinstance(saved, Tensor) else saved["param"]


def _convert(source: Path, target: Path) -> None:
    options = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        # In this process: a fork of one that has joined a process group may hang.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
