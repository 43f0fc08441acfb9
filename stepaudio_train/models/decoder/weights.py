"""State dicts and sizes of the speech decoder's parts, as files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepaudio_train.config.compose import from_mapping
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.data.files import replacing, write_atomically

T = TypeVar("T")

_COUNTERS = {"epoch", "step"}
"""Numbers that CosyVoice's training puts among the tensors of its checkpoints."""


class DecoderWeightError(UserError, ValueError):
    """A file of weights or sizes that cannot be read. The message names the file."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` file as released, on the CPU. No code of a file is run.

    Raises:
        DecoderWeightError: missing or broken file, or one that holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise DecoderWeightError(f"{path}: cannot be read as weights: {error}") from error
    if isinstance(weights, dict):
        weights = {name: value for name, value in weights.items() if name not in _COUNTERS}
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DecoderWeightError(f"{path}: is no state dict; give a file of names and tensors alone")
    return weights


def plain_weights(part: nn.Module) -> dict[str, Tensor]:
    """A part's tensors by their released names, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in part.state_dict().items()}


def write_torch_weights(part: nn.Module, path: Path) -> None:
    """Write a `.pt` file, which the released programs load."""
    with replacing(path) as temporary:
        torch.save(plain_weights(part), temporary)


def write_part(part: nn.Module, settings: Any, folder: Path, name: str) -> None:
    """Write `NAME.safetensors` and the part's sizes, `NAME.json`."""
    write_atomically(folder / f"{name}.json", json.dumps(asdict(settings), indent=1).encode())
    with replacing(folder / f"{name}.safetensors") as temporary:
        save_file(plain_weights(part), temporary)


def read_settings(settings_type: type[T], path: Path, check: Callable[[T], list[str]]) -> T:
    """The sizes that `write_part` wrote.

    Raises:
        DecoderWeightError: missing or broken file, or sizes that `check` finds fault with.
    """
    try:
        settings = from_mapping(settings_type, json.loads(path.read_text(encoding="utf-8")))
        if problems := check(settings):
            raise ConfigError(problems)
    except (OSError, ValueError) as error:
        raise DecoderWeightError(f"{path}: cannot be read as a {settings_type.__name__}: {error}") from error
    return settings
