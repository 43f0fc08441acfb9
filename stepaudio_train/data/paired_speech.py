"""Recordings with their codes, and the mel spectra that belong to them: what the speech decoder's flow learns from.

A split of `stepaudio prepare` and the folder that `stepaudio tokenize` made of it are paired by the keys of their
samples. Which clips a batch has follows from the seed alone, so a run that goes on needs no state of its data.
"""

from __future__ import annotations

import logging
import math
import random
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from stepaudio_train.audio import AudioError, resample
from stepaudio_train.audio.features import SAMPLE_RATE_HZ, batches_of_like_length
from stepaudio_train.audio.mel import decoder_log_mel
from stepaudio_train.config.decoder import FlowConfig
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.vocoder import MelConfig
from stepaudio_train.data.records import RecordError
from stepaudio_train.data.render import TokenSample
from stepaudio_train.data.segments import ShardRecordings
from stepaudio_train.data.shards import ShardError, list_shards, read_shard, shard_counts
from stepaudio_train.data.token_shards import decode_token_sample
from stepaudio_train.tokenizers.dual import TOKENS_PER_GROUP, merge_streams
from stepaudio_train.tokenizers.vocabulary import AUDIO_IDS

log = logging.getLogger(__name__)

SpeakerEmbedding = Callable[[Tensor], Tensor]
"""[samples] float32 at 16 kHz -> [speaker size] float32, whose voice it is. Raises a UserError where there is none."""
_ROUNDING_FRAMES = 3
"""The tokenizers round a clip's end up, by this much at most."""
_LENGTH_BLUR = 0.2
_NAMED_REFUSALS = 50


class PairedClip(NamedTuple):
    """A recording as the flow learns it."""

    tokens: Tensor
    """[T] int64 audio ids, whole groups."""
    mel: Tensor
    """[F, M] float32, F = `FlowConfig.num_frames(T)`."""
    speaker: Tensor
    """[speaker size] float32."""


class _Pair(NamedTuple):
    recording: int
    """Its number in the prepared split."""
    ids: NDArray[np.int16]


