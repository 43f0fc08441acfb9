"""Train the small speaker encoder on recordings whose speakers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.speaker import SpeakerEncoderConfig, SpeakerTrainConfig, speaker_problems
from stepaudio_train.config.tokenizer import EncoderTrainConfig
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder, speaker_features
from stepaudio_train.objectives.speaker import am_softmax
from stepaudio_train.tokenizers.learning.optimisation import Report, optimise


@dataclass(frozen=True)
class SpeakerClip:
    """A recording of one voice."""

    waveform: Tensor
    """[samples] float32 at 16 kHz."""
    speaker: str


def train_speaker_encoder(
    train: Sequence[SpeakerClip],
    model: SpeakerEncoderConfig,
    training: SpeakerTrainConfig,
    report: Report = lambda step, metrics: None,
) -> SmallSpeakerEncoder:
    """Learn to tell the speakers of `train` apart. All speakers are drawn equally often.

    Raises:
        ConfigError: numbers that cannot be. UserError: fewer than two speakers. SpeakerError: a clip under 0.1 s.
    """
    if problems := speaker_problems(model, training):
        raise ConfigError(problems)
    names = sorted({clip.speaker for clip in train})
    if len(names) < 2:
        raise UserError(f"a speaker encoder learns from two speakers at least, and there are {len(names)}; give more")
    features = [speaker_features(clip.waveform) for clip in train]
    clips_of = [[i for i, clip in enumerate(train) if clip.speaker == name] for name in names]
    rng = np.random.default_rng(training.seed)
    torch.manual_seed(training.seed)
    encoder = SmallSpeakerEncoder(model)
    centres = nn.Linear(model.dimension, len(names), bias=False)

    def losses(step: int) -> dict[str, Tensor]:
        speakers = rng.integers(len(names), size=training.batch_clips)
        crops = [_crop(features[rng.choice(clips_of[speaker])], training.crop_frames, rng) for speaker in speakers]
        voices = encoder(torch.stack(crops))
        return {"loss": am_softmax(voices, centres.weight, torch.from_numpy(speakers), training.margin, training.scale)}

    settings = EncoderTrainConfig(
        steps=training.steps, learning_rate=training.learning_rate, weight_decay=training.weight_decay
    )
    optimise([encoder, centres], settings, losses, report)
    return encoder.eval()


def speaker_error(encoder: SmallSpeakerEncoder, clips: Sequence[SpeakerClip]) -> float:
    """Equal error rate in percent over all pairs of clips.

    Raises:
        UserError: there are no two clips of one speaker, or no two speakers.
    """
    voices = torch.stack([encoder.embed(clip.waveform) for clip in clips])
    first, second = np.triu_indices(len(clips), 1)
    speakers = np.array([clip.speaker for clip in clips])
    return equal_error_rate((voices @ voices.T).numpy()[first, second], speakers[first] == speakers[second])


def equal_error_rate(scores: ArrayLike, same: ArrayLike) -> float:
    """Where as many pairs of one speaker are rejected as pairs of two are accepted, in percent.

    Args:
        scores: [pairs], higher for voices that are more alike; same: [pairs] bool, whether it is one speaker.

    Raises:
        UserError: all pairs are of one kind.
    """
    scores, same = np.asarray(scores), np.asarray(same, dtype=bool)
    if same.all() or not same.any():
        raise UserError("the equal error rate takes pairs of one speaker and of two; give several clips of several")
    # Thresholds between scores: what lies under one is rejected. Equal scores stand or fall together.
    thresholds, places = np.unique(scores, return_inverse=True)
    rejected = np.cumsum(np.bincount(places[same], minlength=len(thresholds))) / same.sum()
    accepted = 1 - np.cumsum(np.bincount(places[~same], minlength=len(thresholds))) / (~same).sum()
    rejected, accepted = np.concatenate([[0.0], rejected]), np.concatenate([[1.0], accepted])
    after = int(np.argmax(rejected >= accepted))
    # On the line between the last point before the crossing and the first one after it.
    gap, next_gap = accepted[after - 1] - rejected[after - 1], rejected[after] - accepted[after]
    share = gap / (gap + next_gap)
    return float(100 * (rejected[after - 1] + share * (rejected[after] - rejected[after - 1])))


def _crop(features: Tensor, frames: int, rng: np.random.Generator) -> Tensor:
    """[T, M] -> [frames, M], begun at random; a shorter clip is repeated."""
    if len(features) < frames:
        features = features.repeat(-(-frames // len(features)), 1)
    start = rng.integers(len(features) - frames + 1)
    return features[start : start + frames]
