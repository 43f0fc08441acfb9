"""Typed, frozen configuration of the vocoder's training. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.learning import LoopConfig, loop_problems
from stepaudio_train.config.schema import LoggingConfig
from stepaudio_train.config.vocoder import DiscriminatorConfig, VocoderConfig, VocoderLossConfig, vocoder_problems

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class VocoderOptimizerConfig:
    """Adam, for the vocoder and for its discriminators."""

    __pydantic_config__ = _STRICT

    learning_rate: float = 2e-3
    """Of the vocoder but for its pitch predictor. HiFi-GAN and CosyVoice: 2e-4, for larger ones and longer runs."""
    f0_learning_rate: float = 1e-3
    """Of the pitch predictor, which learns in Hz and by its own loss alone."""
    discriminator_learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.8, 0.99)
    """HiFi-GAN's."""
    half_life_steps: int | None = 570
    """Steps in which the rates fall by half, the discriminators' from their own first step on; None keeps them."""
    max_grad_norm: float = 5.0
    """Of the vocoder, its pitch predictor and the discriminators, each apart."""
    average: float = 0.999
    """Share of the weights' running average that a step keeps, less in the first steps; the average is the result."""


@dataclass(frozen=True)
class VocoderTrainingConfig(LoopConfig):
    """What the vocoder learns from, and how long."""

    max_steps: int = 2000
    batch_segments: int = 8
    """Segments a step, over all processes."""
    segment_samples: int = 8192
    """A multiple of the mel's hop. CosyVoice: 24576."""
    discriminators_from: int = 1960
    """Steps before the discriminators, in which the mel and pitch losses teach alone. On two cores such a step takes a
    tenth of the time: in minutes words come from these. CosyVoice: 0."""


def _small_vocoder() -> VocoderConfig:
    """At an eighth of the released rate of its inverse STFT, which has as many more bins: half of the work a step."""
    return VocoderConfig(
        base_channels=64,
        upsample_rates=(8,),
        upsample_kernels=(16,),
        source_kernels=(7,),
        stft_samples=128,
        stft_hop_samples=32,
    )


@dataclass(frozen=True)
class VocoderTrainConfig:
    """A vocoder, on any number of processes, from recordings that need not fit into memory.

    The defaults train one of 0.44 million weights in four minutes on two cores (docs/speech_decoder.md).
    """

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/vocoder"
    corpus: str = "corpora/prepared"
    """Output folder of `stepaudio prepare` (16 kHz: nothing over 8 kHz is learned), or recordings as they are: a folder
    of audio or a manifest. Transcripts are not needed."""
    train_split: str = "train"
    held_out_split: str = "validation"
    """Of a prepared corpus. Of other recordings, as many as `held_out_clips` are held out by chance."""
    held_out_clips: int = 8
    """Clips that are measured, written to samples/ and never learned from."""
    init: str | None = None
    """Weights to begin with, of `vocoder`'s sizes: a released hift.pt, or the hift.safetensors of a run."""
    vocoder: VocoderConfig = field(default_factory=_small_vocoder)
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    losses: VocoderLossConfig = field(default_factory=VocoderLossConfig)
    optimizer: VocoderOptimizerConfig = field(default_factory=VocoderOptimizerConfig)
    training: VocoderTrainingConfig = field(default_factory=VocoderTrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    release: bool = False
    """Write hift.pt besides, which the released programs load."""
    num_workers: int = 0
    """Processes that read recordings, for each process that learns; 0: it reads them itself."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def vocoder_train_problems(config: VocoderTrainConfig) -> list[str]:
    """One line for each rule that `config` breaks in the world it is started in ($WORLD_SIZE processes)."""
    problems = [f"vocoder.{problem}" for problem in vocoder_problems(config.vocoder)] + loop_problems(config.training)
    if not Path(config.corpus).exists():
        problems.append(f"corpus={config.corpus}: no such file or folder; type corpus=FOLDER")
    if config.init is not None and not Path(config.init).is_file():
        problems.append(f"init={config.init}: no such file; type init=FILE.pt or init=FILE.safetensors")
    highest_hz = config.losses.highest_hz
    if highest_hz is not None and not 0 < highest_hz <= config.vocoder.mel.sample_rate_hz / 2:
        problems.append(
            f"losses.highest_hz={highest_hz:g}: must be over 0 and at most half of vocoder.mel.sample_rate_hz="
            f"{config.vocoder.mel.sample_rate_hz}; type losses.highest_hz=null for that"
        )
    if config.held_out_clips < 1:
        problems.append(f"held_out_clips={config.held_out_clips}: must be at least 1")
    if config.num_workers < 0:
        problems.append(f"num_workers={config.num_workers}: must not be under 0")
    return problems + _training_problems(config) + _optimizer_problems(config.optimizer)


def _training_problems(config: VocoderTrainConfig) -> list[str]:
    training, problems = config.training, []
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if training.batch_segments < 1 or training.batch_segments % num_ranks:
        wanted = max(1, -(-training.batch_segments // num_ranks)) * num_ranks
        problems.append(
            f"training.batch_segments={training.batch_segments}: must be shared evenly by {num_ranks} process(es); "
            f"type training.batch_segments={wanted}"
        )
    hop = config.vocoder.mel.hop_samples
    # What the largest Fourier transform mirrors has to lie within a segment.
    shortest = max([config.vocoder.mel.window_samples, *(size for size, _, _ in config.discriminators.resolutions)])
    if training.segment_samples < shortest or training.segment_samples % hop:
        wanted = -(-max(training.segment_samples, shortest) // hop) * hop
        problems.append(
            f"training.segment_samples={training.segment_samples}: must be a multiple of vocoder.mel.hop_samples={hop} "
            f"and at least {shortest}; type training.segment_samples={wanted}"
        )
    if training.discriminators_from < 0:
        problems.append(f"training.discriminators_from={training.discriminators_from}: must not be under 0")
    if not config.discriminators.periods and not config.discriminators.resolutions:
        problems.append("discriminators: needs a period or a resolution; type discriminators.periods=[2,3,5,7,11]")
    return problems


def _optimizer_problems(config: VocoderOptimizerConfig) -> list[str]:
    positive = {
        "learning_rate": config.learning_rate,
        "f0_learning_rate": config.f0_learning_rate,
        "discriminator_learning_rate": config.discriminator_learning_rate,
        "max_grad_norm": config.max_grad_norm,
    }
    if config.half_life_steps is not None:
        positive["half_life_steps"] = config.half_life_steps
    problems = [f"optimizer.{key}={value}: must be over 0" for key, value in positive.items() if value <= 0]
    if not all(0 <= beta < 1 for beta in config.betas):
        problems.append(f"optimizer.betas={list(config.betas)}: must be 0 or more and under 1")
    if not 0 <= config.average < 1:
        problems.append(f"optimizer.average={config.average}: must be 0 or more and under 1; 0 averages nothing")
    return problems
