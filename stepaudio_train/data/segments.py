"""Pieces of recordings, cut at random: what the vocoder learns from.

Which piece is drawn when follows from the seed and the step alone. So a run that goes on needs no state of its data,
and any number of processes share the same batches.
"""

from __future__ import annotations

import io
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from stepaudio_train.audio import AudioError, read_audio
from stepaudio_train.audio.pitch import LOWEST_HZ, yin
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.vocoder import MelConfig
from stepaudio_train.data.records import RecordError, parse_record
from stepaudio_train.data.shard_reader import ShardReader
from stepaudio_train.data.shards import SHARD_PATTERN, shard_counts
from stepaudio_train.data.sources import find_recordings

log = logging.getLogger(__name__)


class Recordings(ABC):
    """Recordings by number, read when asked for. Those that cannot be read are named once."""

    def __init__(self, name: str, sample_rate_hz: int) -> None:
        self.name, self.sample_rate_hz = name, sample_rate_hz
        self._told: set[str] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> tuple[str, str | io.BytesIO] | None:
        """A recording's name, and its path or content; None if there is none, which has been told."""

    def read(self, index: int) -> Tensor | None:
        """[samples] float32 at `sample_rate_hz`; None if it cannot be read."""
        found = self.open(index)
        if found is None:
            return None
        try:
            return read_audio(found[1], self.sample_rate_hz, found[0])
        except AudioError as error:
            self.tell(str(error))
            return None

    def tell(self, problem: str) -> None:
        """Say what is left out and why."""
        if problem not in self._told:
            self._told.add(problem)
            log.warning("left out: %s", problem)


class FileRecordings(Recordings):
    """Audio files as they are."""

    def __init__(self, name: str, sample_rate_hz: int, paths: Sequence[str]) -> None:
        super().__init__(name, sample_rate_hz)
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, index: int) -> tuple[str, str | io.BytesIO] | None:
        return self._paths[index], self._paths[index]


class ShardRecordings(Recordings):
    """A split of a prepared corpus; of a sample with several recordings, the first."""

    def __init__(self, folder: Path, sample_rate_hz: int) -> None:
        """Raises:
        ShardError: the folder is no finished dataset.
        """
        super().__init__(str(folder), sample_rate_hz)
        shards = [(folder / name, count) for name, count in shard_counts(folder).items()]
        self._reader = ShardReader(shards, lambda where, reason: self.tell(f"{where}: {reason}"))

    def __len__(self) -> int:
        return len(self._reader)

    def open(self, index: int) -> tuple[str, str | io.BytesIO] | None:
        sample = self._reader[index]
        if sample is None:
            return None
        name = self._name_of(sample)
        content = next((sample[ending] for ending in sample if ending.endswith("flac")), None)
        if content is None:
            self.tell(f"{name}: holds no recording")
            return None
        return name, io.BytesIO(content)

    def speaker(self, index: int) -> str | None:
        """Who speaks in a sample's first recording; None if its record does not say, or cannot be read."""
        sample = self._reader[index]
        if sample is None:
            return None
        try:
            parts = parse_record(sample.get("json", b""), self._name_of(sample)).audio_parts()
        except RecordError as error:
            self.tell(str(error))
            return None
        return parts[0].speaker if parts else None

    def _name_of(self, sample: dict[str, Any]) -> str:
        return f"{self.name}/{sample['__shard__']}: {sample['__key__']}"


