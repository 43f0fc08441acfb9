"""Typed, frozen configuration of the evaluation of speech that is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from stepaudio_train.config.judges import JudgeOptions

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class DecoderEvaluationConfig:
    """What `stepaudio run evaluate_decoder` lets be heard and judged."""

    __pydantic_config__ = _STRICT

    corpus: str = ""
    """Output folder of `stepaudio prepare`. Required, but with `answers`."""
    tokens: str = ""
    """Output folder of `stepaudio tokenize` for that corpus. Required, but with `answers`."""
    split: str = "test"
    decoder: str = ""
    """Run directory of `stepaudio run flow`, or a released CosyVoice directory. Required."""
    vocoder: str | None = None
    """Run directory of `stepaudio run vocoder`; None: `decoder` holds it."""
    model_dir: str | None = None
    """`export/` folder of a pretrained model that speaks the same texts; None: none does."""
    answers: str | None = None
    """Output folder of `stepaudio evaluate answers`, in the place of a corpus: what a fine-tuned model said, beside the
    recordings that were expected; and one answer to each instruction tag."""
    output: str = ""
    """Folder for speech.json and the sound files. Required."""
    num_recordings: int = 100
    """Held-out recordings, of those whose words the recogniser knows."""
    temperature: float = 0.5
    """Of the language model."""
    max_new_tokens: int = 500
    """12 s."""
    judges: JudgeOptions = field(default_factory=JudgeOptions)
    """Who judges. `judges.words` is what the transcripts have, where it is not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


def decoder_evaluation_problems(config: DecoderEvaluationConfig) -> list[str]:
    """What is wrong with a configuration, a line each."""
    folders = {"decoder": config.decoder}
    if config.answers is None:
        folders |= {"corpus": config.corpus, "tokens": config.tokens}
    optional = {"vocoder": config.vocoder, "model_dir": config.model_dir}
    folders |= {key: place for key, place in optional.items() if place is not None}
    problems = [
        f"{key}={place}: no such folder; type {key}=FOLDER"
        for key, place in folders.items()
        if not place or not Path(place).is_dir()
    ]
    if not config.output:
        problems.append("output: required; type output=FOLDER")
    if config.answers is not None and not (Path(config.answers) / "answers.jsonl").is_file():
        problems.append(
            f"answers={config.answers}: holds no answers.jsonl; type answers=FOLDER, which "
            "`stepaudio evaluate answers` wrote"
        )
    if config.answers is not None and config.model_dir is not None:
        problems.append("model_dir, answers: both say what was spoken; leave one of them out")
    counts = {"num_recordings": config.num_recordings, "max_new_tokens": config.max_new_tokens}
    problems += [f"{key}={value}: must be at least 1" for key, value in counts.items() if value < 1]
    if config.temperature < 0:
        problems.append(f"temperature={config.temperature}: must be 0 (the most likely token) or more")
    return problems
