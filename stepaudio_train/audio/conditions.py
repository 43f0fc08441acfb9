"""Recordings in which the speech can be heard or not, by construction: clear, noisy, cut, silent.

Waveforms are [samples] float32 at 16 kHz. The same waveform, condition and seed give the same samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stepaudio_train.audio.features import SAMPLE_RATE_HZ

Condition = Literal["clear", "noisy", "cut", "silent"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

NOISY_SNR_DB = -20.0
"""Level of the active speech over a noise of the same spectrum. Every band lies as deep as the whole, and by the speech
intelligibility index (ANSI S3.5-1997) a band that lies 15 dB or more under the noise adds nothing to what is
understood; 5 dB more cover syllables that are louder than the mean. pocketsphinx hears no word of espeak's from -10 dB
on."""
KEPT_SHARE = (0.05, 0.15)
"""Of the active speech, in a recording that is cut: less than a word of most questions."""
ROOM_DB = (-75.0, -65.0)
"""Level of the noise in a silent recording, relative to full scale. Digital silence does not occur in real ones."""
_SHORTEST_CUT_S = 0.24
"""Two groups of audio tokens."""
_FRAME_SAMPLES = 320
_ACTIVE_DB = 20.0
"""Frames that are no further under the loudest one are speech, as in `audio.preprocessing.trim_silence`."""
_HIGHEST_PEAK = 0.99


def in_condition(waveform: Tensor, condition: Condition, seed: int) -> Tensor:
    """The recording as it would be in a condition.

    - clear: as it is.
    - noisy: as long, under steady noise with the spectrum of the speech, at `NOISY_SNR_DB`.
    - cut: it ends after `KEPT_SHARE` of the speech.
    - silent: as long, without the speech.

    Raises:
        ValueError: noisy or cut is asked of a recording in which there is nothing to hear.
    """
    if condition == "clear":
        return waveform
    generator = torch.Generator().manual_seed(seed)
    return _MAKERS[condition](waveform, generator)


def active_level(waveform: Tensor) -> tuple[float, int, int]:
    """Mean power of the frames of 20 ms in which there is speech, and the samples at which the first one starts and the
    last one ends.

    Raises:
        ValueError: there is nothing to hear.
    """
    frames = F.pad(waveform, (0, -len(waveform) % _FRAME_SAMPLES)).view(-1, _FRAME_SAMPLES)
    power = frames.double().square().mean(dim=1)
    if not len(power) or not power.max() > 0:
        raise ValueError("holds no sound")
    active = power >= power.max() * 10 ** (-_ACTIVE_DB / 10)
    places = active.nonzero()[:, 0]
    end = min(len(waveform), (int(places[-1]) + 1) * _FRAME_SAMPLES)
    return float(power[active].mean()), int(places[0]) * _FRAME_SAMPLES, end


def _noisy(waveform: Tensor, generator: torch.Generator) -> Tensor:
    speech_power, _, _ = active_level(waveform)
    noise = _with_spectrum_of(waveform, generator)
    noise_power = speech_power * 10 ** (-NOISY_SNR_DB / 10)
    mixed = waveform + noise * (noise_power / noise.double().square().mean()).sqrt().float()
    return mixed * (_HIGHEST_PEAK / mixed.abs().max()).clamp(max=1.0)


def _with_spectrum_of(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """Steady noise: each frequency keeps its magnitude and gets a random phase."""
    magnitudes = torch.fft.rfft(waveform).abs()
    phases = 2 * torch.pi * torch.rand(len(magnitudes), generator=generator)
    return torch.fft.irfft(torch.polar(magnitudes, phases), n=len(waveform))


def _cut(waveform: Tensor, generator: torch.Generator) -> Tensor:
    _, start, end = active_level(waveform)
    kept = waveform[: start + int(_between(KEPT_SHARE, generator) * (end - start))]
    return F.pad(kept, (0, max(0, round(_SHORTEST_CUT_S * SAMPLE_RATE_HZ) - len(kept))))


def _silent(waveform: Tensor, generator: torch.Generator) -> Tensor:
    return 10 ** (_between(ROOM_DB, generator) / 20) * torch.randn(len(waveform), generator=generator)


def _between(bounds: tuple[float, float], generator: torch.Generator) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand((), generator=generator))


_MAKERS: dict[Condition, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noisy": _noisy,
    "cut": _cut,
    "silent": _silent,
}
