"""Made-up token datasets on disk, in the form that `stepaudio tokenize` writes: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepaudio_train.data.records import AudioPart, Span, speech_record, text_record
from stepaudio_train.data.render import Renderer, TokenSample
from stepaudio_train.data.shards import finish_dataset, shard_name, write_shard
from stepaudio_train.data.token_shards import STATS_FILE, TokenStats, encode_token_sample, file_sha256
from stepaudio_train.tokenizers.speech import SpeechTokens
from stepaudio_train.tokenizers.text import train_text_tokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT_SIZE = 400


def write_text_tokenizer(path: Path) -> Path:
    """A text tokenizer of `TEXT_SIZE` ids for `WORDS`."""
    train_text_tokenizer([" ".join(WORDS)] * 5, TEXT_SIZE, path)
    return path


def make_speech(random: np.random.Generator, name: str, mean_words: float = 4.0) -> TokenSample:
    """A recording of some words, 0.48 s each: aligned, with random codes."""
    words = random.choice(WORDS, 1 + random.poisson(mean_words - 1))
    spans = tuple(Span(0.48 * i, 0.48 * (i + 1), str(word)) for i, word in enumerate(words))
    codes = SpeechTokens(
        random.integers(0, 1024, 8 * len(words), dtype=np.int32),
        random.integers(0, 4096, 12 * len(words), dtype=np.int32),
    )
    part = AudioPart("0", text=" ".join(words), spans=spans, duration_s=0.48 * len(words))
    return TokenSample(speech_record(name, part), {"0": codes})


def make_text(random: np.random.Generator, name: str) -> TokenSample:
    """A text of about 23 words."""
    return TokenSample(text_record(name, " ".join(random.choice(WORDS, 3 + random.poisson(20)))))


def write_token_dataset(
    folder: Path, samples: Sequence[TokenSample], renderer: Renderer, text_tokenizer: Path, samples_per_shard: int = 64
) -> Path:
    """Shards, index and stats; returns the folder."""
    stats = TokenStats(text_tokenizer_sha256=file_sha256(text_tokenizer))
    counts = {}
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        block = samples[start : start + samples_per_shard]
        for sample in block:
            stats.add(sample, renderer)
        name = shard_name(number)
        counts[name] = write_shard(folder / name, map(encode_token_sample, block))
    finish_dataset(folder, counts)
    stats.save(folder / STATS_FILE)
    return folder
