"""Change of the sample rate, by the formula of torchaudio's Resample with its defaults.

The released tokenizer hears its recordings through it, so training data must too.

A sample of the result is a sum over the neighbours of its place in the original, weighted by a sinc that ends after six
zero crossings under a squared cosine (Hann). The sinc's cut-off lies at 0.99 of the lower of the two Nyquist rates.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_ZERO_CROSSINGS = 6
_ROLL_OFF = 0.99
_BLOCK_SAMPLES = 1 << 20
"""Input samples that are multiplied at once."""


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Change the sample rate of a waveform.

    Args:
        waveform: [samples] float32 at `from_hz`.

    Returns:
        [ceil(samples * to_hz / from_hz)] float32 at `to_hz`.
    """
    if from_hz == to_hz or not len(waveform):
        return waveform
    divisor = math.gcd(from_hz, to_hz)
    step, phases = from_hz // divisor, to_hz // divisor
    kernel, reach = _kernel(step, phases)
    length = -(-len(waveform) * phases // step)
    padded = F.pad(waveform, (reach, reach + step))
    steps_at_once = max(1, _BLOCK_SAMPLES // step)
    # Each stride of `step` samples in gives one sample of each phase out.
    parts = []
    for start in range(0, -(-length // phases), steps_at_once):
        begin = start * step
        block = padded[begin : begin + (steps_at_once - 1) * step + len(kernel)]
        # A matrix product: many times as fast as torch's convolution of one channel.
        parts.append((block.unfold(0, len(kernel), step) @ kernel).reshape(-1))
    return torch.cat(parts)[:length]


@lru_cache(maxsize=32)
def _kernel(step: int, phases: int) -> tuple[Tensor, int]:
    """Taps [2 * reach + step, phases], and how far they reach beyond a stride on either side."""
    cut_off = min(step, phases) * _ROLL_OFF
    reach = math.ceil(_ZERO_CROSSINGS * step / cut_off)
    places = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    offsets = torch.arange(0, -phases, -1, dtype=torch.float64)[:, None] / phases
    times = ((offsets + places) * cut_off).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(times * math.pi / _ZERO_CROSSINGS / 2).square()
    return (torch.sinc(times) * window * (cut_off / step)).float().T.contiguous(), reach
