"""Spoken answers and what was asked of them: the lines that `stepaudio evaluate control` reads (docs/control.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio.pitch import yin
from stepaudio_train.audio.reading import read_audio
from stepaudio_train.config.errors import UserError
from stepaudio_train.data.sources import Refusal
from stepaudio_train.data.tags import AskedTag, TagVocabulary
from stepaudio_train.tokenizers.dual import GROUP_SAMPLES, SEMANTIC_PER_GROUP, audio_text_to_ids, split_streams
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Vocabulary

SAMPLE_RATE_HZ = 16000
FRAME_S = 0.01
SPOKEN_TASKS = ("tts", "edit")
_GROUP_S = GROUP_SAMPLES / SAMPLE_RATE_HZ
_CODES = Vocabulary(text_size=0)
"""The paper's codebooks: `<audio_k>` is id k."""
_SILENCE_POWER = 1e-10
_LOUD_DB = 20.0
"""How far under the loudest frame speech may lie, as in the released trimming of silence."""


@dataclass(frozen=True, eq=False)
class Contour:
    """Pitch and loudness of a stretch of speech."""

    f0_hz: NDArray[np.float32]
    """[frames]; 0 where there is no voice."""
    level_db: NDArray[np.float32]
    """[frames]; of full scale."""
    frame_s: float

    @classmethod
    def of(cls, waveform: Tensor, frame_s: float = FRAME_S) -> Contour:
        """From [samples] at 16 kHz. Frames do not overlap; a last one that is not whole is dropped."""
        f0_hz, hop = yin(waveform, SAMPLE_RATE_HZ, frame_s)
        power = F.pad(waveform, (0, hop)).unfold(0, hop, hop)[: len(f0_hz)].square().mean(dim=1)
        level_db = 10 * power.clamp(min=_SILENCE_POWER).log10()
        return cls(f0_hz.numpy(), level_db.numpy(), frame_s)

    @cached_property
    def loud(self) -> NDArray[np.bool_]:
        """[frames]: within 20 dB of the loudest."""
        return self.level_db > self.level_db.max(initial=-np.inf) - _LOUD_DB

    @property
    def loud_s(self) -> float:
        """From the first loud frame to the last."""
        places = np.flatnonzero(self.loud)
        return float(places[-1] - places[0] + 1) * self.frame_s if len(places) else 0.0

    @cached_property
    def semitones(self) -> NDArray[np.float64]:
        """[frames]: pitch over 1 Hz; nan where there is no voice."""
        with np.errstate(divide="ignore"):
            return np.where(self.f0_hz > 0, 12 * np.log2(self.f0_hz), np.nan)


@dataclass(frozen=True, eq=False)
class SpokenAnswer:
    """A text that was spoken, what was asked of the speech, and what is known of it."""

    id: str
    task: str
    text: str
    duration_s: float
    """Of the loud part of the recording, or else of the tokens."""
    tags: tuple[AskedTag, ...] = ()
    language: str | None = None
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

    text: str
    task: str = "tts"
    id: str | None = None
    tags: tuple[str, ...] = ()
    language: str | None = None
    speaker: str | None = None
    audio: str | None = None
    audio_tokens: str | None = None
    notes: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()


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
    vocabulary = TagVocabulary()
    tags = tuple(asked for tag in found.tags for asked in vocabulary.parse(f"({tag})")[0])
    tokens = _tokens(found.audio_tokens) if found.audio_tokens else None
    sound = Contour.of(read_audio(folder / found.audio, SAMPLE_RATE_HZ), frame_s) if found.audio else None
    if sound is not None and not sound.loud_s:
        raise _Unusable(f"{found.audio}: shorter than a frame of {frame_s} s")
    if sound is None and tokens is None:
        raise _Unusable("holds no speech: neither audio nor audio_tokens")
    return SpokenAnswer(
        id=found.id or where,
        task=found.task,
        text=found.text,
        duration_s=tokens_duration_s(tokens) if sound is None else sound.loud_s,
        tags=tags,
        language=found.language,
        speaker=found.speaker,
        notes=found.notes,
        tokens=tokens,
        sound=sound,
    )


def _tokens(text: str) -> SpeechTokens:
    try:
        linguistic, semantic = split_streams(audio_text_to_ids(text, _CODES), _CODES)
    except ValueError as error:
        raise _Unusable(f"audio_tokens: {error}") from error
    if not len(semantic):
        raise _Unusable("audio_tokens: less than one group of five")
    return SpeechTokens(linguistic.astype(np.int32), semantic.astype(np.int32))
