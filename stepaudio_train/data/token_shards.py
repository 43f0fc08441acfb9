"""Datasets of token samples: what `stepaudio tokenize` writes and the loader reads.

    <key>.json           the record; its audio parts name their tokens
    <key>.safetensors    `NAME.linguistic` and `NAME.semantic` for each of them, uint16; absent in text datasets

Beside the shards, `stats.json` says how many tokens each task makes of the dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import TypeAdapter, ValidationError

from stepaudio_train.config.schema import Task
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.records import parse_record, record_to_json
from stepaudio_train.data.render import Renderer, RenderError, TokenSample
from stepaudio_train.data.shards import ShardError, ShardSample, list_shards, read_shard, sample_key
from stepaudio_train.tokenizers.speech import SpeechTokens

STATS_FILE = "stats.json"
COUNTED_TASKS: tuple[Task, ...] = ("text", "continuation", "interleaved", "asr", "tts")


class TokenSampleError(ValueError):
    """A stored token sample is damaged."""


@dataclass
class TaskStats:
    """What one task makes of a dataset."""

    num_samples: int = 0
    """Samples that have what the task needs."""
    num_tokens: int = 0
    min_tokens: int = 0
    """Of the shortest sample."""
    max_tokens: int = 0

    def add(self, num_tokens: int) -> None:
        """Count one document."""
        self.merge(TaskStats(1, num_tokens, num_tokens, num_tokens))

    def merge(self, other: TaskStats) -> None:
        """Add another part of the dataset."""
        if other.num_samples:
            self.min_tokens = min(self.min_tokens, other.min_tokens) if self.num_samples else other.min_tokens
            self.max_tokens = max(self.max_tokens, other.max_tokens)
            self.num_samples += other.num_samples
            self.num_tokens += other.num_tokens


@dataclass
class TokenStats:
    """What is in a dataset of token samples."""

    num_samples: int = 0
    duration_s: float = 0.0
    """Audio, in all."""
    text_tokenizer_sha256: str = ""
    """Of the file whose ids were counted."""
    tasks: dict[str, TaskStats] = field(default_factory=lambda: {task: TaskStats() for task in COUNTED_TASKS})
    refused: list[str] = field(default_factory=list)
    """Samples of the source that are not in the dataset, and why."""

    def add(self, sample: TokenSample, renderer: Renderer) -> None:
        """Count a sample under every task that can be made of it."""
        self.num_samples += 1
        self.duration_s += sum(part.duration_s or 0.0 for part in sample.record.audio_parts())
        for task in COUNTED_TASKS:
            try:
                self.tasks[task].add(len(renderer.render(sample, task)))
            except RenderError:
                continue

    def merge(self, other: TokenStats) -> None:
        """Add another part of the dataset."""
        self.num_samples += other.num_samples
        self.duration_s += other.duration_s
        self.refused += other.refused
        for task, stats in other.tasks.items():
            self.tasks[task].merge(stats)

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False).encode())

    @staticmethod
    def read(path: Path) -> TokenStats:
        """Read what `save` wrote.

        Raises:
            ShardError: missing or damaged.
        """
        try:
            return _STATS.validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ShardError(
                f"{path}: cannot be read ({error}); is {path.parent} a finished output of `stepaudio tokenize`?"
            ) from None


_STATS = TypeAdapter(TokenStats)


def encode_token_sample(sample: TokenSample) -> ShardSample:
    """The tar members of a sample."""
    content = json.dumps(record_to_json(sample.record), ensure_ascii=False).encode()
    members = {"json": content}
    if sample.speech:
        arrays = {}
        for name, tokens in sample.speech.items():
            arrays[f"{name}.linguistic"] = tokens.linguistic.astype(np.uint16)
            arrays[f"{name}.semantic"] = tokens.semantic.astype(np.uint16)
        members["safetensors"] = safetensors.numpy.save(arrays)
    return ShardSample(sample_key(sample.record.id), members)


def decode_token_sample(members: Mapping[str, bytes], where: str) -> TokenSample:
    """Read a sample from its tar members.

    Raises:
        TokenSampleError, RecordError: damaged; the message begins with `where`.
    """
    if "json" not in members:
        raise TokenSampleError(f"{where}: has no record")
    record = parse_record(members["json"], where)
    names = [part.audio for part in record.audio_parts()]
    if not names:
        return TokenSample(record)
    try:
        arrays = safetensors.numpy.load(members["safetensors"])
        speech = {n: SpeechTokens(arrays[f"{n}.linguistic"], arrays[f"{n}.semantic"]) for n in names}
    except (KeyError, safetensors.SafetensorError) as error:
        raise TokenSampleError(f"{where}: its speech tokens cannot be read: {error!r}") from error
    return TokenSample(record, speech)


def read_token_samples(folder: Path) -> Iterator[TokenSample]:
    """All samples of a dataset, in order.

    Raises:
        ShardError, TokenSampleError, RecordError: naming what is damaged.
    """
    for path in list_shards(folder):
        for stored in read_shard(path):
            yield decode_token_sample(stored.members, f"{path}: {stored.key}")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
