"""A trained flow as files: `flow.safetensors`, its sizes, `flow.json`, and the speaker encoder that it learned with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepaudio_train.config.compose import from_mapping
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.data.files import replacing, write_atomically
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.speaker import CamPlusEmbedding, SmallSpeakerEncoder, SpeakerEmbedding, SpeakerError
from stepaudio_train.models.decoder.weights import DecoderWeightError, read_weights

WEIGHTS_FILE = "flow.safetensors"
SETTINGS_FILE = "flow.json"
SPEAKER_FILES = ("speaker.safetensors", "campplus.onnx")


class NoSpeaker:
    """Says the same of every voice. A `SpeakerEmbedding`."""

    def __init__(self, size: int) -> None:
        self._size = size

    def embed(self, waveform: Tensor) -> Tensor:
        """[samples] -> zeros [size]."""
        return torch.zeros(self._size)


def save_flow(flow: FlowMatching, folder: Path) -> None:
    """Write a flow, its tensors named as released."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in flow.state_dict().items()}
    write_atomically(folder / SETTINGS_FILE, json.dumps(asdict(flow.config), indent=1).encode())
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary)


def load_flow(folder: Path) -> FlowMatching:
    """Read what `save_flow` wrote, on the CPU.

    Raises:
        DecoderWeightError: a file is missing or broken.
        FlowError: the two do not belong together.
    """
    path = folder / SETTINGS_FILE
    try:
        config = from_mapping(FlowConfig, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise DecoderWeightError(f"{path}: cannot be read as a flow's sizes: {error}") from error
    return FlowMatching.from_state_dict(config, read_weights(folder / WEIGHTS_FILE)).eval()


def load_speaker(path: Path, size: int) -> SpeakerEmbedding:
    """A speaker encoder: a small one that was trained here, or an ONNX file such as `campplus.onnx`.

    Raises:
        SpeakerError: missing or broken file, or vectors of another size.
    """
    if path.suffix == ".onnx":
        return CamPlusEmbedding(path, size)
    encoder = SmallSpeakerEncoder.load(path)
    if encoder.config.dimension != size:
        raise SpeakerError(f"{path}: gives vectors of {encoder.config.dimension}, and the flow takes {size}")
    return encoder


def copy_speaker(path: Path, folder: Path) -> None:
    """Put a speaker encoder beside the flow that learned with it."""
    name = SPEAKER_FILES[path.suffix == ".onnx"]
    with replacing(folder / name) as temporary:
        shutil.copyfile(path, temporary)


def find_speaker(folder: Path, size: int) -> SpeakerEmbedding:
    """The speaker encoder beside a flow; where there is none, the flow learned without.

    Raises: as `load_speaker`.
    """
    found = next((folder / name for name in SPEAKER_FILES if (folder / name).is_file()), None)
    return NoSpeaker(size) if found is None else load_speaker(found, size)
