"""Spoken answers and what was asked of them: the lines that `stepaudio evaluate control` reads (docs/control.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from tqdm import tqdm

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.reading import read_audio
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.records import ChatTask
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import TAGS, AskedTag, TagVocabulary
from stepaudio_train.evaluation.contours import FRAME_S, Contour
from stepaudio_train.tokenizers.dual import GROUP_SAMPLES, SEMANTIC_PER_GROUP, audio_text_to_ids, split_streams
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

SPOKEN_TASKS = ("tts", "edit")
_GROUP_S = GROUP_SAMPLES / SAMPLE_RATE_HZ


@dataclass(frozen=True, eq=False)
class SpokenAnswer:
    """A text that was spoken, what was asked of the speech, and what is known of it."""

    id: str
    task: ChatTask
    text: str
    duration_s: float
    """Of the loud part of the recording, or else of the tokens."""
    tags: tuple[AskedTag, ...] = ()
    language: str | None = None
    """That asked for, or else the text's; by the English name of its tag, if it has one."""
    speaker: str | None = None
    notes: tuple[float, ...] = ()
    """The melody asked for, a number a word."""
    tokens: SpeechTokens | None = None
    sound: Contour | None = None
    """Of the recording, or as a probe reads it from the tokens."""
    heard_language: str | None = None
    """As a classifier hears it."""

    def asks_for(self, name: str) -> bool:
        """Whether the tag of that English name is asked for, and no other one."""
        return len(self.tags) == 1 and self.tags[0].tag.english == name

    @property
    def asked_language(self) -> str | None:
        """The English name of the only tag, if that is a language."""
        return self.tags[0].tag.english if len(self.tags) == 1 and self.tags[0].tag.kind == "language" else None

    def level(self, signs: Mapping[str, int]) -> int | None:
        """The level of the only tag times its sign, 0 without a tag; None for other tags, several, or no level.

        Args:
            signs: English name of a tag -> 1 or -1, as in {"fast": 1, "slow": -1}.
        """
        if not self.tags:
            return 0
        asked = self.tags[0]
        sign = signs.get(asked.tag.english)
        return None if len(self.tags) > 1 or sign is None or asked.level is None else sign * asked.level


@dataclass(frozen=True)
class AnswerFile:
    """The spoken answers of a file, and the lines that are of no use. Written answers are in neither."""

    answers: list[SpokenAnswer]
    refused: list[Refusal]
    """By file:line."""


@dataclass(frozen=True)
class _Line:
    """What a line holds; further fields are not looked at."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    task: ChatTask = "tts"
    text: str = ""
    id: str | None = None
    tags: tuple[str, ...] = ()
    language: str | None = None
    speaker: str | None = None
    audio: str | None = None
    audio_tokens: str | None = None
    notes: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()


_LANGUAGES = {
    **{spelling: tag.english for tag in TAGS if tag.kind == "language" for spelling in tag.spellings()},
    "zh": "Chinese",
    "en": "English",
    "ja": "Japanese",
    "ko": "Korean",
    "yue": "Cantonese",
}


class _Unusable(UserError):
    """A line cannot be used; the message says why."""


_CHECKED = TypeAdapter(_Line)


def read_answers(path: Path, frame_s: float = FRAME_S, at_most: int | None = None) -> AnswerFile:
    """Read the lines of a file and measure their recordings.

    Args:
        frame_s: of the contours.
        at_most: lines, evenly spread over the file; all of them if not given.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = [(n, line) for n, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    step = 1 if at_most is None else max(1, math.ceil(len(lines) / at_most))
    answers: list[SpokenAnswer] = []
    refused: list[Refusal] = []
    for number, line in tqdm(lines[::step], desc=f"listen to {path.name}", unit="line", dynamic_ncols=True):
        where = f"{path}:{number}"
        try:
            answer = _read(line, where, path.parent, frame_s)
        except UserError as error:
            refused.append(Refusal(where, str(error)))
            continue
        if answer is not None:
            answers.append(answer)
    return AnswerFile(answers, refused)


def tokens_duration_s(tokens: SpeechTokens) -> float:
    """How long the speech of whole groups lasts."""
    return len(tokens.semantic) // SEMANTIC_PER_GROUP * _GROUP_S


def _read(line: bytes, where: str, folder: Path, frame_s: float) -> SpokenAnswer | None:
    """None: an answer in writing.

    Raises:
        UserError: the line cannot be used.
    """
    try:
        found = _CHECKED.validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the line"
        raise _Unusable(f"{place}: {problem['msg']}") from error
    if found.task not in SPOKEN_TASKS:
        return None
    if not found.text:
        raise _Unusable("text: must say what is spoken")
    vocabulary = TagVocabulary()
    tags = tuple(asked for tag in found.tags for asked in vocabulary.parse(f"({tag})")[0])
    tokens = _tokens(found.audio_tokens) if found.audio_tokens else None
    sound = Contour.of(read_audio(folder / found.audio, SAMPLE_RATE_HZ), frame_s) if found.audio else None
    if sound is not None and not sound.loud_s:
        raise _Unusable(f"{found.audio}: silent, or shorter than {frame_s} s")
    if sound is None and tokens is None:
        raise _Unusable("holds no speech: neither audio nor audio_tokens")
    return SpokenAnswer(
        id=found.id or where,
        task=found.task,
        text=found.text,
        duration_s=tokens_duration_s(tokens) if sound is None else sound.loud_s,
        tags=tags,
        language=_language(tags, found.language),
        speaker=found.speaker,
        notes=found.notes,
        tokens=tokens,
        sound=sound,
    )


def _language(tags: Iterable[AskedTag], told: str | None) -> str | None:
    asked = (one.tag.english for one in tags if one.tag.kind == "language")
    return next(asked, _LANGUAGES.get(told.lower(), told) if told else None)


def _tokens(text: str) -> SpeechTokens:
    try:
        linguistic, semantic = split_streams(audio_text_to_ids(text, AUDIO_IDS), AUDIO_IDS)
    except ValueError as error:
        raise _Unusable(f"audio_tokens: {error}") from error
    if not len(semantic):
        raise _Unusable("audio_tokens: less than one group of five")
    return SpeechTokens(linguistic.astype(np.int32), semantic.astype(np.int32))
