"""Fundamental frequency by YIN (de Cheveigne and Kawahara, J. Acoust. Soc. Am. 111(4), 2002), steps 1 to 5."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST_HZ, HIGHEST_HZ = 50.0, 600.0
_THRESHOLD = 0.2
"""Largest share of a frame's power that may be aperiodic. The paper's 0.1 loses voices in a little noise."""
_SILENCE_POWER = 1e-9
"""-90 dB of full scale; quieter frames have no pitch."""
_FRAMES_AT_ONCE = 1024


class Pitch(NamedTuple):
    """A pitch contour."""

    f0_hz: Tensor
    """[frames] float32; 0 where there is no voice."""
    hop_samples: int
    """Frame i is centred at sample (i + 0.5) * hop_samples."""


def yin(waveform: Tensor, sample_rate_hz: int, hop_s: float = 0.01) -> Pitch:
    """Pitch between 50 and 600 Hz in frames of 40 ms.

    Args:
        waveform: [samples] at any rate; frames that reach beyond its ends see zeros there.
        hop_s: from one frame to the next.

    Returns:
        samples // hop frames.
    """
    hop = round(hop_s * sample_rate_hz)
    longest = math.ceil(sample_rate_hz / LOWEST_HZ) + 1
    num_frames = len(waveform) // hop
    if not num_frames:
        return Pitch(torch.zeros(0), hop)
    # float64: the difference of a periodic signal is a small difference of large numbers.
    padded = F.pad(waveform.double(), (longest, longest + hop))
    frames = padded[hop // 2 :].unfold(0, 2 * longest, hop)[:num_frames]
    parts = [_pitch_of(block, sample_rate_hz) for block in frames.split(_FRAMES_AT_ONCE)]
    return Pitch(torch.cat(parts).float(), hop)


def _pitch_of(frames: Tensor, sample_rate_hz: int) -> Tensor:
    """[frames, 2 * lags] samples -> [frames] Hz, 0 where there is no period that is good enough."""
    difference = _difference(frames)
    lags = torch.arange(difference.shape[1])
    # Step 3: relative to the mean over shorter lags, so that lag 0 is no candidate. Where all are 0: a constant.
    total = difference.cumsum(dim=1)
    normalised = torch.where(total > 0, difference * lags / total.clamp(min=1e-30), 1.0)
    here = normalised[:, 1:-1]
    lowest = (here < _THRESHOLD) & (here <= normalised[:, :-2]) & (here < normalised[:, 2:])
    lowest &= lags[1:-1] >= math.floor(sample_rate_hz / HIGHEST_HZ)
    lowest &= frames.square().mean(dim=1, keepdim=True) > _SILENCE_POWER
    lag = lowest.int().argmax(dim=1) + 1  # step 4: the first one
    left, middle, right = (difference.gather(1, (lag + step)[:, None])[:, 0] for step in (-1, 0, 1))
    curvature = left - 2 * middle + right
    shift = torch.where(curvature > 0, (left - right) / (2 * curvature), 0.0).clamp(-1, 1)
    return torch.where(lowest.any(dim=1), sample_rate_hz / (lag + shift), 0.0)


def _difference(frames: Tensor) -> Tensor:
    """Steps 1 and 2: squared difference of a frame's first half and what lies `lag` later, [frames, lags]."""
    size = frames.shape[1]
    window = size // 2
    centred = frames - frames.mean(dim=1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=size)
    first = torch.fft.rfft(centred[:, :window], n=size)
    # Lags stay under half the size, so that the circular correlation does not wrap.
    correlation = torch.fft.irfft(first.conj() * spectrum, n=size)[:, :window]
    energy = F.pad(centred.square().cumsum(dim=1), (1, 0))
    energies = energy[:, window:size] - energy[:, :window]
    return (energies[:, :1] + energies - 2 * correlation).clamp(min=0)
