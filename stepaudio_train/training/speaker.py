"""Train the small speaker encoder on recordings whose speakers are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm import tqdm

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.speaker import SpeakerTrainConfig
from stepaudio_train.config.tokenizer import EncoderTrainConfig
from stepaudio_train.data.segments import ShardRecordings
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder, SpeakerError, speaker_features
from stepaudio_train.objectives.speaker import am_softmax
from stepaudio_train.tokenizers.learning.optimisation import Report, optimise

_KEPT_FRAMES = 1000
"""Of a recording: 10 s."""


@dataclass(frozen=True)
class SpeakerClip:
    """A recording of one voice."""

    features: Tensor
    """`speaker_features` [T, M]."""
    speaker: str


@dataclass(frozen=True)
class DrawnClips:
    """Recordings of a split, drawn so that no speaker has many more than another while there are others."""

    clips: list[SpeakerClip]
    num_recordings: int
    """In the split."""
    num_named: int
    """Of those, whose record says who speaks."""

    def counts(self) -> dict[str, int]:
        """For people."""
        num_speakers = len({clip.speaker for clip in self.clips})
        return {
            "num_recordings": self.num_recordings,
            "num_named": self.num_named,
            "num_clips": len(self.clips),
            "num_speakers": num_speakers,
        }


def draw_clips(recordings: ShardRecordings, max_clips: int, seed: int, progress_bar: bool = False) -> DrawnClips:
    """At most `max_clips` of the recordings whose speaker is known, each cut at 10 s; unusable ones are told.

    The speakers take turns to give a recording, drawn from their own, until there are enough. Memory grows with
    `max_clips`, and with the corpus by a number a recording.
    """
    shown = {"unit": "recording", "disable": not progress_bar, "dynamic_ncols": True}
    own: dict[str, list[int]] = {}
    for index in tqdm(range(len(recordings)), desc=f"who speaks in {recordings.name}", **shown):
        if speaker := recordings.speaker(index):
            own.setdefault(speaker, []).append(index)
    draw = random.Random(seed)
    turns = sorted(
        (turn, speaker, index)
        for speaker, indices in sorted(own.items())
        for turn, index in enumerate(draw.sample(indices, len(indices)))
    )
    chosen = sorted((index, speaker) for _, speaker, index in turns[:max_clips])
    read = (_clip(recordings, *one) for one in tqdm(chosen, desc=f"voices of {recordings.name}", **shown))
    return DrawnClips([clip for clip in read if clip is not None], len(recordings), len(turns))


def train_speaker_encoder(
    train: Sequence[SpeakerClip],
    config: SpeakerTrainConfig,
    device: torch.device,
    report: Report = lambda step, metrics: None,
) -> SmallSpeakerEncoder:
    """Learn to tell the speakers of `train` apart. All speakers are drawn equally often.

    Raises:
        UserError: fewer than two speakers, or a loss that is not finite.
    """
    training, names = config.training, sorted({clip.speaker for clip in train})
    if len(names) < 2:
        raise UserError(
            f"a speaker encoder learns from two speakers at least, and there are {len(names)}; give recordings whose "
            "manifest has the field speaker to `stepaudio prepare`, or train the flow without an encoder"
        )
    clips_of = [[clip.features for clip in train if clip.speaker == name] for name in names]
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    encoder = SmallSpeakerEncoder(config.encoder).to(device)
    centres = nn.Linear(config.encoder.dimension, len(names), bias=False).to(device)

    def losses(step: int) -> dict[str, Tensor]:
        drawn = rng.integers(len(names), size=training.batch_clips)
        features = [clips_of[speaker][rng.integers(len(clips_of[speaker]))] for speaker in drawn]
        crops = torch.stack([_crop(clip, training.crop_frames, rng) for clip in features])
        voices, speakers = encoder(crops.to(device)), torch.from_numpy(drawn).to(device)
        return {"loss": am_softmax(voices, centres.weight, speakers, training.margin, training.scale)}

    settings = EncoderTrainConfig(
        steps=training.steps, learning_rate=training.learning_rate, weight_decay=training.weight_decay
    )
    try:
        optimise([encoder, centres], settings, losses, report)
    except FloatingPointError as error:
        raise UserError(f"{error}; type a lower training.learning_rate") from error
    return encoder.eval()


@torch.inference_mode()
def speaker_error(encoder: SmallSpeakerEncoder, clips: Sequence[SpeakerClip]) -> float:
    """Equal error rate in percent over all pairs of clips.

    Raises:
        UserError: there are no two clips of one speaker, or no two speakers.
    """
    device, none = encoder.voice.weight.device, torch.zeros(0, encoder.config.dimension)
    voices = torch.cat([none, *(encoder(clip.features[None].to(device)).cpu() for clip in clips)])
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


def _clip(recordings: ShardRecordings, index: int, speaker: str) -> SpeakerClip | None:
    waveform = recordings.read(index)
    if waveform is None:
        return None
    try:
        # A copy: a slice would keep the whole.
        return SpeakerClip(speaker_features(waveform)[:_KEPT_FRAMES].clone(), speaker)
    except SpeakerError as error:
        recordings.tell(f"{recordings.name}: sample {index}: {error}")
        return None


def _crop(features: Tensor, frames: int, rng: np.random.Generator) -> Tensor:
    """[T, M] -> [frames, M], begun at random; a shorter clip is repeated."""
    if len(features) < frames:
        features = features.repeat(-(-frames // len(features)), 1)
    start = rng.integers(len(features) - frames + 1)
    return features[start : start + frames]
