"""Speech recognition by the language model itself, on held-out recordings (paper 6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stepaudio_train.data.render import TokenSample
from stepaudio_train.evaluation.word_errors import ErrorRate, word_error_rate
from stepaudio_train.rollout.speech_text import SpeechTextModel


@dataclass(frozen=True)
class Transcript:
    """One recording: what was said, and what the model heard."""

    id: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class AsrResult:
    """Transcripts of a set of recordings and their error rate."""

    errors: ErrorRate
    by_language: dict[str, ErrorRate]
    """Of the recordings whose language is told; empty if there is only one."""
    transcripts: list[Transcript]


def evaluate_asr(model: SpeechTextModel, samples: Sequence[TokenSample]) -> AsrResult:
    """Transcribe and compare. Every sample holds one recording with a transcript.

    Raises:
        ValueError: there are no samples, or one has no transcript.
    """
    references = [_transcript(sample) for sample in samples]
    hypotheses = model.transcribe(samples)
    transcripts = [
        Transcript(sample.record.id, reference, hypothesis)
        for sample, reference, hypothesis in zip(samples, references, hypotheses, strict=True)
    ]
    languages: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        languages.setdefault(sample.record.audio_parts()[0].language or "", []).append(index)
    by_language = {
        language: word_error_rate([references[i] for i in chosen], [hypotheses[i] for i in chosen])
        for language, chosen in sorted(languages.items())
        if language and len(languages) > 1
    }
    return AsrResult(word_error_rate(references, hypotheses), by_language, transcripts)


def with_shuffled_audio(samples: Sequence[TokenSample], seed: int = 0) -> list[TokenSample]:
    """The control: each sample with the speech of another one.

    A model that only knows which texts are likely scores as well on these as on the samples themselves; one that
    listens scores far worse.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError("shuffling audio needs at least two samples")
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    # A rotation of a random order: nobody keeps their own.
    giver = dict(zip(order, order[1:] + order[:1], strict=True))
    return [_with_speech_of(sample, samples[giver[index]]) for index, sample in enumerate(samples)]


def _with_speech_of(sample: TokenSample, other: TokenSample) -> TokenSample:
    name, others = sample.record.audio_parts()[0].audio, other.record.audio_parts()[0].audio
    return replace(sample, speech={name: other.speech[others]})


def _transcript(sample: TokenSample) -> str:
    parts = sample.record.audio_parts()
    if len(parts) != 1 or not parts[0].text:
        raise ValueError(f"{sample.record.id}: recognition is measured on one recording with a transcript a record")
    return parts[0].text
