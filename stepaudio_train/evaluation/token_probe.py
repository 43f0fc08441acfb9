"""What speech tokens alone tell about sound: a pitch and loudness probe, and a language classifier.

Both are fitted on recordings with their tokens. They are simple on purpose: what they find stands in the tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stepaudio_train.evaluation.contours import Contour
from stepaudio_train.evaluation.spoken_answers import SpokenAnswer
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

PROBE_FRAME_S = 0.04
"""One semantic code."""
_TARGETS = ("f0", "voicing", "level")
_LINGUISTIC_REACH, _SEMANTIC_REACH = 2, 3
"""Codes to either side of a frame that the probe sees: a group of 0.12 s each way."""
_PENALTY = 30.0
_MAX_STEPS, _TOLERANCE = 200, 1e-4
_LEVEL_RANGE_DB = 40.0
_MAX_FRAMES_APART = 6
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
    """Mean pitch over 1 Hz of each speaker; of all of them under None."""

    @classmethod
    def fit(cls, reference: Sequence[SpokenAnswer]) -> TokenProbe | None:
        """Fit on answers that have tokens and contours of PROBE_FRAME_S; None if there are none.

        Pitch is learned relative to the speaker's mean: who speaks is asked for, and need not be in the tokens.
        """
        pairs = [answer for answer in reference if _is_pair(answer)]
        if not pairs:
            return None
        speakers = _speaker_semitones(pairs)
        places = torch.cat([_places(answer.tokens) for answer in pairs])
        targets, weights = _targets(pairs, speakers)
        means = _means(targets, weights)
        return cls(_ridge(places, targets - means, weights), means, speakers)

    def contour(self, answer: SpokenAnswer) -> Contour:
        """What the answer's tokens say, in frames of PROBE_FRAME_S."""
        f0, voicing, level_db = self._predict(answer).T.numpy()
        semitones = f0 + _pitch_of(answer.speaker, self.speaker_semitones)
        f0_hz = np.where(voicing > 0.5, 2 ** (semitones / 12), 0)
        return Contour(f0_hz.astype(np.float32), level_db, PROBE_FRAME_S)

    def r2(self, held_out: Sequence[SpokenAnswer]) -> dict[str, float]:
        """Share of the variance that the probe explains in other recordings, by target; {} without recordings.

        Pitch counts in voiced frames, and relative to the speaker.
        """
        pairs = [answer for answer in held_out if _is_pair(answer)]
        if not pairs:
            return {}
        targets, weights = _targets(pairs, self.speaker_semitones)
        predicted = torch.cat([self._predict(answer) for answer in pairs])
        left, variance = (
            (weights * (targets - guess).square()).sum(dim=0) for guess in (predicted, _means(targets, weights))
        )
        return dict(zip(_TARGETS, (1 - left / variance.clamp(min=1e-9)).tolist(), strict=True))

    def _predict(self, answer: SpokenAnswer) -> Tensor:
        """[frames, 3]"""
        return _sums(self.weights, _places(answer.tokens)) + self.means


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
        names = sorted(set(languages))
        if len(names) < 2:
            return None
        found = [_features(one) for one in tokens]
        features, columns = np.unique(np.concatenate(found), return_inverse=True)
        rows = np.repeat([names.index(name) for name in languages], [len(one) for one in found])
        counts = np.full((len(names), len(features)), _SMOOTHING)
        np.add.at(counts, (rows, columns), 1)
        return cls(tuple(names), features, np.log(counts / counts.sum(axis=1, keepdims=True)))

    def classify(self, tokens: SpeechTokens) -> str:
        """The likeliest language."""
        found = _features(tokens)
        columns = np.searchsorted(self.features, found).clip(max=len(self.features) - 1)
        known = columns[self.features[columns] == found]
        return self.languages[int(self.log_shares[:, known].sum(axis=1).argmax())]


def _is_pair(answer: SpokenAnswer) -> bool:
    if answer.tokens is None or answer.sound is None or answer.sound.frame_s != PROBE_FRAME_S:
        return False
    return abs(len(answer.tokens.semantic) - len(answer.sound.f0_hz)) <= _MAX_FRAMES_APART


def _speaker_semitones(answers: Sequence[SpokenAnswer]) -> dict[str | None, float]:
    voiced: dict[str | None, list[NDArray[np.float64]]] = defaultdict(list)
    for answer in answers:
        for speaker in {answer.speaker, None}:
            voiced[speaker].append(answer.sound.voiced_semitones)
    return {speaker: float(np.concatenate(p).mean()) for speaker, p in voiced.items() if sum(map(len, p))}


