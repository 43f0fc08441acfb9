"""Recordings to token ids and back: both tokenizers, the merge, and what stands before and behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from stepaudio_train.audio import AudioError, read_audio, resample
from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.preprocessing import CHAT, Preprocessing
from stepaudio_train.tokenizers.dual import (
    LINGUISTIC_PER_GROUP,
    SEMANTIC_PER_GROUP,
    TOKENS_PER_GROUP,
    audio_ids_to_text,
    audio_text_to_ids,
    merge_streams,
    split_streams,
)
from stepaudio_train.tokenizers.precision import Precision
from stepaudio_train.tokenizers.speech import SpeechTokenizer, SpeechTokens
from stepaudio_train.tokenizers.vocabulary import Modality, Vocabulary

RELEASED_VOCABULARY = Vocabulary(text_size=65536)
_LINGUISTIC_MS, _SEMANTIC_MS = 60, 40

Audio = Tensor | str | PathLike[str]


@dataclass(frozen=True)
class TokenTime:
    """The stretch of the recording that a token stands for, in seconds from the beginning."""

    id: int
    modality: Modality
    start_s: float
    end_s: float


class DualTokenizer:
    """What StepFun's `StepAudioTokenizer` does (paper 3.1): the same audio gives the same ids."""

    def __init__(self, speech: SpeechTokenizer, vocabulary: Vocabulary = RELEASED_VOCABULARY) -> None:
        self.speech = speech
        self.vocabulary = vocabulary

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        vocabulary: Vocabulary = RELEASED_VOCABULARY,
        device: str = "auto",
        precision: Precision = "fp32",
    ) -> DualTokenizer:
        """As `SpeechTokenizer.from_directory`."""
        return cls(SpeechTokenizer.from_directory(directory, device, precision), vocabulary)

    def encode(
        self, audio: Audio, sample_rate_hz: int = SAMPLE_RATE_HZ, preprocessing: Preprocessing = CHAT
    ) -> NDArray[np.int64]:
        """Ids [5 * groups] of one recording, two linguistic and three semantic for every 0.12 s.

        Args:
            audio: a file, or samples [n] or [channels, n]; sample_rate_hz: of samples given, of a file its own.

        Raises:
            AudioError: the file cannot be read, or the samples have another shape.
        """
        return self.encode_batch([audio], sample_rate_hz, preprocessing)[0]

    def encode_batch(
        self, audios: Sequence[Audio], sample_rate_hz: int = SAMPLE_RATE_HZ, preprocessing: Preprocessing = CHAT
    ) -> list[NDArray[np.int64]]:
        """As `encode`, for many recordings at once: the same ids, sooner."""
        clips = [preprocessing.apply(_mono_16_khz(audio, sample_rate_hz)) for audio in audios]
        tokens = self.speech.encode(clips, peak_norm=False)
        return [merge_streams(codes.linguistic, codes.semantic, self.vocabulary) for codes in tokens]

    def decode(self, ids: ArrayLike) -> SpeechTokens:
        """The codes of both streams.

        Raises:
            ValueError: an id of another kind than its place asks for.
        """
        linguistic, semantic = split_streams(ids, self.vocabulary)
        return SpeechTokens(linguistic.astype(np.int32), semantic.astype(np.int32))

    def to_text(self, ids: ArrayLike) -> str:
        """`<audio_k>` for each id."""
        return audio_ids_to_text(ids, self.vocabulary)

    def from_text(self, text: str) -> NDArray[np.int64]:
        """Undo `to_text`."""
        return audio_text_to_ids(text, self.vocabulary)

    def timestamps(self, ids: ArrayLike) -> list[TokenTime]:
        """Where in the recording each id lies: linguistic tokens last 60 ms, semantic ones 40 ms.

        Raises:
            ValueError: as `decode`.
        """
        stream = np.asarray(ids)
        self.decode(stream)
        times = []
        for position, id in enumerate(stream[: len(stream) // TOKENS_PER_GROUP * TOKENS_PER_GROUP].tolist()):
            group, place = divmod(position, TOKENS_PER_GROUP)
            if place < LINGUISTIC_PER_GROUP:
                modality, length_ms, number = Modality.LINGUISTIC, _LINGUISTIC_MS, group * LINGUISTIC_PER_GROUP + place
            else:
                number = group * SEMANTIC_PER_GROUP + place - LINGUISTIC_PER_GROUP
                modality, length_ms = Modality.SEMANTIC, _SEMANTIC_MS
            times.append(TokenTime(id, modality, number * length_ms / 1000, (number + 1) * length_ms / 1000))
        return times


def _mono_16_khz(audio: Audio, sample_rate_hz: int) -> Tensor:
    if not isinstance(audio, Tensor):
        return read_audio(audio, SAMPLE_RATE_HZ)
    if audio.ndim == 2:
        audio = audio.mean(dim=0)
    if audio.ndim != 1 or not audio.is_floating_point():
        raise AudioError(f"expected float samples [n] or [channels, n], got {tuple(audio.shape)} of {audio.dtype}")
    return resample(audio.float(), sample_rate_hz, SAMPLE_RATE_HZ)
