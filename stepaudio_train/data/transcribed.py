"""Transcribed recordings out of prepared shards, one after the other: nothing grows with the corpus."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.audio.features import SAMPLE_RATE_HZ, batches_of_like_length
from stepaudio_train.data.records import RecordError, parse_record
from stepaudio_train.data.shards import list_shards, read_shard
from stepaudio_train.tokenizers.learning.corpus import Clip

log = logging.getLogger(__name__)

_BUFFER_CLIPS = 512
"""Clips that are shuffled and sorted by length at a time."""


def transcripts(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, transcript and audio file of every transcribed recording of a split.

    Joined records are left out: their pieces are there by themselves, and CTC learns sooner from short clips.

    Raises:
        ShardError: there are no shards, or one cannot be read.
    """
    for shard in list_shards(folder):
        yield from _of_shard(shard)


def clips(folder: Path) -> Iterator[Clip]:
    """Waveform and transcript of every recording of a split; unreadable ones are named and left out."""
    for name, text, audio in transcripts(folder):
        clip = _decoded(name, text, audio)
        if clip is not None:
            yield clip


@dataclass(frozen=True)
class ClipStream:
    """Endless batches of clips of like length, other ones for each process, in an order that follows from the seed."""

    folder: Path
    batch_s: float
    """Seconds of audio a batch, padding included."""
    seed: int
    rank: int = 0
    num_ranks: int = 1

    def batches(self, skip: int = 0) -> Iterator[list[Clip]]:
        """Batches behind the first `skip`, which are read and thrown away.

        Raises:
            ShardError: there are no shards, or one cannot be read.
            ValueError: this process's share holds no usable clip.
        """
        number, epoch = 0, 0
        while True:
            before = number
            for batch in self._epoch(epoch):
                number += 1
                if number > skip:
                    yield batch
            if number == before:
                raise ValueError(f"{self.folder}: process {self.rank} of {self.num_ranks} finds no transcribed clip")
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[list[Clip]]:
        order = random.Random(f"{self.seed} {epoch}")
        shards = list_shards(self.folder)
        order.shuffle(shards)
        buffer: list[Clip] = []
        for clip in self._own(shards):
            buffer.append(clip)
            if len(buffer) == _BUFFER_CLIPS:
                yield from self._cut(buffer, order)
                buffer = []
        yield from self._cut(buffer, order)

    def _own(self, shards: list[Path]) -> Iterator[Clip]:
        """This process's clips: of its own shards, or where there are too few, every so manieth clip of all."""
        by_shard = len(shards) >= self.num_ranks
        chosen = shards[self.rank :: self.num_ranks] if by_shard else shards
        number = 0
        for shard in chosen:
            for name, text, audio in _of_shard(shard):
                number += 1
                if not by_shard and number % self.num_ranks != self.rank:
                    continue
                clip = _decoded(name, text, audio)
                if clip is not None:
                    yield clip

    def _cut(self, buffer: list[Clip], order: random.Random) -> Iterator[list[Clip]]:
        lengths = [len(clip.waveform) for clip in buffer]
        batches = list(batches_of_like_length(lengths, round(self.batch_s * SAMPLE_RATE_HZ)))
        order.shuffle(batches)
        for batch in batches:
            yield [buffer[index] for index in batch]


def _of_shard(shard: Path) -> Iterator[tuple[str, str, bytes]]:
    for sample in read_shard(shard):
        where = f"{shard}: {sample.key}"
        try:
            record = parse_record(sample.members["json"], where)
            if "pieces" in record.meta:
                continue
            yield from ((where, part.text, sample.members[part.audio]) for part in record.audio_parts() if part.text)
        except KeyError as error:
            log.warning("left out: %s has no member %s", where, error)
        except RecordError as error:
            log.warning("left out: %s", error)


def _decoded(name: str, text: str, audio: bytes) -> Clip | None:
    try:
        return Clip(read_audio(io.BytesIO(audio), SAMPLE_RATE_HZ, name), text)
    except AudioError as error:
        log.warning("left out: %s", error)
        return None
