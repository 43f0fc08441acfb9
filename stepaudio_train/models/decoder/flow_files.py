"""A trained flow as files: `flow.safetensors`, its sizes, `flow.json`, and the speaker encoder that it learned with."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from stepaudio_train.config.decoder import FlowConfig, flow_problems
from stepaudio_train.data.files import replacing
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.speaker import CamPlusEmbedding, SmallSpeakerEncoder, SpeakerEmbedding, SpeakerError
from stepaudio_train.models.decoder.weights import read_settings, read_weights, write_part

_NAME = "flow"
SPEAKER_FILES = ("speaker.safetensors", "campplus.onnx")


class NoSpeaker:
    """Says the same of every voice. A `SpeakerEmbedding`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def embed(self, waveform: Tensor) -> Tensor:
        """[samples] -> zeros [size]."""
        return torch.zeros(self.size)


def save_flow(flow: FlowMatching, folder: Path) -> None:
    """Write a flow, its tensors named as released."""
    write_part(flow, flow.config, folder, _NAME)


def load_flow(folder: Path) -> FlowMatching:
    """Read what `save_flow` wrote, on the CPU.

    Raises:
        DecoderWeightError: a file is missing or broken.
        FlowError: the two do not belong together.
    """
    config = read_settings(FlowConfig, folder / f"{_NAME}.json", flow_problems)
    return FlowMatching.from_state_dict(config, read_weights(folder / f"{_NAME}.safetensors")).eval()


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


def speaker_file(folder: Path) -> Path | None:
    """The speaker encoder beside a flow; None where the flow learned without."""
    return next((folder / name for name in SPEAKER_FILES if (folder / name).is_file()), None)


def find_speaker(folder: Path, size: int) -> SpeakerEmbedding:
    """The speaker encoder beside a flow, or what stands for none.

    Raises: as `load_speaker`.
    """
    found = speaker_file(folder)
    return NoSpeaker(size) if found is None else load_speaker(found, size)
