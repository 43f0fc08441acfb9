"""A trained vocoder as files: `hift.safetensors` and its sizes, `hift.json`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from stepaudio_train.config.compose import from_mapping
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.vocoder import VocoderConfig
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.weights import DecoderWeightError, read_weights

WEIGHTS_FILE = "hift.safetensors"
SETTINGS_FILE = "hift.json"
RELEASED_FILE = "hift.pt"


def save_vocoder(vocoder: HiFTGenerator, folder: Path, release: bool = False) -> None:
    """Write a vocoder, its tensors named as released.

    Args:
        release: write the same as `hift.pt` too, the file that the released programs load.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in vocoder.state_dict().items()}
    write_atomically(folder / SETTINGS_FILE, json.dumps(asdict(vocoder.config), indent=1).encode())
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary)
    if release:
        with replacing(folder / RELEASED_FILE) as temporary:
            torch.save(weights, temporary)


def load_vocoder(folder: Path) -> HiFTGenerator:
    """Read what `save_vocoder` wrote, on the CPU.

    Raises:
        DecoderWeightError: a file is missing or broken, or the two do not belong together.
    """
    path = folder / SETTINGS_FILE
    try:
        vocoder = HiFTGenerator(from_mapping(VocoderConfig, json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, ConfigError) as error:
        raise DecoderWeightError(f"{path}: cannot be read as a vocoder's sizes: {error}") from error
    load_vocoder_weights(vocoder, folder / WEIGHTS_FILE)
    return vocoder.eval()


def load_vocoder_weights(vocoder: HiFTGenerator, path: Path) -> None:
    """Read weights of a vocoder's own sizes into it: a released `hift.pt`, or a `hift.safetensors`.

    Raises:
        DecoderWeightError: missing or broken file, or other sizes.
    """
    try:
        vocoder.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise DecoderWeightError(f"{path}: is not of the configured sizes: {error}") from error
