"""A signal with the outlines of speech, for comparisons and timings where no recording is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.audio.features import SAMPLE_RATE_HZ


def speech_like(num_samples: int, seed: int = 0) -> Tensor:
    """[num_samples] float32 at 16 kHz: a voice that glides in pitch and timbre under syllables, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    time_s = torch.arange(num_samples) / SAMPLE_RATE_HZ
    speeds = 0.5 + torch.rand(3, generator=generator)
    pitch_hz = 140 + 60 * torch.sin(2 * torch.pi * speeds[0] * time_s)
    phase = 2 * torch.pi * torch.cumsum(pitch_hz / SAMPLE_RATE_HZ, dim=0)
    voice = torch.zeros(num_samples)
    for number in range(1, 30):
        formant_hz = 900 + 600 * torch.sin(2 * torch.pi * 2 * speeds[1] * time_s)
        voice += torch.sin(phase * number) * torch.exp(-(((number * pitch_hz - formant_hz) / 700) ** 2))
    syllables = torch.sin(2 * torch.pi * 2 * speeds[2] * time_s).clamp(min=0)
    return 0.2 * voice * syllables + 0.003 * torch.randn(num_samples, generator=generator)
