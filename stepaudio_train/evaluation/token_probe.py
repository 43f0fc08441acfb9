"""What speech tokens alone tell about sound: a pitch and loudness probe, and a language classifier.

Both are fitted on recordings with their tokens. They are simple on purpose: what they find stands in the tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.evaluation.spoken_answers import Contour, SpokenAnswer
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Vocabulary

PROBE_FRAME_S = 0.04
"""One semantic code."""
_TARGETS = ("f0", "voicing", "level")
_SIZES = Vocabulary(text_size=0)
_REACH = {"linguistic": 2, "semantic": 3}
"""Codes to either side of a frame that the probe sees: a group of 0.12 s each way."""
_PENALTY = 10.0
_CG_STEPS, _CG_TOLERANCE = 200, 1e-4
_LEVEL_RANGE_DB = 40.0
_MOST_FRAMES_APART = 6
"""By which a recording and its tokens may differ in length: what is no whole group is dropped."""
_SMOOTHING = 0.1


@dataclass(frozen=True, eq=False)
class TokenProbe:
    """Ridge regression from the codes around a frame to its pitch, voicing and level."""

    weights: Tensor
    """[places * codes, 3]"""
    means: Tensor
    """[3]"""
    speaker_semitones: dict[str | None, float]
    """Mean pitch over 1 Hz of each speaker; of all under None."""

    @classmethod
    def fit(cls, reference: Sequence[SpokenAnswer]) -> TokenProbe | None:
        """Fit on answers whose tokens and recordings (contours of PROBE_FRAME_S) are both there; None if none are.

        Pitch is learned relative to the speaker's mean: who speaks is asked for, and need not be in the tokens.
        """
        pairs = [answer for answer in reference if _is_pair(answer)]
        if not pairs:
            return None
        speakers = _mean_pitches(pairs)
        indices = torch.cat([_places(_tokens_of(answer)) for answer in pairs])
        targets, weights = (torch.cat(parts) for parts in zip(*(_targets(a, speakers) for a in pairs), strict=True))
        means = (targets * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1)
        return cls(_ridge(indices, targets - means, weights), means, speakers)

    def contour(self, answer: SpokenAnswer) -> Contour:
        """What the answer's tokens say, in frames of PROBE_FRAME_S."""
        f0, voicing, level_db = self._predict(answer).T.numpy()
        semitones = f0 + _mean_pitch(self.speaker_semitones, answer.speaker)
        f0_hz = np.where(voicing > 0.5, 2 ** (semitones / 12), 0)
        return Contour(f0_hz.astype(np.float32), level_db, PROBE_FRAME_S)

    def r2(self, held_out: Sequence[SpokenAnswer]) -> dict[str, float]:
        """Share of the variance that the probe explains in other recordings, by target; {} without any.

        Pitch counts in voiced frames, and relative to the speaker.
        """
        pairs = [answer for answer in held_out if _is_pair(answer)]
        if not pairs:
            return {}
        targets, weights = (
            torch.cat(parts) for parts in zip(*(_targets(a, self.speaker_semitones) for a in pairs), strict=True)
        )
        predicted = torch.cat([self._predict(answer) for answer in pairs])
        mean = (targets * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1)
        error, variance = ((weights * (targets - other).square()).sum(dim=0) for other in (predicted, mean))
        return dict(zip(_TARGETS, (1 - error / variance.clamp(min=1e-9)).tolist(), strict=True))

    def _predict(self, answer: SpokenAnswer) -> Tensor:
        return _sums(self.weights, _places(_tokens_of(answer))) + self.means


@dataclass(frozen=True, eq=False)
class LanguageClassifier:
    """Naive Bayes over codes and pairs of neighbouring codes of both streams; every language is as likely."""

    languages: tuple[str, ...]
    features: NDArray[np.int64]
    """[V] those of the training data, sorted. Others are passed over."""
    log_shares: NDArray[np.float64]
    """[languages, V]"""

    @classmethod
    def fit(cls, tokens: Sequence[SpeechTokens], languages: Sequence[str]) -> LanguageClassifier | None:
        """None with fewer than two languages."""
        names = tuple(sorted(set(languages)))
        if len(names) < 2:
            return None
        found = [_features(one) for one in tokens]
        features, places = np.unique(np.concatenate(found), return_inverse=True)
        rows = np.repeat([names.index(name) for name in languages], [len(one) for one in found])
        counts = np.full((len(names), len(features)), _SMOOTHING)
        np.add.at(counts, (rows, places), 1)
        return cls(names, features, np.log(counts / counts.sum(axis=1, keepdims=True)))

    def classify(self, tokens: SpeechTokens) -> str:
        """The likeliest language."""
        known = np.isin(self.features, found := _features(tokens), assume_unique=True)
        del known
        places = np.searchsorted(self.features, found).clip(max=len(self.features) - 1)
        places = places[self.features[places] == found]
        return self.languages[int(self.log_shares[:, places].sum(axis=1).argmax())]
