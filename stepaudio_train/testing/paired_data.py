"""A few recordings with their codes on disk, as `stepaudio prepare` and `stepaudio tokenize` write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import soundfile

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.data.prepare import PrepareOptions, prepare
from stepaudio_train.data.tokenize import TokenizeOptions, tokenize
from stepaudio_train.testing.small_tokenizers import small_speech_tokenizer
from stepaudio_train.testing.token_data import write_text_tokenizer


@dataclass(frozen=True)
class PairedCorpus:
    """Where everything is."""

    recordings: Path
    prepared: Path
    tokens: Path
    speech_tokenizer: Path


def write_paired_corpus(folder: Path, num_clips: int = 24) -> PairedCorpus:
    """Clips of 0.4 to 1 s, half of them for validation, with the codes of an untrained tokenizer."""
    corpus = PairedCorpus(*(folder / name for name in ("recordings", "prepared", "tokens", "speech_tokenizer")))
    corpus.recordings.mkdir()
    for number in range(num_clips):
        samples = speech_like(6400 + 9600 * number // num_clips, seed=number)
        soundfile.write(corpus.recordings / f"{number % 10}_ann_{number}.wav", samples.numpy(), SAMPLE_RATE_HZ)
    small_speech_tokenizer().save(corpus.speech_tokenizer)
    text_tokenizer = write_text_tokenizer(folder / "text.model")
    prepare(PrepareOptions(corpus.recordings, corpus.prepared, test_percent=0, validation_percent=50))
    tokenize(TokenizeOptions(corpus.prepared, corpus.tokens, text_tokenizer, corpus.speech_tokenizer, device="cpu"))
    return corpus
