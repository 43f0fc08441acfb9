"""Typed, frozen configuration of the training of the speech decoder's flow. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.decoder import FlowConfig, flow_problems
from stepaudio_train.config.learning import LoopConfig, loop_problems
from stepaudio_train.config.schema import LoggingConfig

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
_AUDIO_IDS = 5120


@dataclass(frozen=True)
class FlowOptimizerConfig:
    """Adam. After the warm-up the rate falls with the square root of the step, so it depends on no last step."""

    __pydantic_config__ = _STRICT

    learning_rate: float = 4e-3
    """Reached at the end of the warm-up. CosyVoice: 1e-3."""
    warmup_steps: int = 100
    """CosyVoice: 2500."""
    max_grad_norm: float = 5.0
    average: float = 0.995
    """Share of the weights' running average that a step keeps, less in the first steps; the average is the result."""


@dataclass(frozen=True)
class FlowTrainingConfig(LoopConfig):
    """What the flow learns from, and how long."""

    max_steps: int = 1200
    batch_frames: int = 4000
    """Mel frames a step, padding included, over all processes: 86 are a second. A longer clip is a batch by itself.
    CosyVoice: 2000 for each process."""
    encoder_steps: int = 800
    """First steps in which the encoder alone learns the mel, at a tenth of a step's cost. The warm-up and the weights'
    average begin anew behind them."""
    encoder_weight: float = 1.0
    """Of the squared error of the encoder's mel in the loss of the other steps; 0, as released: none."""


@dataclass(frozen=True)
class FlowTrainConfig:
    """A flow, on any number of processes, from recordings that need not fit into memory."""

    __pydantic_config__ = _STRICT

    run_dir: str = "runs/flow"
    corpus: str = "corpora/prepared"
    """Output folder of `stepaudio prepare`. Transcripts are not needed."""
    tokens: str = "corpora/tokens"
    """Output folder of `stepaudio tokenize` for that corpus."""
    train_split: str = "train"
    held_out_split: str = "validation"
    """Where the loss is measured. Nothing is learned from it."""
    held_out_clips: int = 64
    """Clips that are measured."""
    speaker: str | None = None
    """The speaker encoder, whose file is copied beside the flow: a speaker.safetensors, or the released campplus.onnx.
    None: the flow hears of no speaker, and learns voices from the prompt's mel alone."""
    init: str | None = None
    """Weights to begin with, of `flow`'s sizes: a released flow.pt, or the flow.safetensors of a run."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: FlowOptimizerConfig = field(default_factory=FlowOptimizerConfig)
    training: FlowTrainingConfig = field(default_factory=FlowTrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in the network that is nearly all of the work. The encoder, whose output is interpolated, and the
    loss stay in fp32."""
    num_workers: int = 0
    """Processes that read recordings, for each process that learns; 0: it reads them itself."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def flow_train_problems(config: FlowTrainConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    problems = [f"flow.{problem}" for problem in flow_problems(config.flow)] + loop_problems(config.training)
    if config.flow.vocab_size != _AUDIO_IDS:
        problems.append(
            f"flow.vocab_size={config.flow.vocab_size}: there are {_AUDIO_IDS} audio ids; type "
            f"flow.vocab_size={_AUDIO_IDS}"
        )
    for key, place, command in (("corpus", config.corpus, "prepare"), ("tokens", config.tokens, "tokenize")):
        if not Path(place).is_dir():
            problems.append(f"{key}={place}: no such folder; type {key}=FOLDER, which `stepaudio {command}` wrote")
    if config.speaker is not None and not Path(config.speaker).is_file():
        problems.append(f"speaker={config.speaker}: no such file; type speaker=FILE.safetensors or speaker=FILE.onnx")
    if config.init is not None and not Path(config.init).is_file():
        problems.append(f"init={config.init}: no such file; type init=FILE.pt or init=FILE.safetensors")
    counts = {
        "held_out_clips": config.held_out_clips,
        "training.batch_frames": config.training.batch_frames,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
    }
    problems += [f"{key}={value}: must be at least 1" for key, value in counts.items() if value < 1]
    not_negative = {
        "num_workers": config.num_workers,
        "training.encoder_steps": config.training.encoder_steps,
        "training.encoder_weight": config.training.encoder_weight,
    }
    problems += [f"{key}={value}: must not be under 0" for key, value in not_negative.items() if value < 0]
    if config.training.encoder_steps >= config.training.max_steps >= 1:
        problems.append(
            f"training.encoder_steps={config.training.encoder_steps}: must be under training.max_steps="
            f"{config.training.max_steps}, or the network learns nothing; type training.encoder_steps="
            f"{config.training.max_steps * 2 // 3}"
        )
    positive = {
        "learning_rate": config.optimizer.learning_rate,
        "max_grad_norm": config.optimizer.max_grad_norm,
    }
    problems += [f"optimizer.{key}={value}: must be over 0" for key, value in positive.items() if value <= 0]
    if not 0 <= config.optimizer.average < 1:
        problems.append(f"optimizer.average={config.optimizer.average}: must be 0 or more and under 1")
    return problems
