"""State dicts of the speech decoder's parts, as files."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepaudio_train.config.errors import UserError


class DecoderWeightError(UserError, ValueError):
    """A file of weights that cannot be read. The message names the file."""


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
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DecoderWeightError(f"{path}: is no state dict; give a file of names and tensors alone")
    return weights
