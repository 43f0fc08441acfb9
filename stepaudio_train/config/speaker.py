"""Typed, frozen configuration of the small speaker encoder. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.schema import LoggingConfig

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
class SpeakerTrainingConfig:
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


@dataclass(frozen=True)
class SpeakerTrainConfig:
    """A speaker encoder, in one process, from recordings whose records name who speaks."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/speaker"
    corpus: str = "corpora/prepared"
    """Output folder of `stepaudio prepare`. Transcripts are not needed."""
    train_split: str = "train"
    held_out_split: str = "validation"
    """Where the equal error rate is measured. Nothing is learned from it."""
    max_clips: int = 2000
    """Recordings that are learned from, as many of each speaker as there are; a second in memory takes 32 kB."""
    held_out_clips: int = 400
    """Recordings that are measured, drawn as the others are; all pairs of them are compared."""
    encoder: SpeakerEncoderConfig = field(default_factory=SpeakerEncoderConfig)
    training: SpeakerTrainingConfig = field(default_factory=SpeakerTrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def speaker_train_problems(config: SpeakerTrainConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    training, problems = config.training, []
    if not Path(config.corpus).is_dir():
        problems.append(f"corpus={config.corpus}: no such folder; type corpus=FOLDER, which `stepaudio prepare` wrote")
    counts = {"max_clips": config.max_clips, "held_out_clips": config.held_out_clips}
    problems += [f"{key}={value}: must be at least 2" for key, value in counts.items() if value < 2]
    positive = asdict(training)
    del positive["margin"], positive["weight_decay"]
    named = {f"encoder.{key}": value for key, value in asdict(config.encoder).items()}
    named |= {f"training.{key}": value for key, value in positive.items()}
    problems += [f"{key}={value}: must be over 0" for key, value in named.items() if value <= 0]
    if not 0 <= training.margin < 1:
        problems.append(f"training.margin={training.margin}: must be 0 or more and under 1; type training.margin=0.2")
    if training.weight_decay < 0:
        problems.append(f"training.weight_decay={training.weight_decay}: must not be under 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("--nproc: the speaker encoder learns in one process; leave --nproc out")
    return problems
