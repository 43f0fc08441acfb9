"""Pitch and loudness of a stretch of speech over time, and what measures of control want to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.pitch import yin

FRAME_S = 0.01
_POWER_FLOOR = 1e-10
_SILENCE_DB = -90.0
_LOUD_DB = 20.0
"""How far under the loudest frame speech may lie, as in the released trimming of silence."""
_MIN_VOICED_FRAMES = 3
_SMOOTHING_S, _RISE_S = 0.05, 0.05
_ONSET_RISE_DB, _ONSET_RANGE_DB = 4.0, 25.0
_ONSETS_APART_S = 0.2
"""Syllables come five a second at most."""


@dataclass(frozen=True, eq=False)
class Contour:
    """Pitch and loudness, frame by frame."""

    f0_hz: NDArray[np.float32]
    """[frames]; 0 where there is no voice."""
    level_db: NDArray[np.float32]
    """[frames]; of full scale."""
    frame_s: float

    @classmethod
    def of(cls, waveform: Tensor, frame_s: float = FRAME_S) -> Contour:
        """From [samples] at 16 kHz. Frames do not overlap; a last one that is not whole is dropped."""
        f0_hz, hop = yin(waveform, SAMPLE_RATE_HZ, frame_s)
        power = F.pad(waveform, (0, hop)).unfold(0, hop, hop)[: len(f0_hz)].square().mean(dim=1)
        level_db = 10 * power.clamp(min=_POWER_FLOOR).log10()
        return cls(f0_hz.numpy(), level_db.numpy(), frame_s)

    @cached_property
    def loud(self) -> NDArray[np.bool_]:
        """[frames]: within 20 dB of the loudest, and no silence."""
        return self.level_db > max(self.level_db.max(initial=_SILENCE_DB) - _LOUD_DB, _SILENCE_DB)

    @property
    def loud_s(self) -> float:
        """From the first loud frame to the last; 0 without any."""
        places = np.flatnonzero(self.loud)
        return float(places[-1] - places[0] + 1) * self.frame_s if len(places) else 0.0

    @cached_property
    def semitones(self) -> NDArray[np.float64]:
        """[frames]: pitch over 1 Hz; nan where there is no voice."""
        return 12 * np.log2(np.where(self.f0_hz > 0, self.f0_hz.astype(np.float64), np.nan))

    @cached_property
    def voiced_semitones(self) -> NDArray[np.float64]:
        """[voiced frames]"""
        return self.semitones[self.f0_hz > 0]

    @cached_property
    def mean_pitch(self) -> float:
        """In semitones; nan with hardly any voice."""
        voiced = self.voiced_semitones
        return float(voiced.mean()) if len(voiced) >= _MIN_VOICED_FRAMES else np.nan

    @cached_property
    def pitch_range(self) -> float:
        """Semitones from the 10th percentile to the 90th; nan with hardly any voice."""
        voiced = self.voiced_semitones
        return float(np.subtract(*np.percentile(voiced, (90, 10)))) if len(voiced) >= _MIN_VOICED_FRAMES else np.nan

    @cached_property
    def mean_level_db(self) -> float:
        """Of the loud frames; nan without any."""
        return float(self.level_db[self.loud].mean()) if self.loud.any() else np.nan

    @cached_property
    def interval_variation(self) -> float:
        """Standard deviation of the time between onsets, by its mean; nan for fewer than three onsets."""
        intervals_s = np.diff(self.onsets_s())
        return float(intervals_s.std() / intervals_s.mean()) if len(intervals_s) > 1 else np.nan

    def onsets_s(self) -> NDArray[np.float64]:
        """Where the smoothed level rises most: the steepest place first, and none within 0.2 s of one taken before."""
        width, rise = (max(1, round(span_s / self.frame_s)) for span_s in (_SMOOTHING_S, _RISE_S))
        floor_db = self.level_db.max(initial=_SILENCE_DB) - _ONSET_RANGE_DB
        level_db = np.pad(self.level_db.clip(min=floor_db), (width + rise, width), constant_values=floor_db)
        smooth_db = np.convolve(level_db, np.full(width, 1 / width), mode="valid")
        rises_db = smooth_db[rise:] - smooth_db[:-rise]
        onsets: list[int] = []
        for place in np.argsort(-rises_db, kind="stable"):
            if rises_db[place] < _ONSET_RISE_DB:
                break
            if all(abs(place - other) * self.frame_s >= _ONSETS_APART_S for other in onsets):
                onsets.append(int(place))
        return (np.sort(onsets) - (width + rise) / 2) * self.frame_s

    def notes(self, count: int) -> NDArray[np.float64]:
        """[count] median pitch in semitones of as many parts of one length, from the first voiced frame to the last.

        nan for a part without voice.
        """
        voiced = np.flatnonzero(self.f0_hz > 0)
        if not len(voiced):
            return np.full(count, np.nan)
        edges = np.linspace(voiced[0], voiced[-1] + 1, count + 1).round().astype(int)
        parts = (self.semitones[start:stop] for start, stop in pairwise(edges))
        return np.array([np.nan if np.isnan(part).all() else np.nanmedian(part) for part in parts])