def find_corpus(
    corpus: Path, train_split: str, held_out_split: str, held_out_clips: int, sample_rate_hz: int, seed: int
) -> tuple[Recordings, list[Tensor]]:
    """What is learned from, and clips [samples] that are not.

    Args:
        corpus: output folder of `stepaudio prepare`, whose splits are taken; or a folder of audio or a manifest, of
            which `held_out_clips` are drawn.

    Raises:
        UserError: nothing usable there, or too little.
    """
    train: Recordings
    held_out: Recordings
    if any(corpus.glob(f"*/{SHARD_PATTERN}")):
        train, held_out = (ShardRecordings(corpus / split, sample_rate_hz) for split in (train_split, held_out_split))
    else:
        found = find_recordings(corpus, allow_untranscribed=True)
        for refusal in found.refusals:
            log.warning("left out: %s: %s", refusal.name, refusal.reason)
        paths = sorted({part.audio for record in found.records for part in record.audio_parts()})
        random.Random(seed).shuffle(paths)
        train = FileRecordings(str(corpus), sample_rate_hz, paths[held_out_clips:])
        held_out = FileRecordings(str(corpus), sample_rate_hz, paths[:held_out_clips])
    if not len(train):
        raise UserError(f"{train.name}: nothing is left to learn from; give more recordings than held_out_clips")
    read = (held_out.read(index) for index in _order(f"{seed} held out", len(held_out)))
    clips = list(islice((clip for clip in read if clip is not None), held_out_clips))
    if not clips:
        raise UserError(f"{held_out.name}: no recording of it can be read; the vocoder is measured on some")
    return train, clips


class SegmentBatch(NamedTuple):
    """Segments of one length with what lies around them, so that spectrum and pitch at their ends are the whole's."""

    waveforms: Tensor
    """[B, margin + segment + margin] float32; zeros beyond a recording's ends."""
    f0_hz: Tensor
    """[B, T] of the segments alone, 0 where there is no voice."""


class SegmentBatches(Dataset[SegmentBatch]):
    """Batches by the number of their step, of which each process gets its own rows. Recordings come once an epoch."""

    def __init__(
        self,
        recordings: Recordings,
        mel: MelConfig,
        batch_segments: int,
        segment_samples: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """
        Args:
            batch_segments: over all processes, whose number divides it; segment_samples: a multiple of the mel's hop.
        """
        self._recordings, self._mel = recordings, mel
        self._batch_segments, self._segment_samples = batch_segments, segment_samples
        self._seed, self._rank, self._num_ranks = seed, rank, num_ranks
        self.margin_samples = margin_samples(mel)

    def __getitem__(self, step: int) -> SegmentBatch:
        """Raises:
        UserError: not one recording can be read.
        """
        share = self._batch_segments // self._num_ranks
        first = step * self._batch_segments + self._rank * share
        waveforms = torch.stack([self._segment(number) for number in range(first, first + share)])
        margin_frames = self.margin_samples // self._mel.hop_samples
        hop_s = self._mel.hop_samples / self._mel.sample_rate_hz
        contours = torch.stack([yin(waveform, self._mel.sample_rate_hz, hop_s).f0_hz for waveform in waveforms])
        return SegmentBatch(waveforms, contours[:, margin_frames:-margin_frames])

    def _segment(self, number: int) -> Tensor:
        """The `number`-th segment that is ever drawn, with its margins."""
        draw = random.Random(f"{self._seed} segment {number}")
        waveform = self._readable(number)
        start = draw.randrange(max(len(waveform) - self._segment_samples, 0) + 1) - self.margin_samples
        end = start + self._segment_samples + 2 * self.margin_samples
        inside = waveform[max(start, 0) : end]
        return F.pad(inside, (max(-start, 0), end - max(start, 0) - len(inside)))

    def _readable(self, number: int) -> Tensor:
        """The recording whose turn it is, or the next that can be read."""
        size = len(self._recordings)
        epoch, place = divmod(number, size)
        order = _order(f"{self._seed} epoch {epoch}", size)
        for skipped in range(size):
            waveform = self._recordings.read(order[(place + skipped) % size])
            if waveform is not None:
                return waveform
        raise UserError(f"{self._recordings.name}: no recording of it can be read")


def margin_samples(mel: MelConfig) -> int:
    """Samples on each side that a frame's spectrum or pitch may reach beyond it: whole hops."""
    spectrum = (mel.window_samples - mel.hop_samples) / 2
    pitch = mel.sample_rate_hz / LOWEST_HZ + 1
    return math.ceil(max(spectrum, pitch) / mel.hop_samples) * mel.hop_samples


@lru_cache(maxsize=4)
def _order(seed: str, size: int) -> list[int]:
    """The numbers under `size`, in an order that follows from the seed."""
    return random.Random(seed).sample(range(size), size)
