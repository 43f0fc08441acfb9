"""What the released code does to a recording before it is tokenised (StepFun's tokenizer.py and utils.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.audio.reading import peak_normalise

_FRAME, _HOP = 512, 128
_SILENCE_DB = 20.0
_POWER_FLOOR = 1e-10
_KEPT_LEFT, _KEPT_RIGHT = 800, 3520
"""Samples at 16 kHz kept around speech: 0.05 s and 0.22 s."""
_LENGTH_UNIT = 240


@dataclass(frozen=True)
class Preprocessing:
    """Steps in the order they are taken. Rate and channels are seen to before."""

    peak_cap: float | None = None
    """Louder recordings are scaled down to this peak first."""
    peak_norm: bool = True
    """Bring the peak to 0.999."""
    trim: bool = False
    """Cut off silence at both ends."""

    def apply(self, waveform: Tensor) -> Tensor:
        """[samples] float32, 16 kHz mono -> the same kind."""
        if not len(waveform):
            return waveform
        if self.peak_cap is not None and float(waveform.abs().max()) > self.peak_cap:
            waveform = waveform / waveform.abs().max() * self.peak_cap
        if self.peak_norm:
            waveform = peak_normalise(waveform)
        return trim_silence(waveform) if self.trim else waveform


CHAT = Preprocessing()
"""Recordings in conversations, and training data."""
TTS_PROMPT = Preprocessing(trim=True)
"""A voice to speak with."""
EDIT_PROMPT = Preprocessing(peak_cap=0.6, trim=True)
"""A recording to be edited (Step-Audio-EditX)."""


def trim_silence(waveform: Tensor) -> Tensor:
    """Cut off what is 20 dB under the loudest frame at both ends, and leave 0.05 s before and 0.22 s after.

    Frames are 512 samples every 128, centred, beyond the ends zero; silence throughout is not cut. Where less is left
    than wanted, zeros are put in its place. The result is a whole number of 240 samples long.

    Args:
        waveform: [samples] float32 at 16 kHz.
    """
    start, stop = _loud_part(waveform)
    length = math.ceil((stop - start) / _LENGTH_UNIT) * _LENGTH_UNIT + _KEPT_LEFT + _KEPT_RIGHT
    before = start - _KEPT_LEFT
    kept = waveform[before:] if before > 0 else F.pad(waveform, (-before, 0))
    return F.pad(kept[:length], (0, max(0, length - len(kept))))


def _loud_part(waveform: Tensor) -> tuple[int, int]:
    """First sample, and one past the last, of the frames within 20 dB of the loudest."""
    frames = F.pad(waveform, (_FRAME // 2, _FRAME // 2)).unfold(0, _FRAME, _HOP)
    power = frames.square().mean(dim=1).clamp(min=_POWER_FLOOR)
    loud = (10 * torch.log10(power / power.max()) > -_SILENCE_DB).nonzero()[:, 0]
    return int(loud[0]) * _HOP, min(len(waveform), (int(loud[-1]) + 1) * _HOP)
