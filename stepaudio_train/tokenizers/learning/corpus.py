"""Transcribed clips as features in memory, and the batches that training draws from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from stepaudio_train.audio import peak_normalise
from stepaudio_train.audio.features import Features, pad_clips

_FRAMES_PER_S = 100
_CLIPS_AT_ONCE = 64
_CLIPS_SORTED = 2048
"""Clips sorted by length at a time, so that a batch is hardly padded."""

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """One transcribed recording."""

    waveform: Tensor
    """[samples] float32 at 16 kHz."""
    text: str


@dataclass(frozen=True)
class ClipFeatures:
    """Features of a set of clips; computed once, read many times."""

    features: list[Tensor]
    """[T, M] float32 each."""
    texts: list[str]

    @classmethod
    def compute(cls, clips: Iterable[Clip], features: Features) -> ClipFeatures:
        """Level and analyse `clips`; those without a single frame are left out."""
        rows: list[Tensor] = []
        texts: list[str] = []
        for chunk in _chunks(clips, _CLIPS_SORTED):
            chunk.sort(key=lambda clip: len(clip.waveform))
            for group in _chunks(chunk, _CLIPS_AT_ONCE):
                waveforms, num_samples = pad_clips([peak_normalise(clip.waveform) for clip in group])
                values, counts = features(waveforms, num_samples)
                for clip, row, count in zip(group, values, counts.tolist(), strict=True):
                    if count > 0:
                        rows.append(row[:count].clone())
                        texts.append(clip.text)
        return cls(rows, texts)

    @property
    def duration_s(self) -> float:
        return sum(len(row) for row in self.features) / _FRAMES_PER_S

    def stack(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clips as one batch: features [B, T, M] and frames [B]."""
        return pad_clips([self.features[index] for index in indices])


def shuffled_batches(data: ClipFeatures, batch_s: float, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices: every clip once an epoch, in batches of similar lengths drawn anew each time."""
    while True:
        jitter = torch.rand(len(data.features), generator=generator).tolist()
        # Lengths blurred by up to a fifth mix the company a clip is in from epoch to epoch.
        order = sorted(range(len(jitter)), key=lambda index: len(data.features[index]) * (1 + 0.2 * jitter[index]))
        batches = _cut(order, [len(row) for row in data.features], batch_s * _FRAMES_PER_S)
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def sorted_batches(data: ClipFeatures, batch_s: float) -> list[list[int]]:
    """Indices of every clip once, in batches of similar lengths, about `batch_s` seconds each with their padding."""
    lengths = [len(row) for row in data.features]
    return _cut(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, batch_s * _FRAMES_PER_S)


def _cut(order: list[int], lengths: list[int], budget_frames: float) -> list[list[int]]:
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batches and longest * (len(batches[-1]) + 1) <= budget_frames:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
