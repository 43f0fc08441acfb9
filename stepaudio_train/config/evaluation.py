"""Typed, frozen configuration of an evaluation. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.schema import SpeechLayout, Task

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class ContinuationConfig:
    """Held-out recordings that the model goes on from."""

    __pydantic_config__ = _STRICT

    num_prompts: int = 8
    prompt_s: float = 0.6
    """How much of a recording the model hears. Recordings that are no longer are not used."""
    max_new_s: float = 2.4
    """When a continuation is cut off if the model does not end it."""
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class EvaluateConfig:
    """What `stepaudio run evaluate` measures, and on what."""

    __pydantic_config__ = _STRICT

    model_dir: str = ""
    """`export/` folder of a finished run. Required."""
    tokens: str = ""
    """Output of `stepaudio tokenize` with the splits train, test and, if there is one, heldout_speaker. Required."""
    output: str = ""
    """Folder for evaluation.json, transcripts.jsonl and continuations.jsonl. Required."""
    max_samples: int = 1000
    """Of a held-out split, at most; the rest is not looked at."""
    likelihood_tasks: tuple[Task, ...] = ("continuation", "interleaved", "asr", "tts")
    """What held-out recordings are rendered as for the negative log-likelihoods."""
    speech_layout: SpeechLayout = "interleaved"
    """The layout that the model was trained with (`data.speech_layout`). Only the paper's gives continuations."""
    continuations: ContinuationConfig = field(default_factory=ContinuationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"


def evaluate_problems(config: EvaluateConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    required = {"model_dir": "RUN/export", "tokens": "FOLDER", "output": "FOLDER"}
    problems = [
        f"{key}: required; type {key}={example}" for key, example in required.items() if not getattr(config, key)
    ]
    if config.max_samples < 2:
        problems.append(f"max_samples={config.max_samples}: must be at least 2, to shuffle audio between samples")
    if config.speech_layout != "interleaved" and "interleaved" in config.likelihood_tasks:
        problems.append(
            f"likelihood_tasks: spans of audio and text do not go with speech_layout={config.speech_layout}; type "
            "likelihood_tasks=[continuation,asr]"
        )
    if config.continuations.prompt_s <= 0 or config.continuations.max_new_s <= 0:
        problems.append("continuations.prompt_s and continuations.max_new_s: must be over 0 seconds")
    return problems