def _pitch_of(speaker: str | None, semitones: dict[str | None, float]) -> float:
    """That of a speaker, or where it is not known that of all; 0 where nobody had a pitch."""
    return semitones.get(speaker, semitones.get(None, 0.0))


def _targets(answers: Sequence[SpokenAnswer], speakers: dict[str | None, float]) -> tuple[Tensor, Tensor]:
    """Targets [frames, 3] and whether they count [frames, 3], for every semantic code of all answers."""
    targets, weights = [], []
    for answer in answers:
        pitch = answer.sound.semitones - _pitch_of(answer.speaker, speakers)
        level_db = answer.sound.level_db
        level_db = level_db.clip(min=level_db.max() - _LEVEL_RANGE_DB)
        voiced, everywhere = ~np.isnan(pitch), np.ones(len(pitch))
        for parts, columns in (
            (targets, (np.nan_to_num(pitch), voiced, level_db)),
            (weights, (voiced, everywhere, everywhere)),
        ):
            frames = torch.from_numpy(np.stack(columns, axis=1)).float()[: len(answer.tokens.semantic)]
            parts.append(F.pad(frames, (0, 0, 0, len(answer.tokens.semantic) - len(frames))))
    return torch.cat(targets), torch.cat(weights)


def _means(targets: Tensor, weights: Tensor) -> Tensor:
    return (targets * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1)


def _places(tokens: SpeechTokens) -> Tensor:
    """[frames, neighbours] rows of the weights: which code stands at each place around a frame."""
    frames = torch.arange(len(tokens.semantic))
    parts, offset = [], 0
    for codes, size, reach, centres in (
        # The code that sounds in the middle of a frame: one every 40 ms, one every 60 ms.
        (tokens.semantic, AUDIO_IDS.semantic_size, _SEMANTIC_REACH, frames),
        (tokens.linguistic, AUDIO_IDS.linguistic_size, _LINGUISTIC_REACH, (2 * frames + 1) // 3),
    ):
        # One more code says that there is none.
        padded = F.pad(torch.from_numpy(codes).long(), (reach, reach + 1), value=size)
        around = torch.arange(2 * reach + 1)
        parts.append(padded[centres[:, None] + around] + around * (size + 1) + offset)
        offset += len(around) * (size + 1)
    return torch.cat(parts, dim=1)


_NUM_WEIGHTS = (2 * _SEMANTIC_REACH + 1) * (AUDIO_IDS.semantic_size + 1) + (2 * _LINGUISTIC_REACH + 1) * (
    AUDIO_IDS.linguistic_size + 1
)


def _sums(weights: Tensor, places: Tensor) -> Tensor:
    return F.embedding_bag(places, weights, mode="sum")


def _ridge(places: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Weights [_NUM_WEIGHTS, 3] of least squares with a penalty on their size, by conjugate gradients.

    The one-hot matrix is never built: its products are sums of rows and additions to rows.
    """

    def transposed(values: Tensor) -> Tensor:
        repeated = values.repeat_interleave(places.shape[1], dim=0)
        return torch.zeros(_NUM_WEIGHTS, values.shape[1]).index_add_(0, places.reshape(-1), repeated)

    residual = transposed(counted * targets)
    weights, direction = torch.zeros_like(residual), residual
    power = first_power = residual.square().sum(dim=0)
    for _ in range(_MAX_STEPS):
        if (power <= _TOLERANCE**2 * first_power).all():
            break
        curved = transposed(counted * _sums(direction, places)) + _PENALTY * direction
        step = power / (direction * curved).sum(dim=0).clamp(min=1e-30)
        weights = weights + step * direction
        residual = residual - step * curved
        before, power = power, residual.square().sum(dim=0)
        direction = residual + power / before.clamp(min=1e-30) * direction
    return weights


def _features(tokens: SpeechTokens) -> NDArray[np.int64]:
    """A number for each code and each pair of neighbours; the streams share none."""
    found, offset = [], 0
    for codes, size in (
        (tokens.linguistic.astype(np.int64), AUDIO_IDS.linguistic_size),
        (tokens.semantic.astype(np.int64), AUDIO_IDS.semantic_size),
    ):
        found += [offset + codes, offset + size * (1 + codes[:-1]) + codes[1:]]
        offset += size * (size + 1)
    return np.concatenate(found)
