"""Typed, frozen configuration of preferences to learn from. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from stepaudio_train.config.sft import ChatHistory, ChatTemplate
from stepaudio_train.config.shorthand import NamedByFile

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


@dataclass(frozen=True)
class PreferenceDataConfig(NamedByFile):
    """Prompts with better and worse answers (paper 5.2). `data=FILE` means `data.path=FILE`.

    The paper's two phases, written and then spoken questions, are two runs: the second one starts with
    model.init=FIRST_RUN.
    """

    __pydantic_config__ = _STRICT

    path: str = ""
    """JSONL file, a prompt a line (docs/preferences.md). Required."""
    held_out: str | None = None
    """JSONL file to measure on."""
    template: ChatTemplate = "tts"
    """How turns are opened: as the model was fine-tuned."""
    history: ChatHistory = "text"
    """How earlier recordings of a dialogue go in: as their transcripts (paper 5.2.1), or as they are."""
    min_rating_difference: float = 1.0
    """Answers to a prompt are a pair where their mean ratings, 1 to 5, differ by at least this."""
    own_tags: tuple[str, ...] = ()
    """Instruction tags besides the paper's, of texts to be spoken."""
    speech_tokenizer: str | None = None
    """Directory of the speech tokenizer, for recordings that come without their codes."""
    epochs: float = 1.0
    """How often the file is gone through (paper 5.2: once). No effect when training.max_steps is given."""


def preference_data_problems(data: PreferenceDataConfig, key: str = "data") -> list[str]:
    """What is wrong with the files and numbers, a line each."""
    problems = []
    if not data.path:
        problems.append(f"{key}: required; type {key}=FILE.jsonl, preferences (docs/preferences.md)")
    elif not Path(data.path).is_file():
        problems.append(f"{key}={data.path}: no such file; type {key}=FILE.jsonl, preferences (docs/preferences.md)")
    if data.held_out is not None and not Path(data.held_out).is_file():
        problems.append(f"{key}.held_out={data.held_out}: no such file")
    if data.speech_tokenizer is not None and not Path(data.speech_tokenizer).is_dir():
        problems.append(f"{key}.speech_tokenizer={data.speech_tokenizer}: no such folder")
    if not 0 < data.min_rating_difference <= 4:
        problems.append(
            f"{key}.min_rating_difference={data.min_rating_difference}: must be over 0, and at most 4, the difference "
            f"of 1 and 5; type {key}.min_rating_difference=1"
        )
    if not 0 < data.epochs < math.inf:
        problems.append(f"{key}.epochs={data.epochs}: must be over 0; type {key}.epochs=1")
    return problems