class PairedSpeech(Dataset[PairedClip]):
    """The clips of a split, by number. Of samples with several recordings the first, as the vocoder takes them."""

    def __init__(self, recordings: Path, codes: Path, config: FlowConfig, embed_speaker: SpeakerEmbedding) -> None:
        """
        Args:
            recordings: a split that `stepaudio prepare` wrote; codes: what `stepaudio tokenize` made of it.

        Raises:
            UserError: a folder is no finished dataset, or nothing in them belongs together.
        """
        self._config, self._embed_speaker = config, embed_speaker
        self._recordings = ShardRecordings(recordings, SAMPLE_RATE_HZ)
        self._pairs = _pairs(recordings, codes)
        if not self._pairs:
            raise UserError(
                f"{codes}: holds no codes of the recordings in {recordings}; type: stepaudio tokenize "
                f"{recordings.parent} {codes.parent} --speech-tokenizer DIR"
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> PairedClip:
        """A clip. One that cannot be used is named, and the next one takes its place.

        Raises:
            UserError: none of them can be used.
        """
        for place in chain(range(index, len(self)), range(index)):
            clip = self._read(place)
            if clip is not None:
                return clip
        raise UserError(f"{self._recordings.name}: none of its {len(self)} recordings can be used")

    @property
    def num_frames(self) -> list[int]:
        """Mel frames of each clip."""
        return [self._config.num_frames(len(pair.ids)) for pair in self._pairs]

    def batches(self, batch_frames: int, seed: int) -> Iterator[list[int]]:
        """Endless batches of at most so many mel frames, padding included, or of one clip: every clip once an epoch, in
        other company each time."""
        return chain.from_iterable(self._epoch(batch_frames, random.Random(f"{seed} {epoch}")) for epoch in count())

    def _epoch(self, batch_frames: int, order: random.Random) -> list[list[int]]:
        # Blurred, so that clips of one length are not always together; upwards, so that the limit holds.
        blurred = [math.ceil(frames * (1 + _LENGTH_BLUR * order.random())) for frames in self.num_frames]
        batches = list(batches_of_like_length(blurred, batch_frames))
        order.shuffle(batches)
        return batches

    def _read(self, index: int) -> PairedClip | None:
        recording, ids = self._pairs[index]
        waveform = self._recordings.read(recording)
        if waveform is None:
            return None
        try:
            mel, speaker = clip_mel(waveform, len(ids), self._config), self._embed_speaker(waveform)
        except UserError as error:
            self._recordings.tell(f"{self._recordings.name}: sample {recording}: {error}")
            return None
        return PairedClip(torch.from_numpy(ids.astype(np.int64)), mel, speaker)


def clip_mel(waveform: Tensor, num_tokens: int, config: FlowConfig) -> Tensor:
    """The mel [F, M] of a recording that so many tokens were made of, F = `config.num_frames(num_tokens)`.

    What is behind the last whole group of tokens is left out, and what the tokenizers rounded up is silence.

    Args:
        waveform: [samples] float32 at 16 kHz.

    Raises:
        AudioError: the recording is longer or shorter than its tokens by more than that.
    """
    num_frames, hop = config.num_frames(num_tokens), config.hop_samples
    samples = resample(waveform, SAMPLE_RATE_HZ, config.sample_rate_hz)
    behind = len(samples) // hop - num_frames
    if not -_ROUNDING_FRAMES <= behind <= config.num_frames(TOKENS_PER_GROUP) + _ROUNDING_FRAMES:
        raise AudioError(
            f"is {len(waveform) / SAMPLE_RATE_HZ:.2f} s long, and its {num_tokens} tokens stand for "
            f"{num_frames * hop / config.sample_rate_hz:.2f} s; tokenize it again"
        )
    settings = MelConfig(config.sample_rate_hz, hop_samples=hop, num_bins=config.num_mel_bins)
    mel = decoder_log_mel(F.pad(samples, (0, max(0, num_frames * hop - len(samples))))[None], settings)
    return mel[0, :, :num_frames].T


def _pairs(recordings: Path, codes: Path) -> list[_Pair]:
    """Every sample of `codes` that has a recording and a whole group of tokens; the others are named."""
    places = {key: place for place, key in enumerate(_keys(recordings))}
    pairs, refused = [], []
    for shard in tqdm(list_shards(codes), desc=f"codes of {recordings.name}", unit="shard", dynamic_ncols=True):
        for stored in read_shard(shard):
            where = f"{shard}: {stored.key}"
            try:
                if stored.key not in places:
                    raise ValueError(f"no recording in {recordings} has this key")
                pairs.append(_Pair(places[stored.key], _first_ids(decode_token_sample(stored.members, where))))
            except (RecordError, ValueError) as error:
                refused.append(f"{where}: {str(error).removeprefix(f'{where}: ')}")
    for reason in refused[:_NAMED_REFUSALS]:
        log.warning("left out: %s", reason)
    if len(refused) > _NAMED_REFUSALS:
        log.warning("left out: %d in all", len(refused))
    return pairs


def _first_ids(sample: TokenSample) -> NDArray[np.int16]:
    """Audio ids of a sample's first recording.

    Raises:
        ValueError: there are none, or a code is outside its codebook.
    """
    parts = sample.record.audio_parts()
    if not parts:
        raise ValueError("holds no codes")
    speech = sample.speech[parts[0].audio]
    ids = merge_streams(speech.linguistic, speech.semantic, AUDIO_IDS)
    if not len(ids):
        raise ValueError("is shorter than one group of tokens")
    return ids.astype(np.int16)


def _keys(folder: Path) -> Iterator[str]:
    """The keys of a dataset's samples in order, read from the tars' headers alone."""
    for name in shard_counts(folder):
        try:
            with tarfile.open(folder / name, "r:") as tar:
                yield from dict.fromkeys(member.partition(".")[0] for member in tar.getnames())
        except (tarfile.TarError, OSError) as error:
            raise ShardError(f"{folder / name}: cannot be read to its end: {error}") from error
