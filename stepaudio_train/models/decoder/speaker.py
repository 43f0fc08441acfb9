"""A voice as a vector, which the flow-matching model is conditioned on (formats.md 5.1 and 7).

Shapes: B clips, T frames of 10 ms, M = 80 mel bins, D the embedding's dimension.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import onnxruntime
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepaudio_train.audio.features import SAMPLE_RATE_HZ, kaldi_fbank
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.data.files import replacing

NUM_MEL_BINS = 80
_MIN_SAMPLES = SAMPLE_RATE_HZ // 10
_CONFIG_KEY = "speaker_encoder"
VARIANCE_FLOOR = 1e-5


class SpeakerError(UserError, ValueError):
    """A file is no speaker encoder, or a recording has no voice to take. The message says why."""


class SpeakerEmbedding(Protocol):
    """What makes a vector of a voice."""

    def embed(self, waveform: Tensor) -> Tensor:
        """[samples] float32 at 16 kHz -> [D] float32.

        Raises:
            SpeakerError: under 0.1 s.
        """
        ...


class CamPlusEmbedding:
    """CAM++ (arXiv 2303.00332) as released: `campplus.onnx` of the CosyVoice directory.

    Its vector is not normalised: the flow-matching model does that. Other encoders of the same project that were
    exported with the same interface (ERes2Net) work too.
    """

    def __init__(self, path: Path, dimension: int | None = 192) -> None:
        """
        Args:
            dimension: what the file's vectors must have; None takes any.

        Raises:
            SpeakerError: missing or broken file, or another interface.
        """
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1  # as the released program; its result does not depend on the machine
        try:
            self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no class in common
            raise SpeakerError(f"{path}: cannot be loaded as ONNX: {error}") from error
        taken, given = self._session.get_inputs(), self._session.get_outputs()
        if [len(value.shape) for value in taken] != [3] or taken[0].shape[2] != NUM_MEL_BINS:
            raise SpeakerError(
                f"{path}: takes {[value.shape for value in taken]}, but a speaker encoder takes one input "
                f"[batch, frames, {NUM_MEL_BINS}]; give campplus.onnx"
            )
        if dimension is not None and given[0].shape[-1] != dimension:
            raise SpeakerError(f"{path}: gives vectors of {given[0].shape[-1]}, not of {dimension}; give campplus.onnx")
        self._input = taken[0].name

    def embed(self, waveform: Tensor) -> Tensor:
        """See `SpeakerEmbedding`."""
        features = speaker_features(waveform).numpy()
        return torch.from_numpy(self._session.run(None, {self._input: features[None]})[0]).reshape(-1)


class SmallSpeakerEncoder(nn.Module):
    """The default: convolutions over time, mean and deviation over the clip, a vector of length 1.

    An x-vector (Snyder et al. 2018) of a twentieth of the size.
    """

    def __init__(self, config: SpeakerEncoderConfig) -> None:
        super().__init__()
        self.config = config
        size = config.channels
        self.frames = nn.Sequential(
            *_layer(NUM_MEL_BINS, size, 5, 1),
            *_layer(size, size, 3, 2),
            *_layer(size, size, 3, 3),
            *_layer(size, 2 * size, 1, 1),
        )
        self.voice = nn.Linear(4 * size, config.dimension)

    @classmethod
    def load(cls, path: Path) -> SmallSpeakerEncoder:
        """Read what `save` wrote.

        Raises:
            SpeakerError: missing or broken file, or one that holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                settings = (file.metadata() or {}).get(_CONFIG_KEY, "")
                encoder = cls(TypeAdapter(SpeakerEncoderConfig).validate_json(settings))
                encoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, ValidationError, RuntimeError) as error:
            raise SpeakerError(f"{path}: cannot be loaded as a speaker encoder: {error}") from error
        return encoder.eval()

    def save(self, path: Path) -> None:
        """Write sizes and weights as one safetensors file, whole or not at all."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(path) as temporary:
            save_file(weights, temporary, {_CONFIG_KEY: json.dumps(asdict(self.config))})

    def forward(self, features: Tensor) -> Tensor:
        """`speaker_features` [B, T, M] of one length -> [B, D] of length 1."""
        x = self.frames(features.transpose(1, 2))
        deviation = x.var(dim=2, correction=0).clamp(min=VARIANCE_FLOOR).sqrt()
        return F.normalize(self.voice(torch.cat([x.mean(dim=2), deviation], dim=1)), dim=1)

    @torch.inference_mode()
    def embed(self, waveform: Tensor) -> Tensor:
        """See `SpeakerEmbedding`. In evaluation mode."""
        device = self.voice.weight.device
        return self(speaker_features(waveform)[None].to(device))[0].cpu()


class CachedEmbedding:
    """Remembers each waveform's vector, by its content: a prompt is taken once, wherever it comes from."""

    def __init__(self, embedding: SpeakerEmbedding) -> None:
        self._embedding = embedding
        self._known: dict[bytes, Tensor] = {}

    def embed(self, waveform: Tensor) -> Tensor:
        """See `SpeakerEmbedding`."""
        key = hashlib.sha256(waveform.numpy().tobytes()).digest()
        if key not in self._known:
            self._known[key] = self._embedding.embed(waveform)
        return self._known[key].clone()


def speaker_features(waveform: Tensor) -> Tensor:
    """What speaker encoders hear: Kaldi's fbank of unscaled samples, without its mean over time (formats.md 7).

    Args:
        waveform: [samples] float32 at 16 kHz, neither trimmed nor levelled.

    Returns:
        [T, M] float32 in nats.

    Raises:
        SpeakerError: under 0.1 s.
    """
    check_voice(waveform)
    num_samples = torch.tensor([len(waveform)])
    (features,), _ = kaldi_fbank(waveform[None], num_samples, NUM_MEL_BINS, window="povey", full_scale=1.0)
    return features - features.mean(dim=0)


def check_voice(waveform: Tensor) -> None:
    """Raises:
    SpeakerError: [samples] at 16 kHz are under 0.1 s.
    """
    if len(waveform) < _MIN_SAMPLES:
        raise SpeakerError(f"a voice is taken of 0.1 s at least, and this is {len(waveform) / SAMPLE_RATE_HZ:.3f} s")


def _layer(inputs: int, outputs: int, kernel: int, dilation: int) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=padding), nn.ReLU(), nn.BatchNorm1d(outputs)]
