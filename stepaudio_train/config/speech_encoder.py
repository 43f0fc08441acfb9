"""Typed, frozen configuration of the training of one speech encoder at any size. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.tokenizer import (
    AugmentConfig,
    EncoderTrainConfig,
    LinguisticConfig,
    SemanticConfig,
    SemanticLossConfig,
    size_problems,
)

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """One encoder with its codes, on any number of processes, from prepared shards that need not fit into memory."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/speech_encoder"
    encoder: Literal["linguistic", "semantic"] = "linguistic"
    corpus: str = "corpora/prepared"
    """Output folder of `stepaudio prepare`; every recording with a transcript is used."""
    train_split: str = "train"
    held_out_split: str = "validation"
    """Where error rates are measured. Nothing is learned from it."""
    init: str | None = None
    """Directory of a speech tokenizer, released or trained here, to go on from. Its sizes are taken; the other encoder
    is copied, so that the run directory holds a whole speech tokenizer."""
    linguistic: LinguisticConfig = field(default_factory=LinguisticConfig.released)
    """Sizes, where there is no `init`."""
    semantic: SemanticConfig = field(default_factory=SemanticConfig.released)
    training: EncoderTrainConfig = field(
        default_factory=lambda: EncoderTrainConfig(steps=100_000, batch_s=600.0, learning_rate=5e-4)
    )
    """Supervised steps; 0 leaves the encoder as it is. `batch_s` is over all processes."""
    attention_weight: float = 0.3
    """Of the attention decoder's loss beside CTC's; 0 for CTC alone."""
    kmeans_steps: int = 2000
    """Of mini-batch k-means behind the supervised steps: the linguistic encoder's centroids. No effect on the other."""
    semantic_losses: SemanticLossConfig = field(default_factory=SemanticLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast."""
    save_every: int = 1000
    eval_every: int = 5000
    """Steps between measurements of the error rate; 0 for the end alone."""
    eval_clips: int = 500
    """Held-out clips that are read for it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def speech_encoder_problems(config: SpeechEncoderConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    problems = size_problems(config.linguistic, config.semantic)
    if config.training.steps < 0 or config.kmeans_steps < 0:
        problems.append("training.steps and kmeans_steps: must not be under 0")
    if config.training.steps == 0 and config.init is None:
        problems.append("training.steps=0: an encoder that is not trained needs weights; type init=DIR")
    if config.training.steps == 0 and config.encoder == "semantic":
        problems.append("training.steps=0: the semantic encoder has nothing else to learn; type training.steps=1000")
    if config.encoder == "linguistic" and config.kmeans_steps == 0 and config.init is None:
        problems.append("kmeans_steps=0: new centroids have to be learned; type kmeans_steps=2000")
    if config.training.batch_s <= 0:
        problems.append(f"training.batch_s={config.training.batch_s}: must be over 0")
    positive = {"save_every": config.save_every, "eval_clips": config.eval_clips}
    problems += [f"{key}={value}: must be at least 1" for key, value in positive.items() if value < 1]
    if not 0 <= config.attention_weight <= 10:
        problems.append(f"attention_weight={config.attention_weight}: must be 0 to 10; type attention_weight=0.3")
    return problems
