"""Typed, frozen configuration of the small speaker encoder. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class SpeakerEncoderConfig:
    """Sizes of the speaker encoder: 0.2 million weights."""

    __pydantic_config__ = _STRICT

    channels: int = 96
    """Of the convolutions over time."""
    dimension: int = 192
    """Of the embedding; the released speech decoder takes 192."""


@dataclass(frozen=True)
class SpeakerTrainConfig:
    """Training of the speaker encoder: under a minute on two cores."""

    __pydantic_config__ = _STRICT

    steps: int = 400
    batch_clips: int = 32
    crop_frames: int = 64
    """Frames of 10 ms that are drawn from each clip; shorter clips are repeated."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    margin: float = 0.2
    """Of the additive-margin softmax, in cosine."""
    scale: float = 30.0
    """Of the cosines, before the softmax."""
    seed: int = 0


def speaker_problems(model: SpeakerEncoderConfig, training: SpeakerTrainConfig) -> list[str]:
    """What is wrong with the numbers, a line each."""
    counts = asdict(model) | asdict(training)
    del counts["margin"], counts["seed"], counts["weight_decay"]
    problems = [f"{key}={value}: must be over 0" for key, value in counts.items() if value <= 0]
    if not 0 <= training.margin < 1:
        problems.append(f"margin={training.margin}: must be 0 or more and under 1; type margin=0.2")
    if training.weight_decay < 0:
        problems.append(f"weight_decay={training.weight_decay}: must not be under 0")
    return problems
